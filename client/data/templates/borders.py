"""From places in a text to places among its tokens, in time that grows with the text and not its square."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

__all__ = ["Borders"]


class Borders:
    """A text and its tokens.

    Args:
        text: without special tokens of the tokenizer's own.
        tokenizer: that makes tokens of it.
        ids: its tokens, if they are known.
    """

    def __init__(self, text: str, tokenizer: Any, ids: Sequence[int] | None = None) -> None:
        self.text = text
        self._tokenizer = tokenizer
        fast = bool(tokenizer.is_fast)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast)
        self.ids: list[int] = list(encoded["input_ids"] if ids is None else ids)
        control = tokenizer.added_tokens_decoder
        places = encoded["offset_mapping"] if fast and list(encoded["input_ids"]) == self.ids else ()
        # Of control tokens: which one it is of all, and its first character and its end.
        self._control = [(i, *place) for i, place in enumerate(places) if self.ids[i] in control]
        self._control_ends = [end for _, _, end in self._control]

    def token(self, end: int) -> int:
        """How many tokens the whole text and its first ``end`` characters begin with in common.

        A token may reach over the border: then it is another one in the whole, and is none of these.
        """
        # Tokenizers split a text at control tokens first, so nothing before the last of them matters.
        place = bisect_right(self._control_ends, end) - 1
        if place >= 0:
            first, start, _ = self._control[place]
            tokens = self._tokens(self.text[start:end])
            if tokens[:1] == self.ids[first : first + 1]:
                return first + _common(self.ids[first : first + len(tokens)], tokens)
        return _common(self.ids, self._tokens(self.text[:end]))

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
