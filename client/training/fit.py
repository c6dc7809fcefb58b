"""Whether a model takes the tokens of its data."""

from collections.abc import Iterable

import torch
from transformers import PretrainedConfig, PreTrainedModel

from blindtune.client.data.prepared import Split
from blindtune.client.training.positions import positions
from blindtune.errors import CheckpointError, ConfigurationError

__all__ = ["require_positions", "require_rows"]


def require_positions(config: PretrainedConfig, splits: Iterable[Split]) -> None:
    """Checks that the model has a position for every token.

    Raises:
        ConfigurationError: an example is longer.
    """
    most = positions(config)
    for split in splits:
        longest = max(split.lengths)
        if most is not None and longest > most:
            raise ConfigurationError(
                f"{split.path}: the longest example has {longest:,} tokens, and the model takes {most:,}: "
                f"set data.max_length to {most}"
            )


def require_rows(model: PreTrainedModel, pad: int | None, splits: Iterable[Split]) -> None:
    """Checks that the embedding has a row for every token, the one that pads included.

    Args:
        model: on any device, the meta device included.
        pad: number of the token that pads.

    Raises:
        CheckpointError: the tokenizer is not the model's.
    """
    embedding = model.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return
    rows = weight.shape[0]
    if pad is not None and not 0 <= pad < rows:
        raise CheckpointError(
            f"the tokenizer pads with token {pad}, and the model's embedding has {rows:,} rows: give the "
            "tokenizer a pad_token that the model knows, such as its end of a text"
        )
    for split in splits:
        largest = max(max(row["input_ids"]) for row in split.rows)
        if largest >= rows:
            raise CheckpointError(
                f"{split.path}: the tokenizer makes token {largest}, and the model's embedding has {rows:,} "
                "rows: take the tokenizer that came with the model, without tokens that were added"
            )
