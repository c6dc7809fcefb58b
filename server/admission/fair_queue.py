"""Whose request runs next: a pure state machine without clock, network or threads.

A worker runs so many requests at a time, and all others wait. Each client has a clock of its own, which shows
how much work was done for it so far, and the client whose clock is furthest behind is next (start-time fair
queueing, Goyal, Vin and Cheng 1996). So clients that always want something get equal shares, however many
requests they have in flight and however large those are. One that asks now and then is soon next, and can't
save up for later; and nobody gains by coming under a new name each time.

    arrive(client, deadline)         ARRIVED   has a place in the queue; nothing is known of it yet
    wait(ticket, work, held, now)    WAITING   its header was read
                                     RUNNING   its turn has come
    stand_aside(ticket, held, now)   ASIDE     goes on without a place: it waits for its own client
    leave(ticket, now)               GONE      in whatever state it was

`news` tells which tickets run or were dropped meanwhile. Who waits is dropped when its deadline can't be met
any more, when the worker shuts down, and when the queue is full and another client has less in it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from math import inf

from blindtune.server.admission.refusals import Busy, Displaced, Draining, Refusal, TooLate

__all__ = ["Bounds", "FairQueue", "State", "Ticket"]

# What a request costs the interpreter besides its arithmetic.
_SECONDS_OF_A_REQUEST = 0.001
# How much of what was seen so far counts after one more request, and how much too slow may it have been.
_MEMORY = 0.99
_TOO_SLOW = 8


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many requests run and wait, in all and of each client, and what those that wait may hold.

    Attributes:
        running, running_per_client: requests that run at a time.
        waiting, waiting_per_client: requests that wait, besides as many as could run.
        bytes, bytes_per_client: what they hold in memory.
    """

    running: int
    running_per_client: int
    waiting: int
    waiting_per_client: int
    bytes: int
    bytes_per_client: int


class State(Enum):
    """Where a request is."""

    ARRIVED = "its header has not been read"
    WAITING = "it waits for its turn"
    RUNNING = "it runs"
    ASIDE = "it goes on without a place"
    GONE = "it has ended, or was dropped"


@dataclass(eq=False, slots=True)
class Ticket:
    """A request's place in the queue.

    Attributes:
        client: whose.
        deadline: when nobody waits for its answer any more.
        state: where it is.
        refusal: why it was dropped.
        work: multiplications of two numbers that it takes.
        held: bytes that it holds while it has no place.
        lined_up, started: when it began to wait, and when its turn came.
    """

    client: str
    deadline: float
    state: State = State.ARRIVED
    refusal: Refusal | None = None
    work: int = 0
    held: int = 0
    lined_up: float = 0.0
    started: float = 0.0

    @property
    def holds(self) -> int:
        """Bytes that it holds now, without a place."""
        return self.held if self.state in (State.WAITING, State.ASIDE) else 0


@dataclass(eq=False, slots=True)
class _Client:
    """One client's requests.

    Attributes:
        clock: work that was done for it, on the scale of the queue's own clock.
        turn: number of its last turn, or of its arrival; the lowest one is first among equals.
        is_known: whether it has lined up before.
        queued: those that arrived or wait, in order.
        waiting, running: how many could run, and do, those aside included.
        held: bytes that those without a place hold.
        backlog: the work of those that wait.
    """

    clock: float
    turn: int
    is_known: bool = False
    queued: list[Ticket] = field(default_factory=list)
    waiting: int = 0
    running: int = 0
    held: int = 0
    backlog: int = 0

    def next(self) -> Ticket:
        """The first of those that wait."""
        return next(ticket for ticket in self.queued if ticket.state is State.WAITING)


