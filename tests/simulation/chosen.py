"""Schedules that were chosen so that what real runs do is there every time, and not when a seed does it.

Each shape runs without a fault, and with each that matters to it at many moments.
"""

from dataclasses import dataclass, replace

from support.lies import LIES

from simulation.schedules import Fault, FaultKind, Schedule
from simulation.training import Job

__all__ = ["SHAPES", "SPLIT", "Shape", "shape", "wrong_row"]

# Several blocks for each of two workers, which both have a lane, and the workers' own blocks in them.
SPLIT = Schedule(0, "shares", (2, 2), Job(1, 1, 9, 0), 1024, 8, True, ())


@dataclass(frozen=True)
class Shape:
    """Schedules of a kind.

    Attributes:
        name: what they are about.
        schedules: them.
        shows: what has to happen in some of them (`World.seen`), or they would show nothing.
    """

    name: str
    schedules: tuple[Schedule, ...]
    shows: tuple[str, ...]


def wrong_row(schedule: Schedule, operator: int, row: int) -> Schedule:
    """The same with a single wrong number, in one row of all that the operator's second worker multiplies."""
    return replace(schedule, faults=(Fault(0.0, "wrong row", operator, 1, row=row),))


def _faults(
    schedule: Schedule, *kinds: FaultKind, moments: int, first: float = 0.004
) -> tuple[Schedule, ...]:
    """The same, with each fault at the second worker of an operator at each of some moments."""
    found = []
    for number, kind in enumerate(kinds):
        for moment in range(moments):
            operator = (number + moment) % len(schedule.workers)
            fault = Fault(first + 0.008 * moment, kind, operator, 1, 0.05)
            if kind == "lie":
                fault = replace(fault, lie=list(LIES)[moment % len(LIES)])
            found.append(replace(schedule, seed=moment, faults=(fault,)))
    return tuple(found)


def _failing_again(schedule: Schedule, seeds: int) -> tuple[Schedule, ...]:
    """The same with a wrong row, after which other requests at that worker fail in another way, and a replica
    that is slow for so long that the worker would be asked again, if it were forgotten that it lied."""
    return tuple(
        replace(
            schedule,
            seed=seed,
            faults=(
                Fault(0.0, "lies and hangs", operator, 1, 1.0, row=seed),
                Fault(0.0025, "slow network", operator, 0, 1.0),
                Fault(0.05, "restart", operator, 1, 0.02),
            ),
        )
        for operator in (0, 1)
        for seed in range(seeds)
    )


_BLOCKS = replace(SPLIT, max_rows=4, uneven=True)
# Products come in the same order in every step: from the third on, masks are drawn and asked for ahead.
_AHEAD = replace(SPLIT, job=Job(4, 1, 6, 0), ahead=True)
_IN_FLIGHT = replace(SPLIT, job=Job(2, 4, 5, 1))
# The lane of the faster worker is done while the other one is at its last block.
_GONE = replace(SPLIT, job=Job(1, 1, 5, 0), protected=False)
# Two of three have a lane each, so that the third is free when one of them hangs.
_HANGING = replace(SPLIT, job=Job(4, 1, 4, 2), workers=(3, 3), protected=False)

SHAPES = (
    Shape(
        "an operand larger than a block",
        (_BLOCKS, *_faults(_BLOCKS, "lie", "crash", moments=4)),
        ("pieces", "lies"),
    ),
    Shape(
        "answers asked for ahead",
        (_AHEAD, *_faults(_AHEAD, "lie", "restart", moments=4, first=0.06)),
        ("ahead", "lies"),
    ),
    Shape(
        "all replicas of an operator gone at once",
        tuple(
            replace(
                _GONE,
                seed=moment,
                faults=(
                    Fault(0.0, "slow network", moment % 2, 1, 0.4),
                    *(Fault(0.02 + 0.01 * moment, "crash", moment % 2, x) for x in (0, 1)),
                ),
            )
            for moment in range(8)
        ),
        ("failures",),
    ),
    Shape("micro-batches in flight", _failing_again(_IN_FLIGHT, seeds=3), ("lies",)),
    Shape(
        "a worker that hangs while replicas are free",
        tuple(
            replace(
                _HANGING,
                seed=place,
                acknowledges=place % 2 > 0,
                faults=(
                    Fault(0.03, "hang", place % 2, 0, 400.0),
                    # Whoever is asked early may lie as well, in any row.
                    *(Fault(0.03, "wrong row", place % 2, 1, row=place - 2) for _ in range(place > 1)),
                ),
            )
            for place in range(10)
        ),
        ("hedges", "hedges won", "lies"),
    ),
    Shape(
        "a worker that is silent again and again",
        tuple(
            replace(
                _HANGING,
                workers=(2, 2),
                job=Job(6, 1, 6, 3),
                acknowledges=False,
                faults=(Fault(0.03, kind, 0, 1, 400.0),),
            )
            for kind in ("hang", "half-open")
        ),
        ("set aside",),
    ),
)  # fmt: skip


def shape(name: str) -> tuple[Schedule, ...]:
    """The schedules of a shape."""
    (found,) = [x.schedules for x in SHAPES if x.name == name]
    return found
