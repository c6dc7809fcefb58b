"""Threads that compute one at a time, and wait for workers side by side.

What a client computes between two products fills its cores already, so two threads of it at once would gain
nothing, and would disturb each other in whatever is one for the whole process, such as torch's random
number generators. The waiting for workers is what overlaps: a thread that waits gives the baton away, and
goes on when it has it again.

    with baton.turn(0):           # computes, and no other thread of this baton does
        ...
        with waiting():           # others compute meanwhile
            answer = future.result()
        ...                       # computes again
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Baton", "Dropped", "waiting"]

_thread = threading.local()


class Dropped(BaseException):
    """Ends a turn that nobody needs any more. It is no `Exception`, so that nothing takes it for an error."""


class Baton:
    """Is held by one thread at a time, of those that want it by the one with the lowest number.

    So the oldest turn is finished first, and what the others have begun stays bounded.

    Args:
        handed: called by a thread that takes the baton over from another turn, with the number of the turn
            that had it last and of the thread's own; None as the first one's predecessor.
    """

    def __init__(self, handed: Callable[[int | None, int], None] = lambda last, now: None) -> None:
        self._handed = handed
        self._changed = threading.Condition()
        self._wanted: set[int] = set()
        self._held = False
        self._last: int | None = None
        self._dropped_from: float = float("inf")

    @contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """Holds the baton, but for the time within `waiting`.

        Args:
            number: of this turn, which no other turn has that is under way.

        Raises:
            Dropped: this turn was dropped.
        """
        if getattr(_thread, "turn", None) is not None:
            raise RuntimeError("this thread has a turn already")
        last = self._take(number)
        _thread.turn = self, number
        try:
            self._hand(last, number)
            self._require_wanted(number)
            yield
        finally:
            _thread.turn = None
            self._give()

    def drop_from(self, number: int) -> None:
        """Ends turns from a number on, each when it next takes the baton: what it waits for is awaited."""
        with self._changed:
            self._dropped_from = min(self._dropped_from, number)

    def _take(self, number: int) -> int | None:
        """Waits for the baton; whose turn it was last."""
        with self._changed:
            self._wanted.add(number)
            self._changed.wait_for(lambda: not self._held and number == min(self._wanted))
            self._wanted.remove(number)
            self._held = True
            last, self._last = self._last, number
            return last

    def _hand(self, last: int | None, number: int) -> None:
        if last != number:
            self._handed(last, number)

    def _give(self) -> None:
        with self._changed:
            self._held = False
            self._changed.notify_all()

    def _require_wanted(self, number: int) -> None:
        with self._changed:
            if number >= self._dropped_from:
                raise Dropped

    @contextmanager
    def _given_away(self, number: int) -> Iterator[None]:
        self._give()
        try:
            yield
        finally:
            # Also to handle an error: that computes as well.
            self._hand(self._take(number), number)
        self._require_wanted(number)


@contextmanager
def waiting() -> Iterator[None]:
    """Lets others compute while this thread waits for something outside; nothing may be computed within.

    Where a thread has no turn of a baton, this does nothing.

    Raises:
        Dropped: what was waited for is there, and nobody needs it any more.
    """
    turn: tuple[Baton, int] | None = getattr(_thread, "turn", None)
    if turn is None:
        yield
        return
    baton, number = turn
    with baton._given_away(number):
        yield
