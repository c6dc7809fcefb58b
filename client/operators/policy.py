"""Which worker of an operator to ask next: a pure state machine without clock, network or threads.

Every replica holds the same model and every request can be repeated, so a failed request goes to
another worker of the same operator, with the same bytes.

    choose(now)              -> Ask(worker) | Wait(seconds) | GiveUp(reason)
    succeeded(worker)           the worker is healthy again
    abandoned(worker)           this side was interrupted
    failed(worker, failure, now)
        UNREACHABLE             tried again after a pause that doubles, up to a limit
        BUSY                    the same; it is alive, so a few more times though patience has ended
        INCOMPATIBLE            not asked again in this run
        LIED                    not asked again in this run

So a request ends, whatever the workers do: after its patience, the attempt under way then, one more at each
worker that it has not tried, and at most ``_LATE_TRIES`` short ones at those that are busy, with the pauses
before them. An attempt takes at most the time that one request may take.

A machine that sleeps, or a virtual one that is paused, sees its clock jump. Time that nobody spent trying
does not count against a request.
"""

import enum
from dataclasses import dataclass, field

__all__ = ["Ask", "Decision", "Failure", "GiveUp", "Request", "Wait", "WorkerPolicy"]

# Later than this is no matter of scheduling.
_JUMP_SECONDS = 5.0
_LATE_TRIES = 8


class Failure(enum.Enum):
    """How a request to a worker can fail."""

    UNREACHABLE = "could not be reached"
    BUSY = "has no capacity"
    INCOMPATIBLE = "serves something else"
    LIED = "gave a wrong answer"


@dataclass(frozen=True)
class Ask:
    """Send the request to this worker."""

    worker: int


@dataclass(frozen=True)
class Wait:
    """Every worker that is left is pausing: choose again after this many seconds."""

    seconds: float


@dataclass(frozen=True)
class GiveUp:
    """No worker of the operator can answer.

    Attributes:
        reason: why.
        lied: whether none is left, and some are out because they gave wrong answers.
    """

    reason: str
    lied: bool = False


Decision = Ask | Wait | GiveUp


@dataclass
class _Worker:
    excluded: str | None = None
    lied: bool = False
    failures: int = 0
    last_failure: str = ""
    not_before: float = 0.0
    in_flight: int = 0


@dataclass
class Request:
    """One request on its way through an operator's workers.

    Attributes:
        deadline: when patience ends.
        expected: when the next decision is asked for, at the latest, unless the clock jumps.
        failed: attempts that failed, by worker.
        turned_down: how often a worker said at once that it was busy, since it last failed otherwise.
    """

    deadline: float
    expected: float
    failed: dict[int, int] = field(default_factory=dict)
    turned_down: dict[int, int] = field(default_factory=dict)

    def is_worth_a_late_try(self, worker: int) -> bool:
        """Whether a worker is asked though patience has ended: attempts elsewhere may have used it up."""
        return worker not in self.failed or 0 < self.turned_down.get(worker, 0) < _LATE_TRIES


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

    def ready(self, now: float) -> int:
        """How many workers could be asked at this moment."""
        return sum(worker.excluded is None and worker.not_before <= now for worker in self._workers)

    def request(self, now: float) -> Request:
        """Starts a request."""
        return Request(deadline=now + self._patience, expected=now)

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
        in_time = now < request.deadline
        # A replica that this request has not failed at comes first, then the one that is least busy.
        ready = [i for i in (left if in_time else late) if self._workers[i].not_before <= now]
        ready.sort(key=lambda i: (request.failed.get(i, 0), self._workers[i].in_flight, i))
        if ready:
            self._workers[ready[0]].in_flight += 1
            return Ask(ready[0])
        wakes = [self._workers[i].not_before for i in late]
        if in_time:
            wakes += [x for i in left if (x := self._workers[i].not_before) <= request.deadline]
        if not wakes:
            return GiveUp(f"no worker answered within {self._patience:g} s")
        return Wait(max(min(wakes) - now, 0.001))

    def succeeded(self, worker: int) -> None:
        """A worker answered, and its answer was right."""
        state = self._workers[worker]
        state.in_flight -= 1
        state.failures = 0
        state.not_before = 0.0

    def failed(self, request: Request, worker: int, failure: Failure, detail: str, now: float) -> None:
        """A request to a worker failed."""
        state = self._workers[worker]
        state.in_flight -= 1
        state.last_failure = f"{failure.value}: {detail}"
        request.failed[worker] = request.failed.get(worker, 0) + 1
        # A worker that is busy says so at once; one that takes its time over it is as good as gone.
        asked = request.expected - self._longest_attempt
        busy = failure is Failure.BUSY and now - asked < _JUMP_SECONDS
        request.turned_down[worker] = request.turned_down.get(worker, 0) + 1 if busy else 0
        if failure in (Failure.LIED, Failure.INCOMPATIBLE):
            state.excluded = state.last_failure
            state.lied |= failure is Failure.LIED
        else:
            pause = min(self._first_pause * 2**state.failures, self._longest_pause)
            state.failures = min(state.failures + 1, 30)
            state.not_before = now + pause

    def abandoned(self, worker: int) -> None:
        """A request to a worker was interrupted on this side."""
        self._workers[worker].in_flight -= 1

    def describe(self, worker: int) -> str:
        """What is known of a worker's last failure."""
        return self._workers[worker].last_failure or "not asked yet"

    def is_excluded(self, worker: int) -> bool:
        """Whether a worker is out for the rest of the run."""
        return self._workers[worker].excluded is not None
