"""Keeps other libraries from writing between our own lines."""

import logging
import warnings
from importlib.util import find_spec

__all__ = ["quiet_libraries"]


def quiet_libraries() -> None:
    """Errors of other libraries are still shown; their progress bars, advice and warnings are not."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if find_spec("datasets"):  # blindtune doctor does without
        from datasets.utils.logging import disable_progress_bar

        disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.getLogger("blindtune").setLevel(logging.WARNING)
