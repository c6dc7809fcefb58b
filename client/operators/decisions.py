"""What is asked of the policy, and what it decides. See `blindtune.client.operators.policy`."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Ask", "Attempt", "Decision", "Failure", "GiveUp", "Keep", "Request", "Stop", "Wait"]

# A worker that is busy is asked so often once patience has ended.
LATE_TRIES = 8


class Failure(enum.Enum):
    """How a request to a worker can fail."""

    UNREACHABLE = "could not be reached"
    BUSY = "has no capacity"
    SILENT = "took a request and did not answer"
    INCOMPATIBLE = "serves something else"
    LIED = "gave a wrong answer"


@dataclass(eq=False)
class Attempt:
    """A request that is under way at a worker.

    Attributes:
        worker: which.
        rows: of the request, those that it is asked for.
        size: bytes that travel, both ways.
        started: when it was sent.
        look: when it is to be looked at.
        heard: when the worker last gave a sign of life, or when it was sent.
        is_hedge: whether it repeats one that is under way.
        acknowledged: when the worker first gave a sign of life.
        has_rows: whether a part of the answer is there.
        was_hedged: whether it was repeated.
    """

    worker: int
    rows: int
    size: int
    started: float
    look: float
    heard: float
    is_hedge: bool = False
    acknowledged: float | None = None
    has_rows: bool = False
    was_hedged: bool = False


@dataclass(frozen=True)
class Ask:
    """Send the request to a worker, and look at it after a while."""

    attempt: Attempt

    @property
    def worker(self) -> int:
        return self.attempt.worker


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


@dataclass(frozen=True)
class Keep:
    """Go on waiting for an attempt, and look at it again.

    Attributes:
        seconds: until then.
        hedge: another one that is to be sent meanwhile, if any, with the same bytes.
    """

    seconds: float
    hedge: Attempt | None = None


@dataclass(frozen=True)
class Stop:
    """End an attempt, which has failed as SILENT."""

    reason: str


@dataclass
class Request:
    """One request on its way through an operator's workers.

    Attributes:
        deadline: when patience ends.
        expected: when the next decision is asked for, at the latest, unless the clock jumps.
        rows: of its operand, fewer once a worker was chosen that takes fewer.
        row_bytes: that travel for each, both ways.
        most: rows that each worker takes.
        failed: attempts that failed, by worker.
        turned_down: how often a worker said at once that it was busy, since it last failed otherwise.
    """

    deadline: float
    expected: float
    rows: int
    row_bytes: int
    most: Sequence[int]
    failed: dict[int, int] = field(default_factory=dict)
    turned_down: dict[int, int] = field(default_factory=dict)

    def is_worth_a_late_try(self, worker: int) -> bool:
        """Whether a worker is asked though patience has ended: attempts elsewhere may have used it up."""
        return worker not in self.failed or 0 < self.turned_down.get(worker, 0) < LATE_TRIES

    def has_failed_at(self, worker: int) -> bool:
        """Whether the last attempt at a worker failed, and not since it was busy."""
        return worker in self.failed and not self.turned_down.get(worker, 0)
