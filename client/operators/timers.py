"""Calls that are due later, made by one thread."""

import heapq
import logging
import threading
import time
from collections.abc import Callable
from itertools import count

from blindtune.protocol.kernels.process import this_process

__all__ = ["Cancel", "Later", "Timers"]

_logger = logging.getLogger(__name__)

Cancel = Callable[[], None]
"""Calls a call off, unless it was made or is being made."""
Later = Callable[[float, Callable[[], None]], Cancel]
"""Makes a call after so many seconds."""


class _Call:
    def __init__(self, function: Callable[[], None]) -> None:
        self.function: Callable[[], None] | None = function

    def cancel(self) -> None:
        self.function = None


class Timers:
    """A thread that begins at first use in each process, and sleeps until something is due.

    Most calls are called off before they are due, and cost no switch of threads: a call wakes the thread only
    if it is due before all others, and one that was called off is found at the moment it was due.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._numbers = count()
        self._closed = False
        self._process: object = None
        self._calls: list[tuple[float, int, _Call]] = []
        self._wakes = 0.0

    def later(self, seconds: float, function: Callable[[], None]) -> Cancel:
        """Makes a call after so many seconds, if `close` does not come first. It should take little time."""
        call = _Call(function)
        due = time.monotonic() + seconds
        with self._changed:
            if self._closed:
                return call.cancel
            if self._process is not this_process():
                self._process, self._calls, self._wakes = this_process(), [], 0.0
                threading.Thread(target=self._run, name="timers", daemon=True).start()
            heapq.heappush(self._calls, (due, next(self._numbers), call))
            if due < self._wakes:
                self._changed.notify()
        return call.cancel

    def _run(self) -> None:
        while (call := self._next()) is not None:
            function = call.function
            if function is None:
                continue
            try:
                function()
            except Exception:
                _logger.exception("a call that was due failed")

    def _next(self) -> _Call | None:
        """Waits for what is due next; None in the end."""
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                if self._calls and self._calls[0][0] <= now:
                    return heapq.heappop(self._calls)[2]
                self._wakes = self._calls[0][0] if self._calls else float("inf")
                self._changed.wait(self._wakes - now if self._calls else None)
            return None

    def close(self) -> None:
        """Ends the thread; what is not due yet is never called."""
        with self._changed:
            self._closed = True
            self._calls.clear()
            self._changed.notify()
