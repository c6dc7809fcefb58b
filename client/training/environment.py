"""The variables of the environment that would change what a recipe says is computed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_accelerate_variables"]

_PREFIX = "ACCELERATE_"


@contextmanager
def without_accelerate_variables() -> Iterator[None]:
    """Hides what Accelerate would take its precision and its devices from, until the end of the block.

    Hugging Face's arguments set some of these variables themselves; those are gone after it.
    """
    before = _taken()
    try:
        yield
    finally:
        _taken()
        os.environ.update(before)


def _taken() -> dict[str, str]:
    return {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(_PREFIX)}
