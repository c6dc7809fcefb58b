"""The tokens at which an answer ends: those of the model, and those that training taught.

Chat templates may end a turn with another token than the one that ends a text. That is what a model learns
to end its answers with, so generation stops there, here and wherever the adapter's folder goes.
"""

import copy
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.utils import GENERATION_CONFIG_NAME

from blindtune.client.data.chat import encode
from blindtune.client.data.reading.formats import Conversation
from blindtune.client.training.checkpoints import damage_is_clear, read_json
from blindtune.errors import DataError

__all__ = ["stop_tokens", "taught_stops", "write_stop_tokens"]


def stop_tokens(model: Any, tokenizer: Any, learned: Iterable[int]) -> list[int]:
    """Numbers of the tokens at which generation stops.

    Args:
        model: whose own are among them.
        tokenizer: whose end of a text is among them.
        learned: those that end the answers of training data; see `blindtune.client.data.templates.ends`.
    """
    own = model.generation_config.eos_token_id
    found = {*([own] if isinstance(own, int) else own or []), *learned}
    return sorted(found | ({tokenizer.eos_token_id} - {None}))


def write_stop_tokens(model: Any, tokenizer: Any, learned: Iterable[int], folder: Path) -> None:
    """Writes the model's generation settings with the tokens at which generation stops."""
    settings = copy.deepcopy(model.generation_config)
    settings.eos_token_id = stop_tokens(model, tokenizer, learned)
    # Not `save_pretrained`, which refuses settings that the base model itself has.
    settings.to_json_file(folder / GENERATION_CONFIG_NAME)


def taught_stops(folder: Path, tokenizer: Any) -> list[int]:
    """The tokens that end answers, as a run's output folder has them, and as the chat template has.

    An earlier version did not write them down.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / GENERATION_CONFIG_NAME
    with damage_is_clear(path):
        kept = read_json(path).get("eos_token_id") or []
        found = {kept} if isinstance(kept, int) else set(kept)
        if not all(isinstance(x, int) and 0 <= x < len(tokenizer) for x in found):
            raise TypeError("eos_token_id is no list of tokens")
    question = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with suppress(DataError):  # a template may want more than this conversation has
        found |= encode(Conversation(question, "a question"), tokenizer, len(question)).ends.stops
    return sorted(found)
