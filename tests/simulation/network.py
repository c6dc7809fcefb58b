"""Streams of messages between a client and a worker, and what a network can do to them.

As on HTTP/2, messages of one stream arrive in order, whatever their delays, and a sender waits when too
much is under way. Those of different requests overtake each other.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from simulation.scheduler import Scheduler, Signal

__all__ = ["ACKNOWLEDGED", "WINDOW", "Broken", "Damage", "DeadlineExceeded", "Link", "Stream"]

WINDOW = 4096
"""Bytes of one stream that may be under way."""

ACKNOWLEDGED = b"initial metadata"
"""This very object, on its way to a client, is what gRPC calls initial metadata, and no message."""

Kind = Literal["drop", "duplicate", "truncate", "corrupt", "swap"]


class Broken(Exception):
    """The connection was reset, or the call is over."""


class DeadlineExceeded(Exception):
    """What was waited for has not come in time."""


@dataclass
class Damage:
    """What befalls one message of the next stream.

    Attributes:
        kind: "drop" (it and all after it never arrive), "duplicate", "truncate" (the stream ends
            there, as if that were all), "corrupt" (a bit is flipped), or "swap" (with the one after).
        message: which one, from 0; a shorter stream escapes.
    """

    kind: Kind
    message: int


@dataclass
class Link:
    """The way between a client and a worker.

    Attributes:
        up: False refuses connections.
        silent: nothing arrives, and nobody is told.
        delay: shortest and longest time that a message takes.
        pause: time that a reader lets pass before each message, by side.
        damage: what befalls the next streams, by direction.
    """

    up: bool = True
    silent: bool = False
    delay: tuple[float, float] = (0.001, 0.002)
    pause: dict[str, float] = field(default_factory=lambda: {"client": 0.0, "worker": 0.0})
    damage: dict[str, list[Damage]] = field(default_factory=lambda: {"client": [], "worker": []})


class Stream:
    """Messages on their way to a reader, ``to`` the client or the worker.

    Attributes:
        most_queued: the most bytes that were ever under way.
    """

    def __init__(self, scheduler: Scheduler, link: Link, to: Literal["client", "worker"]) -> None:
        self._scheduler = scheduler
        self._link = link
        self._to = to
        self._damage = link.damage[to].pop(0) if link.damage[to] else None
        self._held: bytes | None = None
        self._count = 0
        self._arrives = 0.0
        self._under_way: deque[bytes | None] = deque()
        self._queue: deque[bytes] = deque()
        self._queued = 0
        self._lost = False
        self._ended = False
        self._broken: Exception | None = None
        self._changed = Signal(scheduler)
        self.most_queued = 0

    def send(self, message: bytes) -> None:
        """Puts a message on its way; waits while the window is full.

        Raises:
            Broken: the stream is.
        """
        while self._queued and self._queued + len(message) > WINDOW and not self._broken:
            self._changed.wait()
        if self._broken:
            raise self._broken
        for part in self._damaged(message):
            self._queued += len(part)
            self.most_queued = max(self.most_queued, self._queued)
            self._deliver(part)

    def _damaged(self, message: bytes) -> Iterator[bytes]:
        number, self._count = self._count, self._count + 1
        damage = self._damage
        if self._held is not None:
            held, self._held = self._held, None
            yield message
            yield held
        elif self._lost or damage is None or damage.message != number:
            yield message
        elif damage.kind == "duplicate":
            yield message
            yield message
        elif damage.kind == "corrupt":
            place = self._scheduler.random.randrange(8 * len(message)) if message else 0
            changed = bytearray(message)
            if changed:
                changed[place // 8] ^= 1 << place % 8
            yield bytes(changed)
        elif damage.kind == "swap":
            self._held = message
        elif damage.kind == "truncate":
            self.end()
            self._lost = True
        else:
            self._lost = True
            yield message

    def _deliver(self, message: bytes) -> None:
        if self._lost or self._link.silent:
            self._lost = True  # a gap is never filled: what comes after it waits for ever
            return
        self._set_out(message)

    def acknowledge(self) -> None:
        """Sends `ACKNOWLEDGED`, which no damage befalls but the loss of all."""
        if not self._broken:
            self._deliver(ACKNOWLEDGED)

    def _set_out(self, message: bytes | None) -> None:
        """Lets a message arrive later, and not before those ahead of it; None is the end."""
        now = self._scheduler.now
        self._arrives = max(self._arrives, now + self._scheduler.random.uniform(*self._link.delay))
        self._under_way.append(message)
        self._scheduler.call_later(self._arrives - now, self._arrive)

    def _arrive(self) -> None:
        message = self._under_way.popleft()
        if message is None:
            self._ended = True
        elif not self._broken:
            self._queue.append(message)
        self._changed.notify()

    def end(self) -> None:
        """Says that no more messages follow."""
        if self._held is not None:
            held, self._held = self._held, None
            self._deliver(held)
        if not (self._lost or self._link.silent):
            self._set_out(None)

    def break_off(self, error: Exception) -> None:
        """Ends it for both sides at once."""
        self._broken = self._broken or error
        self._queue.clear()
        self._changed.notify()

    def messages(self, deadline: float) -> Iterator[bytes]:
        """What arrives.

        Raises:
            Broken: the stream is.
            DeadlineExceeded: nothing has arrived in time.
        """
        while True:
            if pause := self._link.pause[self._to]:
                self._scheduler.sleep(min(pause, max(0.0, deadline - self._scheduler.now)))
            while not (self._queue or self._broken or self._ended):
                if self._scheduler.now >= deadline:
                    raise DeadlineExceeded
                self._changed.wait(deadline)
            if self._broken:
                raise self._broken
            if self._scheduler.now >= deadline:
                raise DeadlineExceeded
            if not self._queue:
                return
            message = self._queue.popleft()
            if message is not ACKNOWLEDGED:
                self._queued -= len(message)
            self._changed.notify()
            yield message
