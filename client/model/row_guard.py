"""Refuses what would let numbers of rows, which operators see, depend on what a text says.

How long a text is shows in any case. Which of some guessed tokens were right is content: a worker that sees
whether one row or five come next learns it. So of the ways to generate, those are taken whose numbers of rows
follow from lengths alone, and all others are refused unless ``BlindConfig(rows_follow_content=True)`` asks
for them.
"""

import inspect
from typing import Any

from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from blindtune.errors import UnsupportedError

__all__ = ["guard_rows"]

_BY_LENGTH = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)
_IN_BATCHES = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
_ASK = "ask for it with BlindConfig(rows_follow_content=True), or leave it out"


def guard_rows(model: PreTrainedModel, allowed: bool) -> None:
    """Watches how a model generates, and how it is configured.

    Args:
        model: with remote layers.
        allowed: the user asked for all of it.

    Raises:
        UnsupportedError: the configuration computes labelled positions alone.
    """
    if allowed:
        return
    if getattr(model.config, "sparse_prediction", False):
        raise UnsupportedError(
            "config.sparse_prediction computes the positions that have a label alone, and operators would "
            f"see how many: set it to False in config.json; or {_ASK}"
        )
    if isinstance(model, GenerationMixin):
        model.generate = _Generate(model)
        for name in _IN_BATCHES:
            setattr(model, name, _Refused(name))


class _Generate:
    """Stands for a model's ``generate``, as an object that is copied along with its model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.__doc__ = GenerationMixin.generate.__doc__
        self.__signature__ = inspect.signature(type(model).generate.__get__(model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(self.__signature__.bind(*args, **kwargs).arguments)
        options = given.pop("kwargs", {})
        _require_known(self._model, given, options)
        return type(self._model).generate(self._model, *args, **kwargs)


class _Refused:
    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise _refusal(self._name, "when each of the texts ends")


def _require_known(model: Any, given: dict[str, Any], options: dict[str, Any]) -> None:
    if given.get("custom_generate") is not None:
        raise _refusal("custom_generate", "whatever its code makes of the text")
    config, _ = model._prepare_generation_config(given.get("generation_config"), **options)
    mode = config.get_generation_mode(given.get("assistant_model"))
    if mode is GenerationMode.ASSISTED_GENERATION or getattr(config, "is_assistant", False):
        raise _refusal(
            "assisted decoding (assistant_model, prompt_lookup_num_tokens, assistant_early_exit, use_mtp)",
            "how many guessed tokens were right",
        )
    if mode not in _BY_LENGTH:
        raise _refusal(f"generation by {mode.value}", "whatever its code makes of the text")
    if getattr(config, "token_healing", None):
        raise _refusal("token_healing", "how the prompt ends")
    if getattr(config, "cache_implementation", None) == "paged":
        raise _refusal("cache_implementation='paged'", "when each of the texts ends")


def _refusal(what: str, shows: str) -> UnsupportedError:
    return UnsupportedError(f"{what} lets operators see {shows}, by the number of rows: {_ASK}")
