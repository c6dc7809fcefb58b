"""Whose message goes next, where several requests share a connection.

HTTP/2 carries the streams of a connection side by side, each with an equal part of the bandwidth. All of them
end late then, and about together, so that micro-batches in flight fall into step: all of them wait for
downloads, later for uploads, and a link that could do both at once is half idle. Here the request with the
least left goes first (shortest remaining processing time, Schrage 1968): short products get through between
long ones, and micro-batches are soon at different places.
"""

import threading
from collections.abc import Iterable, Iterator
from itertools import count

__all__ = ["PATIENCE_SECONDS", "Turns"]

PATIENCE_SECONDS = 0.1


class Turns:
    """Lets the messages of one connection go one at a time, in order of what their requests have left.

    It is an order, and no lock: a message that has waited for long goes all the same. So a request that is
    stuck delays others and never stops them, a long one is never put off for good, and a link on which a
    message takes longer than that is shared as it would be without turns.

    Args:
        patience: seconds that a message waits at most.
    """

    def __init__(self, patience: float = PATIENCE_SECONDS) -> None:
        self._patience = patience
        self._changed = threading.Condition()
        self._ready: list[tuple[int, int]] = []
        self._under_way: tuple[int, int] | None = None
        self._numbers = count()

    def in_turn(self, messages: Iterable[bytes], left: int) -> Iterator[bytes]:
        """The messages of one request, each when its turn has come.

        A message is under way until the next one is asked for, or the iterator is closed.

        Args:
            messages: of the request. Each is made while the one before counts as under way, so it must take
                little time to make.
            left: about how many bytes the request has to send yet, with these messages.
        """
        turn: tuple[int, int] | None = None
        try:
            for message in messages:
                turn = self._next(turn, left)
                yield message
                left -= len(message)
        finally:
            self._end(turn)

    def _next(self, before: tuple[int, int] | None, left: int) -> tuple[int, int]:
        """Ends a turn, and waits for another, for which the same request is ready at that moment."""
        turn = left, next(self._numbers)
        with self._changed:
            if self._ready or self._under_way not in (None, before):
                self._wait_for(turn, before)
            # What is under way for too long is no longer waited for.
            self._under_way = turn
        return turn

    def _wait_for(self, turn: tuple[int, int], before: tuple[int, int] | None) -> None:
        self._ready.append(turn)
        try:
            self._end(before)
            self._changed.wait_for(
                lambda: self._under_way is None and turn == min(self._ready), self._patience
            )
        finally:
            self._ready.remove(turn)

    def _end(self, turn: tuple[int, int] | None) -> None:
        with self._changed:
            if turn is not None and self._under_way == turn:
                self._under_way = None
                self._changed.notify_all()
