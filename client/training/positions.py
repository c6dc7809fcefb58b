"""How many tokens a model has positions for."""

import inspect
from functools import cache
from importlib import import_module

from transformers import PretrainedConfig

__all__ = ["positions"]

# Where a model keeps its limit, by the configurations' names for it.
_LIMITS = ("max_position_embeddings", "max_seq_len", "max_target_positions")
# What the code of models has that count a token's position from the number of the padding token.
_COUNTS_FROM_PADDING = ("def create_position_ids_from_input_ids(", "self.position_embeddings = ")
# ProphetNet does as well, and asks for the position of the token to predict besides.
_PROPHETNET = "prophetnet"


def positions(config: PretrainedConfig) -> int | None:
    """The most tokens that a model takes, by its configuration; None where there is no limit.

    RoBERTa and what was made from it count positions from the padding token's number on, so that the table
    has rows for it and for each number below, which no token uses. XLNet's limit is -1: it has none.
    """
    text = config.get_text_config(decoder=True)
    limits = (getattr(text, name, None) for name in _LIMITS)
    most = next((x for x in limits if isinstance(x, int)), None)
    if most is None or most < 1:
        return None
    if text.model_type == _PROPHETNET or _counts_from_padding(type(text).__module__):
        most -= (getattr(text, "pad_token_id", None) or 0) + 1
    return most - 1 if text.model_type == _PROPHETNET else most


@cache
def _counts_from_padding(module: str) -> bool:
    try:
        code = inspect.getsource(import_module(module.replace(".configuration_", ".modeling_")))
    except (ImportError, OSError):  # another package's model, or one without its source
        return False
    return all(x in code for x in _COUNTS_FROM_PADDING)
