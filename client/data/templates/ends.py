"""The tokens that end answers, as training data teaches them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from blindtune.client.data.reading.messages import Message, texts_of

__all__ = ["Ends", "end_of_turn", "ends_of"]


@dataclass(frozen=True)
class Ends:
    """How answers end.

    Attributes:
        last: tokens after which nothing more is said.
        inner: control tokens after which more is said, as after a thought.
        endless: whether an answer ends with no token of its own.
    """

    last: frozenset[int] = frozenset()
    inner: frozenset[int] = frozenset()
    endless: bool = False

    def __or__(self, other: "Ends") -> "Ends":
        return Ends(self.last | other.last, self.inner | other.inner, self.endless or other.endless)

    @property
    def stops(self) -> frozenset[int]:
        """Tokens at which generation can stop: those that end answers, and nothing else."""
        return self.last - self.inner or self.last


def ends_of(
    ids: Sequence[int], turns: Sequence[tuple[int, int]], said: Sequence[Message], tokenizer: Any
) -> Ends:
    """How the answers among some tokens end.

    Args:
        ids: all tokens.
        turns: first token and end of each answer.
        said: the message that each answer was.
    """
    found = Ends()
    for (start, stop), message in zip(turns, said, strict=True):
        found |= _end(ids[start:stop], message, tokenizer)
    return found


def _end(ids: Sequence[int], message: Message, tokenizer: Any) -> Ends:
    control = tokenizer.added_tokens_decoder
    places = [i for i, token in enumerate(ids) if token in control]
    words = len(ids) - 1
    while words >= 0 and (ids[words] in control or not tokenizer.decode([ids[words]]).strip()):
        words -= 1
    # A call ends with tokens of its own, after which another call may come.
    after = [ids[i] for i in places if i > words][-1 if "tool_calls" in message else 0 :]
    text = texts_of(message)[-1].rstrip()
    last = {x for x in after if x == tokenizer.eos_token_id or not text.endswith(tokenizer.decode([x]))}
    return Ends(frozenset(last), frozenset(ids[i] for i in places if i < words), not last)


def end_of_turn(ids: Sequence[int], start: int, stop: int, tokenizer: Any) -> int:
    """Leaves out the white space that a template puts after the token that ends a turn: nobody says it."""
    control = tokenizer.added_tokens_decoder
    last = max((i for i in range(start, stop) if ids[i] in control), default=None)
    if last is None or tokenizer.decode(ids[last + 1 : stop]).strip():
        return stop
    return last + 1
