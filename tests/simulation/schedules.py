"""What happens in a schedule: who takes part, and which faults strike when. All of it follows from a seed."""

import random
from dataclasses import dataclass
from typing import Literal

from support.lies import LIES

from blindtune.server.admission.limits import Limits
from simulation.network import Damage
from simulation.training import Job

__all__ = ["FAULTS", "OF_THE_CLIENT", "Fault", "FaultKind", "Schedule"]

FaultKind = Literal[
    "slow network",
    "reordering",
    "connection refused",
    "half-open",
    "damaged request",
    "damaged answer",
    "slow reader",
    "crash",
    "restart",
    "graceful restart",
    "lie",
    "wrong row",
    "lies and hangs",
    "hang",
    "out of memory",
    "stalled stranger",
    "clock jump",
    "client killed",
]
FAULTS: tuple[FaultKind, ...] = FaultKind.__args__  # type: ignore[attr-defined]
OF_THE_CLIENT = ("clock jump", "client killed")


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        at: when, in virtual seconds.
        kind: what.
        operator, worker: where; None for what befalls the client.
        seconds: how long it lasts, or by how much a clock jumps.
        lie: what a liar says in all its answers.
        row: how many rows are multiplied rightly before one that is wrong.
        damage: what befalls a stream.
    """

    at: float
    kind: FaultKind
    operator: int | None = None
    worker: int | None = None
    seconds: float = 0.0
    lie: str | None = None
    row: int = 0
    damage: Damage | None = None


@dataclass(frozen=True)
class Schedule:
    """All that happens.

    Attributes:
        seed: what it was drawn from.
        masking: "shares" or "lattice".
        workers: how many each operator runs.
        job: what is trained.
        max_rows, max_concurrent: the workers' limits.
        protected: whether the first worker of each operator is spared, so that nothing may fail.
        faults: in order of time.
        ahead: whether the client asks for shares before their operand is known.
        acknowledges: whether workers say that they acknowledge requests.
        uneven: whether every other replica takes half as many rows.
    """

    seed: int
    masking: Literal["shares", "lattice"]
    workers: tuple[int, ...]
    job: Job
    max_rows: int
    max_concurrent: int
    protected: bool
    faults: tuple[Fault, ...]
    ahead: bool = False
    acknowledges: bool = True
    uneven: bool = False

    def limits(self, worker: int) -> Limits:
        """Of the worker with this number, of any operator."""
        rows = max(1, self.max_rows // 2) if self.uneven and worker % 2 else self.max_rows
        return Limits(
            max_rows=rows,
            max_concurrent=self.max_concurrent,
            # So few that workers say at times that they are busy.
            max_waiting=self.max_concurrent - 1,
        )

    @classmethod
    def of(cls, seed: int) -> "Schedule":
        """The schedule of a seed."""
        draw = random.Random(f"schedule {seed}")
        masking: Literal["shares", "lattice"] = "lattice" if draw.random() < 0.25 else "shares"
        operators = 1 if masking == "lattice" else draw.choice((2, 2, 2, 3))
        protected = draw.random() < 0.5
        workers = tuple(draw.randint(2 if protected else 1, 3) for _ in range(operators))
        job = Job(draw.randint(1, 2), draw.choice((1, 1, 2, 3)), draw.randint(1, 9), draw.randrange(4))
        max_concurrent = draw.choice((1, 2, 4, 8))
        # A fault is worth most while something is under way; a fault-free step takes about 0.1 s.
        span = draw.choice((0.1, 0.5, 2.0, 30.0))
        faults = [_fault(draw, span, workers, protected) for _ in range(draw.choice((0, 1, 2, 4, 8, 16)))]
        faults.sort(key=lambda fault: fault.at)
        return cls(
            seed,
            masking,
            workers,
            job,
            draw.choice((1, 2, 4, 1024)),
            max_concurrent,
            protected,
            tuple(faults),
            ahead=seed % 2 == 0,
            acknowledges=seed % 3 > 0,
            uneven=seed % 5 == 0,
        )


def _fault(draw: random.Random, span: float, workers: tuple[int, ...], protected: bool) -> Fault:
    at = draw.uniform(0, span)
    kind = draw.choice(FAULTS)
    if kind in OF_THE_CLIENT:
        return Fault(at, kind, seconds=draw.choice((1.0, 59.0, 3600.0, 1e6)))
    operator = draw.randrange(len(workers))
    worker = draw.randrange(1 if protected else 0, workers[operator])
    return Fault(
        at,
        kind,
        operator,
        worker,
        seconds=draw.choice((0.05, 0.5, 5.0, 40.0, 400.0)),
        lie=draw.choice(list(LIES)) if kind == "lie" else None,
        row=draw.randrange(40),
        damage=Damage(draw.choice(("drop", "duplicate", "truncate", "corrupt", "swap")), draw.randrange(5))
        if kind.startswith("damaged")
        else None,
    )
