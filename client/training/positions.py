"""How many tokens a model has places for."""

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from blindtune.client.data.prepared import Split
from blindtune.protocol.errors import ConfigurationError

__all__ = ["most_tokens", "require_positions"]


def most_tokens(model: PreTrainedModel) -> int | None:
    """The longest text that a model takes; None where it has no limit.

    RoBERTa and its relatives number a text's tokens from the one after the padding token's number, so they
    take fewer than their configuration says.

    Args:
        model: on any device.
    """
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [stated] if isinstance(stated, int) and stated > 0 else []
    for name, module in model.base_model.named_modules():
        # A table of positions that keeps a row for padding.
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and "position" in name:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(limits, default=None)


def require_positions(model: PreTrainedModel, splits: Iterable[Split | None]) -> None:
    """Checks that a model has a position for every token.

    Raises:
        ConfigurationError: an example is longer.
    """
    most = most_tokens(model)
    longest = max(max(x.lengths) for x in splits if x is not None)
    if most is not None and longest > most:
        raise ConfigurationError(
            f"the longest example has {longest} tokens, and the model takes {most}: set data.max_length to "
            f"{most}"
        )
