"""Clients that stop sending, or stop taking their answer, lose their place.

A request may wait for its client, for the next message or until a message is taken, as long as its
patience lasts: so many seconds at first. Waiting uses it up, computing does not, and each byte that
moves wins some back, up to what it was at first. So in its whole life a request waits no longer than
``patience_seconds + bytes / min_bytes_per_second``, and at no moment longer than ``patience_seconds``,
however much it moved before. A message counts when it is there as a whole. One that waits for its client
noticeably gives way to others before that.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import inf
from typing import TypeVar

from google.protobuf.message import Message

__all__ = ["Patience", "Watchdog"]

_Message = TypeVar("_Message", bytes, Message)


class Patience:
    """What one request may still spend on waiting. `Watchdog.watch` makes it.

    Only the request's own thread changes it, but for `hurry`. Whoever sweeps reads one attribute, for which
    no lock is needed.

    Attributes:
        waited: seconds for which the request has waited for its client so far.
    """

    def __init__(self, watchdog: "Watchdog", cancel: Callable[[], object]) -> None:
        self.cancel = cancel
        self.waited = 0.0
        self._watchdog = watchdog
        self._left = watchdog.patience_seconds
        # Where the clock stands when it comes to an end, while the request waits.
        self._end = inf
        # The same for the time after which the request gives way to others.
        self._slow: Callable[[], object] | None = None
        self._slack = self._slack_end = inf

    def give_way(self, seconds: float, tell: Callable[[], object]) -> None:
        """Tells once, wherever `sweep` is called, that the request has waited so long in all from now on."""
        self._slack, self._slow = seconds, tell

    def hurry(self, seconds: float) -> None:
        """Leaves the client so many seconds at most, from any thread: its request will be refused anyway."""
        self._left = min(self._left, seconds)
        self._end = min(self._end, self._watchdog.clock() + seconds)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The block waits for the client."""
        self._wait()
        try:
            yield
        finally:
            self._go_on()

    def moved(self, count: int) -> None:
        """So many bytes came or went."""
        watchdog = self._watchdog
        self._left = min(watchdog.patience_seconds, self._left + count / watchdog.min_bytes_per_second)

    def incoming(self, messages: Iterable[_Message]) -> Iterator[_Message]:
        """The client's messages, with the time until each one counted as waiting."""
        iterator = iter(messages)
        while True:
            self._wait()
            try:
                message = next(iterator, None)
            finally:
                self._go_on()
            if message is None:
                return
            self.moved(_size(message))
            yield message

    def outgoing(self, messages: Iterable[_Message]) -> Iterator[_Message]:
        """Messages to the client, with the time until each one is taken counted as waiting."""
        for message in messages:
            size = _size(message)
            self._wait()
            try:
                yield message
            finally:
                self._go_on()
            self.moved(size)

    def _wait(self) -> None:
        now = self._watchdog.clock()
        self._end = now + self._left
        self._slack_end = now + self._slack

    def _go_on(self) -> None:
        left = self._end - self._watchdog.clock()
        waited = self._left - left
        self.waited += waited
        self._slack -= waited
        self._left, self._end, self._slack_end = left, inf, inf

    def overdue(self, now: float) -> bool:
        """Whether the client keeps the request waiting for too long."""
        return now > self._end

    def give_way_if_slow(self, now: float) -> None:
        """Tells if the request has waited for so long that it should give way."""
        if self._slow is not None and now > self._slack_end:
            slow, self._slow = self._slow, None
            slow()


def _size(message: bytes | Message) -> int:
    return len(message) if isinstance(message, bytes) else message.ByteSize()


class Watchdog:
    """Watches requests. Whoever has a thread or a simulated clock to spare calls `sweep` now and then.

    Args:
        patience_seconds: how long a request may wait for its client.
        min_bytes_per_second: what a client must move for its requests to wait no longer than that.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        patience_seconds: float,
        min_bytes_per_second: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.patience_seconds = patience_seconds
        self.min_bytes_per_second = min_bytes_per_second
        self.clock = clock
        self._lock = threading.Lock()
        self._watched: set[Patience] = set()

    @contextmanager
    def watch(self, cancel: Callable[[], object]) -> Iterator[Patience]:
        """Watches a request while the block runs.

        Args:
            cancel: cancels it, which must free the thread that waits. Called wherever `sweep` is.
        """
        patience = Patience(self, cancel)
        with self._lock:
            self._watched.add(patience)
        try:
            yield patience
        finally:
            with self._lock:
                self._watched.discard(patience)

    def sweep(self) -> int:
        """Cancels the requests whose clients keep them waiting for too long; returns how many."""
        with self._lock:
            now = self.clock()
            overdue = {patience for patience in self._watched if patience.overdue(now)}
            self._watched -= overdue
            others = tuple(self._watched)
        for patience in overdue:
            patience.cancel()
        for patience in others:
            patience.give_way_if_slow(now)
        return len(overdue)

    def run(self, stop: threading.Event) -> None:
        """Sweeps until it is told to stop, often enough for nobody to wait noticeably longer."""
        while not stop.wait(min(1.0, self.patience_seconds / 10)):
            self.sweep()
