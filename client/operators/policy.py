"""Which worker of an operator to ask next, and how long to wait for it: a pure state machine without clock,
network or threads.

Every replica holds the same model and every request can be repeated, so a failed request goes to
another worker of the same operator, with the same bytes.

    choose(request, now)           -> Ask(attempt) | Wait(seconds) | GiveUp(reason)
    look(request, attempt, now)    -> Keep(seconds, hedge) | Stop(reason), while it is under way
    heard(attempt, rows, now)         a sign of life: the worker acknowledged it, or rows came
    succeeded(attempt, now)           the worker is healthy again
    abandoned(attempt)                this side was interrupted
    overtaken(attempt, now)           another attempt was answered first
    failed(request, attempt, failure, detail, now)
        UNREACHABLE                tried again after a pause that doubles, up to a limit
        BUSY                       the same; it is alive, so a few more times though patience has ended
        SILENT                     the same; set aside after some in a row, if the operator has another worker
        INCOMPATIBLE               not asked again in this run
        LIED                       not asked again in this run

**How long to wait.** Ten times what such requests usually take (`blindtune.client.operators.habits`), and no
less than a floor; but no worker is given much more time than its fastest replica takes. A worker that
acknowledges requests has to do so within seconds; one that waits in its queue is not silent, and is given
half a minute at least. Nothing is given up that nothing could follow: the last attempt of a request, and that
of a worker without a replica of which nothing is known, may take as long as any attempt.

**Hedges.** An attempt that takes four times as long as usual is repeated at a replica that has nothing else
to do, while it goes on: whichever is answered first counts. At most one in twenty requests is repeated so.

**Set aside.** A worker that is silent three times in a row is asked no more for a minute, then for two, and
so on up to an hour: unless all others failed at the request, or are out. What is silent at the same time
counts once.

So a request ends, whatever the workers do: after its patience, the attempt under way then with its hedge, one
more at each worker that it has not tried, and at most ``LATE_TRIES`` short ones at those that are busy, with
the pauses before them. An attempt takes at most the time that one request may take.

A machine that sleeps, or a virtual one that is paused, sees its clock jump. Time that nobody spent trying
does not count against a request, nor against a worker.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from blindtune.client.operators.decisions import (
    Ask,
    Attempt,
    Decision,
    Failure,
    GiveUp,
    Keep,
    Request,
    Stop,
    Wait,
)
from blindtune.client.operators.habits import Habits

__all__ = [
    "Ask",
    "Attempt",
    "Decision",
    "Failure",
    "GiveUp",
    "Keep",
    "Request",
    "Stop",
    "Wait",
    "WorkerPolicy",
]

# Later than this is no matter of scheduling.
_JUMP_SECONDS = 5.0
# Of all that an attempt takes, as multiples of a silence: a worker may not live on by a row now and then.
_SILENCES = 4

_LEAST_BEFORE_HEDGE = 1.0
_HEDGE_FACTOR = 4
_HEDGES = 0.05
_POLL_SECONDS = 0.25

_SILENCES_IN_A_ROW = 3
_FIRST_ASIDE, _LONGEST_ASIDE = 60.0, 3600.0


@dataclass
class _Worker:
    excluded: str | None = None
    lied: bool = False
    failures: int = 0
    last_failure: str = ""
    not_before: float = 0.0
    in_flight: int = 0
    silences: int = 0
    last_silence: float = float("-inf")
    aside_until: float = float("-inf")
    times_aside: int = 0
    habits: Habits = field(default_factory=Habits)


class WorkerPolicy:
    """The state of an operator's workers, shared by all requests to it.

    Args:
        workers: how many.
        patience: seconds that a request is tried before giving up.
        longest_attempt: seconds after which an attempt has failed.
        first_pause, longest_pause: seconds before a failing worker is asked again.
    """

    def __init__(
        self,
        workers: int,
        patience: float,
        longest_attempt: float,
        first_pause: float = 0.2,
        longest_pause: float = 5.0,
    ) -> None:
        self._workers = [_Worker() for _ in range(workers)]
        self._patience = patience
        self._longest_attempt = longest_attempt
        self._first_pause = first_pause
        self._longest_pause = longest_pause
        self._asked = 0
        self._hedged = 0

    def acknowledges(self, worker: int, does: bool) -> None:
        """Whether a worker gives a sign of life as soon as a request has a place."""
        self._workers[worker].habits.acknowledges = does

    def ready(self, now: float) -> list[int]:
        """Workers that could be asked at this moment."""
        return [i for i in self._left(now) if self._workers[i].not_before <= now]

    def _left(self, now: float) -> list[int]:
        """Workers that are neither out nor set aside; those that are set aside if there are no others."""
        left = [i for i, worker in enumerate(self._workers) if worker.excluded is None]
        return [i for i in left if self._workers[i].aside_until <= now] or left

    def request(
        self, now: float, rows: int = 1, row_bytes: int = 1, most: Sequence[int] | None = None
    ) -> Request:
        """Starts a request.

        Args:
            rows: of its operand.
            row_bytes: that travel for each, both ways.
            most: rows that each worker takes; all of them, unless given.
        """
        return Request(
            now + self._patience, now, rows, row_bytes, [rows] * len(self._workers) if most is None else most
        )

    def choose(self, request: Request, now: float) -> Decision:
        """What to do next for a request."""
        jump = now - request.expected
        if jump > _JUMP_SECONDS:
            request.deadline += jump
        decision = self._decide(request, now)
        if isinstance(decision, Ask):
            request.expected = now + self._longest_attempt
        elif isinstance(decision, Wait):
            request.expected = now + decision.seconds
        return decision

    def _decide(self, request: Request, now: float) -> Decision:
        left = [i for i, worker in enumerate(self._workers) if worker.excluded is None]
        if not left:
            return GiveUp("no worker is left", any(worker.lied for worker in self._workers))
        late = [i for i in left if request.is_worth_a_late_try(i)]
        usable = self._left(now)
        if all(request.has_failed_at(i) for i in usable):
            usable = left
        in_time = now < request.deadline
        ready = [i for i in (usable if in_time else late) if self._workers[i].not_before <= now]
        if ready:
            worker = min(ready, key=lambda i: self._preference(request, i, now))
            request.rows = min(request.rows, request.most[worker])
            self._asked += 1
            return Ask(self._attempt(request, worker, now))
        wakes = [self._workers[i].not_before for i in late]
        if in_time:
            wakes = [max(x, request.deadline) for x in wakes]
            wakes += [x for i in usable if (x := self._workers[i].not_before) <= request.deadline]
        if not wakes:
            return GiveUp(f"no worker answered within {self._patience:g} s")
        return Wait(max(min(wakes) - now, 0.001))

    def _preference(self, request: Request, worker: int, now: float) -> tuple[float, ...]:
        """Less is better: a replica that this request has not failed at, then the one that is least busy."""
        state = self._workers[worker]
        return (
            request.failed.get(worker, 0),
            state.aside_until > now,
            # One request at a time finds out whether a worker that was silent answers again.
            state.silences > 0 and state.in_flight > 0,
            state.in_flight,
            request.rows > request.most[worker],
            worker,
        )

    def _attempt(self, request: Request, worker: int, now: float, is_hedge: bool = False) -> Attempt:
        self._workers[worker].in_flight += 1
        size = request.rows * request.row_bytes
        return Attempt(worker, request.rows, size, now, now + _LEAST_BEFORE_HEDGE, now, is_hedge)

    def look(self, request: Request, attempt: Attempt, now: float) -> Keep | Stop:
        """What to do about an attempt under way, at the moment that was agreed upon."""
        jump = now - attempt.look
        if jump > _JUMP_SECONDS:
            attempt.started += jump
            attempt.heard += jump
        silence = self._silence(attempt, now)
        ends = min(attempt.heard + silence, attempt.started + _SILENCES * silence)
        if now >= ends and (attempt.is_hedge or self._has_another(request, attempt.worker, now)):
            return Stop(f"nothing came for {now - attempt.heard:.1f} s")
        wakes = [ends if now < ends else now + _LEAST_BEFORE_HEDGE]
        hedge = None
        if not (attempt.is_hedge or attempt.was_hedged) and len(self._workers) > 1:
            usual = self._workers[attempt.worker].habits.usual(attempt, self._others(attempt.worker))
            due = attempt.started + max(_LEAST_BEFORE_HEDGE, _HEDGE_FACTOR * usual)
            if now < due:
                wakes.append(due)
            elif (replica := self._free(request, attempt.worker, now)) is None:
                wakes.append(now + _POLL_SECONDS)
            else:
                self._hedged += 1
                attempt.was_hedged = True
                hedge = self._attempt(request, replica, now, is_hedge=True)
        attempt.look = max(min(wakes), now + 0.01)
        return Keep(attempt.look - now, hedge)

    def _has_another(self, request: Request, worker: int, now: float) -> bool:
        """Whether a request may be tried again when the attempt at a worker ends now."""
        others = (i for i, x in enumerate(self._workers) if i != worker and x.excluded is None)
        return now < request.deadline or any(request.is_worth_a_late_try(i) for i in others)

    def _free(self, request: Request, worker: int, now: float) -> int | None:
        """A replica that may repeat what is under way at a worker: one that has nothing to do."""
        if self._hedged + 1 > _HEDGES * self._asked:
            return None
        for i, state in enumerate(self._workers):
            is_well = state.excluded is None and state.not_before <= now and not state.silences
            is_idle = is_well and state.aside_until <= now and not state.in_flight
            if i != worker and is_idle and i not in request.failed and request.rows <= request.most[i]:
                return i
        return None

    def _others(self, worker: int) -> list[Habits]:
        return [x.habits for i, x in enumerate(self._workers) if i != worker and x.excluded is None]

    def _silence(self, attempt: Attempt, now: float) -> float:
        """Seconds after which an attempt without a sign of life is given up."""
        state = self._workers[attempt.worker]
        if any(i != attempt.worker for i in self._left(now)):
            seconds = state.habits.silence(attempt, self._others(attempt.worker))
        else:
            # Nobody else would be faster: what is asked for again and again is given more and more time.
            seconds = state.habits.silence_alone(attempt) * 2**state.silences
        return min(seconds, self._longest_attempt)

    def heard(self, attempt: Attempt, rows: int, now: float) -> None:
        """A worker gave a sign of life; so many rows of its answer are there."""
        if attempt.acknowledged is None:
            attempt.acknowledged = now
        attempt.has_rows = rows > 0
        attempt.heard = now

    def succeeded(self, attempt: Attempt, now: float) -> None:
        """A worker answered, and its answer was right."""
        state = self._workers[attempt.worker]
        state.in_flight -= 1
        state.failures = 0
        state.not_before = 0.0
        state.silences = 0
        state.aside_until = float("-inf")
        # Unless the clock jumped meanwhile.
        if now <= attempt.look + _JUMP_SECONDS:
            state.habits.note(attempt, now)

    def failed(
        self, request: Request, attempt: Attempt, failure: Failure, detail: str, now: float
    ) -> float | None:
        """A request to a worker failed.

        Returns:
            For how many seconds that sets the worker aside, if it does.
        """
        worker = attempt.worker
        state = self._workers[worker]
        state.in_flight -= 1
        state.last_failure = f"{failure.value}: {detail}"
        request.failed[worker] = request.failed.get(worker, 0) + 1
        # A worker that is busy says so at once; one that takes its time over it is as good as gone.
        busy = failure is Failure.BUSY and now - attempt.started < _JUMP_SECONDS
        request.turned_down[worker] = request.turned_down.get(worker, 0) + 1 if busy else 0
        if failure in (Failure.LIED, Failure.INCOMPATIBLE):
            state.excluded = state.last_failure
            state.lied |= failure is Failure.LIED
            return None
        pause = min(self._first_pause * 2**state.failures, self._longest_pause)
        state.failures = min(state.failures + 1, 30)
        state.not_before = now + pause
        return self._was_silent(attempt, now) if failure is Failure.SILENT else None

    def overtaken(self, attempt: Attempt, now: float) -> float | None:
        """An attempt was ended since another one was answered first.

        Returns:
            As `failed` does: it counts as silent if its worker gave no sign of life.
        """
        self._workers[attempt.worker].in_flight -= 1
        return None if attempt.acknowledged is not None else self._was_silent(attempt, now)

    def _was_silent(self, attempt: Attempt, now: float) -> float | None:
        state = self._workers[attempt.worker]
        if attempt.started < state.last_silence:
            return None
        state.silences += 1
        state.last_silence = now
        has_replica = any(i != attempt.worker for i in self._left(now))
        if state.silences < _SILENCES_IN_A_ROW or not has_replica:
            return None
        seconds = min(_FIRST_ASIDE * 2**state.times_aside, _LONGEST_ASIDE)
        state.times_aside = min(state.times_aside + 1, 30)
        state.aside_until = now + seconds
        return seconds

    def abandoned(self, attempt: Attempt) -> None:
        """A request to a worker was interrupted on this side."""
        self._workers[attempt.worker].in_flight -= 1

    def describe(self, worker: int) -> str:
        """What is known of a worker's last failure."""
        return self._workers[worker].last_failure or "not asked yet"

    def is_excluded(self, worker: int) -> bool:
        """Whether a worker is out for the rest of the run."""
        return self._workers[worker].excluded is not None

    def is_set_aside(self, worker: int, now: float) -> bool:
        """Whether a worker is asked at this moment only where all others fail."""
        return self._workers[worker].aside_until > now