class FairQueue:
    """The requests of a worker. Not safe for threads by itself.

    Args:
        bounds: how many, and how much.
    """

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._clients: dict[str, _Client] = {}
        self._open = True
        # Shows how much had been done for the client whose turn came last.
        self._clock = 0.0
        self._turns = count(1)
        self._pace = _Pace()
        self._news: list[Ticket] = []
        self.running = self.aside = self.queued = self.waiting = self.held = 0

    def news(self) -> list[Ticket]:
        """Tickets that have begun to run or were dropped since this was last asked."""
        news, self._news = self._news, []
        return news

    def require_open(self) -> None:
        """
        Raises:
            Draining: the queue is closed.
        """
        if not self._open:
            raise Draining("this worker is shutting down")

    def arrive(self, client: str, deadline: float = inf) -> Ticket:
        """Gives a request a place in the queue.

        Raises:
            Draining: the queue is closed.
            Busy: the queue is full, of this client's requests or of those of clients with no more than it.
        """
        self.require_open()
        self._forget()
        mine = self._clients.get(client) or _Client(self._clock, next(self._turns))
        bounds = self._bounds
        if len(mine.queued) + mine.running >= bounds.waiting_per_client + bounds.running_per_client:
            raise Busy(
                f"this worker has {mine.running} requests of this client running and {len(mine.queued)} "
                "waiting, the limit for each"
            )
        if self.queued + self.running + self.aside >= bounds.waiting + bounds.running:
            self._displace(lambda other: len(other.queued), len(mine.queued) + 1, lambda last: True)
        self._clients[client] = mine
        ticket = Ticket(client, deadline)
        mine.queued.append(ticket)
        self.queued += 1
        return ticket

    def wait(self, ticket: Ticket, work: int, held: int, now: float) -> None:
        """Lets a request wait for its turn, which may come at once.

        Args:
            ticket: that has arrived.
            work: multiplications of two numbers that it takes.
            held: bytes that it holds until its turn.
            now: seconds of any clock, which deadlines are on too.

        Raises:
            Refusal: it was dropped meanwhile.
            Busy: those that wait hold too much.
            TooLate: its turn would come after its deadline.
        """
        if ticket.refusal is not None:
            raise ticket.refusal
        mine = self._clients[ticket.client]
        # Who can run at once holds nothing while it waits.
        full = self.running >= self._bounds.running or mine.running >= self._bounds.running_per_client
        if full and mine.held + held > self._bounds.bytes_per_client:
            raise Busy(
                f"requests of this client that wait hold {mine.held} bytes already, the limit for each"
            )
        while full and self.held + held > self._bounds.bytes:
            self._displace(_held_in_queue, _held_in_queue(mine) + held, lambda last: last.holds > 0)
        if not mine.waiting:
            mine.clock = max(mine.clock, self._clock if mine.is_known else self._clock_of_newcomers())
            mine.is_known = True
        ticket.work, ticket.held, ticket.lined_up = work, held, now
        if full:
            ready = now + self._time_until_turn(mine) + self._pace.seconds(self._pace.cost(work))
            if ready > ticket.deadline:
                raise TooLate(f"this worker would have the answer in about {ready - now:.1f} s, too late")
        ticket.state = State.WAITING
        self._count(ticket, 1)
        self._start(now)

    def leave(self, ticket: Ticket, now: float, idle: float = 0.0, done: bool = True) -> None:
        """Ends a request. Ending it again does no harm.

        Args:
            ticket: in any state.
            now: seconds, as for `wait`.
            idle: for how long of the time since its turn it waited for its client.
            done: whether it has run to its end.
        """
        if ticket.state is State.RUNNING:
            mine = self._clients[ticket.client]
            mine.running -= 1
            self.running -= 1
            if done:
                self._pace.saw(ticket.work, now - ticket.started - idle)
        elif ticket.state is State.ASIDE:
            self._clients[ticket.client].running -= 1
            self.aside -= 1
            self._hold(ticket, -ticket.held)
        elif ticket.state is not State.GONE:
            self._take_out(ticket)
        ticket.state = State.GONE
        if self.running or self.aside or self.queued:
            self._start(now)
        else:
            self._clients.clear()
            self._clock = 0.0

    def stand_aside(self, ticket: Ticket, held: int, now: float) -> None:
        """Gives the place of a request that waits for its client to another.

        It keeps its place where those without one hold too much already, or where it does not run.

        Args:
            ticket: in any state.
            held: bytes that it holds.
            now: seconds, as for `wait`.
        """
        bounds = self._bounds
        if (
            ticket.state is State.RUNNING
            and self.held + held <= bounds.bytes
            and self._clients[ticket.client].held + held <= bounds.bytes_per_client
        ):
            ticket.state, ticket.held = State.ASIDE, held
            self._hold(ticket, held)
            self.running -= 1
            self.aside += 1
            self._start(now)

    def close(self) -> None:
        """Drops all that wait. Those that run go on, and nobody is let in any more."""
        self._open = False
        for client in self._clients.values():
            for ticket in tuple(client.queued):
                self._drop(ticket, Draining("this worker is shutting down"))

    def _ready(self) -> list[_Client]:
        """Those that wait, and may run more than they do."""
        return [
            client
            for client in self._clients.values()
            if client.waiting and client.running < self._bounds.running_per_client
        ]

    def _clock_of_newcomers(self) -> float:
        """Not behind all who wait: one new name after the other could keep them waiting for good."""
        return max(self._clock, min((client.clock for client in self._ready()), default=0.0))

    def _start(self, now: float) -> None:
        """Gives free places to those whose turn it is."""
        while self.running < self._bounds.running and (ready := self._ready()):
            mine = min(ready, key=lambda client: (client.clock, client.turn))
            ticket = mine.next()
            # Where nobody else waits, trying costs nothing, and an estimate may be wrong.
            cost = self._pace.cost(ticket.work)
            if now + (self._pace.seconds(cost) if self.waiting > 1 else 0.0) >= ticket.deadline:
                self._drop(ticket, TooLate("the request's deadline would have passed before its answer"))
                continue
            self._take_out(ticket)
            self._clock = max(self._clock, mine.clock)
            mine.clock += cost
            mine.turn = next(self._turns)
            mine.running += 1
            self.running += 1
            ticket.state, ticket.started = State.RUNNING, now
            self._news.append(ticket)

    def _time_until_turn(self, mine: _Client) -> float:
        """About how long another request of a client will wait: for what comes before it, and not longer."""
        turn = mine.clock + self._pace.cost(mine.backlog, mine.waiting)
        before = 0.0
        for client in self._clients.values():
            before += min(self._pace.cost(client.backlog, client.waiting), max(0.0, turn - client.clock))
        return self._pace.seconds(before) / self._bounds.running

    def _displace(self, size: Callable[[_Client], int], mine: int, counts: Callable[[Ticket], bool]) -> None:
        """Drops the last request that counts of the client that has most, if it has more than ``mine``."""
        longest = max(self._clients.values(), key=size)
        if size(longest) <= mine:
            raise Busy(
                f"this worker has {self.running} requests running and {self.queued} waiting, its limit"
            )
        last = next(ticket for ticket in reversed(longest.queued) if counts(ticket))
        self._drop(last, Displaced("this worker is busy, and other clients have less in its queue"))

    def _drop(self, ticket: Ticket, refusal: Refusal) -> None:
        self._take_out(ticket)
        ticket.state, ticket.refusal = State.GONE, refusal
        self._news.append(ticket)

    def _take_out(self, ticket: Ticket) -> None:
        """Out of the queue, to run or for good."""
        self._clients[ticket.client].queued.remove(ticket)
        self.queued -= 1
        if ticket.state is State.WAITING:
            self._count(ticket, -1)

    def _count(self, ticket: Ticket, sign: int) -> None:
        """One more that waits, or one less."""
        client = self._clients[ticket.client]
        client.waiting += sign
        client.backlog += sign * ticket.work
        self.waiting += sign
        self._hold(ticket, sign * ticket.held)

    def _hold(self, ticket: Ticket, held: int) -> None:
        """So many bytes more that are held without a place."""
        self._clients[ticket.client].held += held
        self.held += held

    def _forget(self) -> None:
        """Clients without requests whose clocks say no more than the queue's own."""
        for name, client in tuple(self._clients.items()):
            if not (client.queued or client.running) and client.clock <= self._clock:
                del self._clients[name]


def _held_in_queue(client: _Client) -> int:
    return sum(ticket.holds for ticket in client.queued)


class _Pace:
    """How long work takes. The unit of work is a multiplication of two numbers."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._work = 0.0

    def seconds(self, cost: float) -> float:
        """For how long requests that cost so much will probably hold their places, together."""
        return cost * self._seconds / self._work if self._work else 0.0

    def work(self, seconds: float) -> float:
        """What could have been done in that time."""
        return seconds * self._work / self._seconds if self._seconds else 0.0

    def cost(self, work: int, requests: int = 1) -> float:
        """Of requests with so much work together: that, and what each takes besides."""
        return work + self.work(requests * _SECONDS_OF_A_REQUEST)

    def saw(self, work: int, seconds: float) -> None:
        """Learns from a request that has ended."""
        seconds = max(0.0, seconds - _SECONDS_OF_A_REQUEST)
        if not work:
            return
        if _TOO_SLOW * seconds < self.seconds(work):
            # Those before were no measure: the first ones, say, for which kernels were compiled.
            self._seconds = self._work = 0.0
        self._seconds = _MEMORY * self._seconds + seconds
        self._work = _MEMORY * self._work + work
