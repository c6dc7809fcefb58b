"""Requests that run and wait, each in the thread of its call: `FairQueue` says whose turn it is."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from typing import Protocol

from blindtune.server.admission.fair_queue import Bounds, FairQueue, State, Ticket
from blindtune.server.admission.identity import LOCAL
from blindtune.server.admission.limits import Limits
from blindtune.server.admission.rate import RateLimit
from blindtune.server.admission.refusals import Busy
from blindtune.server.admission.watchdog import Patience

__all__ = ["WINDOW_BYTES", "Event", "LeftError", "Place", "Places", "bounds_of"]

WINDOW_BYTES = 4 << 20
"""What gRPC takes in of a request whose rows are not read yet, and no more: see `blindtune.server.daemon`."""
_PATIENCE_SECONDS = 1.0


class LeftError(Exception):
    """Nobody waits for the answer any more."""


class Event(Protocol):
    """The part of `threading.Event` that is needed here."""

    def set(self) -> None:
        """Lets those who wait go on."""

    def wait(self) -> object:
        """Waits until it is set."""


def bounds_of(limits: Limits) -> Bounds:
    """How much runs and waits at a worker."""
    return Bounds(
        limits.max_concurrent,
        limits.max_concurrent_per_client,
        limits.max_waiting,
        limits.max_waiting_per_client,
        limits.max_waiting_bytes,
        limits.max_waiting_bytes_per_client,
    )


class Place:
    """One request's place, from `Places.place`."""

    def __init__(self, places: "Places", ticket: Ticket, event: Event) -> None:
        self._idle = 0.0
        self._done = False
        self._is_known = False
        self.ticket = ticket
        self.event = event
        self._places = places
        self._hurry: Callable[[float], object] = lambda seconds: None

    def hurried_by(self, hurry: Callable[[float], object]) -> None:
        """Says what keeps its client from holding a thread for long, once it is dropped without a header."""
        self._hurry = hurry
        if self.ticket.refusal is not None:
            self.was_dropped()

    def was_dropped(self) -> None:
        """Its client may still send the header, and is told then."""
        if not self._is_known:
            self._hurry(_PATIENCE_SECONDS)

    def line_up(self, work: int, size: int) -> None:
        """Waits from now on, without blocking. Its header has been read.

        Args:
            work: multiplications of two numbers that it takes.
            size: bytes of its operand that are yet to come.

        Raises:
            Refusal: it can't wait.
            LeftError: its client left.
        """
        self._is_known = True
        self._places.line_up(self.ticket, work, min(size, WINDOW_BYTES))

    def wait_for_turn(self) -> None:
        """Returns when its turn has come.

        Raises:
            Refusal: it was dropped.
            LeftError: its client left.
        """
        self.event.wait()
        if self.ticket.refusal is not None:
            raise self.ticket.refusal
        if self.ticket.state is State.GONE:
            raise LeftError

    @contextmanager
    def running(self, patience: Patience, held: int) -> Iterator[None]:
        """The block is what it does after its turn has come. When its client keeps it waiting for a second in
        all, it gives its place to another, and goes on without one.

        Args:
            patience: knows how long it waits.
            held: bytes that it holds at most while it waits.
        """
        before = patience.waited
        patience.give_way(_PATIENCE_SECONDS, lambda: self._places.stand_aside(self, held + WINDOW_BYTES))
        try:
            yield
            self._done = True
        finally:
            self._idle = patience.waited - before

    def leave(self) -> None:
        """Gives up waiting, from any thread: its client is gone. One that runs ends by itself."""
        self._places.leave(self)

    def end(self, queue: FairQueue, now: float) -> None:
        """Tells the queue how it went."""
        queue.leave(self.ticket, now, self._idle, self._done)


class Places:
    """The places of a worker.

    Args:
        bounds: how many.
        rate: how often a client may ask; as often as it likes unless given.
        clock: monotonic seconds.
        event: makes what requests wait for.
        waited: told the seconds that each request waited for its turn.
    """

    def __init__(
        self,
        bounds: Bounds,
        rate: RateLimit | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        event: Callable[[], Event] = threading.Event,
        waited: Callable[[float], object] = lambda seconds: None,
    ) -> None:
        self._queue = FairQueue(bounds)
        self._rate = rate
        self._clock = clock
        self._event = event
        self._waited = waited
        self._places: dict[Ticket, Place] = {}
        self._changed = threading.Condition()

    @property
    def inside(self) -> int:
        """How many requests run, those included that wait for their clients."""
        with self._changed:
            return self._queue.running + self._queue.aside

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        with self._changed:
            return self._queue.queued

    @contextmanager
    def place(self, client: str = LOCAL, seconds: float = inf) -> Iterator[Place]:
        """The block is a request.

        Args:
            client: whose.
            seconds: until its deadline.

        Raises:
            Draining: the worker is shutting down.
            Busy: too many wait, or this client asks too often.
        """
        with self._changed:
            self._queue.require_open()
            self._require_rate(client)
            ticket = self._queue.arrive(client, self._clock() + seconds)
            place = self._places[ticket] = Place(self, ticket, self._event())
            self._tell()
        try:
            yield place
        finally:
            with self._changed:
                del self._places[ticket]
                place.end(self._queue, self._clock())
                self._tell()
                self._changed.notify_all()

    def line_up(self, ticket: Ticket, work: int, held: int) -> None:
        """See `Place.line_up`."""
        with self._changed:
            if ticket.state is State.GONE and ticket.refusal is None:
                raise LeftError
            try:
                self._queue.wait(ticket, work, held, self._clock())
            finally:
                self._tell()

    def stand_aside(self, place: Place, held: int) -> None:
        """See `Place.running`."""
        with self._changed:
            self._queue.stand_aside(place.ticket, held, self._clock())
            self._tell()

    def leave(self, place: Place) -> None:
        """See `Place.leave`."""
        with self._changed:
            if place.ticket.state not in (State.RUNNING, State.ASIDE):
                self._queue.leave(place.ticket, self._clock())
                place.event.set()
                self._tell()

    def count(self, client: str = LOCAL) -> None:
        """Counts a request that needs no place.

        Raises:
            Busy: this client asks too often.
        """
        with self._changed:
            self._require_rate(client)

    def close(self) -> None:
        """Refuses whatever waits or comes from now on."""
        with self._changed:
            self._queue.close()
            self._tell()

    def wait_until_empty(self, seconds: float) -> bool:
        """Waits until no request is here, or that many seconds; returns whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._places, timeout=seconds)

    def _tell(self) -> None:
        for ticket in self._queue.news():
            if ticket.state is State.RUNNING:
                self._waited(ticket.started - ticket.lined_up)
            if ticket in self._places:
                self._places[ticket].event.set()
                if ticket.refusal is not None:
                    self._places[ticket].was_dropped()

    def _require_rate(self, client: str) -> None:
        if self._rate is not None and not self._rate.take(client):
            raise Busy(f"this client asks more than {self._rate.per_second:g} times a second, its limit")
