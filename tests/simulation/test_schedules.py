"""Thousands of schedules, each of which replays from its seed (`make simulate ARGS="--seed N"`)."""

from collections import Counter
from dataclasses import replace
from itertools import count
from typing import Literal

import pytest

from simulation import planted, planted_shapes
from simulation.chosen import SHAPES, SPLIT, Shape, wrong_row
from simulation.planting import Plant
from simulation.schedules import FAULTS, Fault, Schedule
from simulation.training import Job
from simulation.world import Assets, World

EVERYDAY, MANY = 60, 2_100


def _play(assets: Assets, seeds: range) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in seeds:
        schedule = Schedule.of(seed)
        outcome = World(schedule, assets).run()
        assert not outcome.violations, f"seed {seed}: {outcome.violations}"
        seen["repeated"] += outcome.repeated
        seen["failures"] += len(outcome.failures)
        seen.update(fault.kind for fault in schedule.faults)
    return seen


def test_schedules(assets: Assets) -> None:
    seen = _play(assets, range(EVERYDAY))
    # The faults struck: a simulation in which nothing happens shows nothing.
    assert seen["repeated"] and seen["failures"] and all(seen[kind] for kind in FAULTS)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_what_real_runs_do(shape: Shape, assets: Assets) -> None:
    seen: Counter[str] = Counter()
    for schedule in shape.schedules:
        outcome = World(schedule, assets).run()
        assert not outcome.violations, f"{schedule}: {outcome.violations}"
        seen += outcome.seen
    assert not [x for x in shape.shows if not seen[x]], seen


@pytest.mark.parametrize("operator", [0, 1], ids=["who gets seeds", "who gets residues"])
def test_one_wrong_number_in_any_row_of_any_block_is_caught(operator: int, assets: Assets) -> None:
    rows: set[int] = set()
    for row in count():
        world = World(wrong_row(SPLIT, operator, row), assets)
        outcome = world.run()
        assert not outcome.violations, f"row {row}: {outcome.violations}"
        assert outcome.seen["pieces"]
        worker = world.workers[operator][1]
        if not worker.computing.erred:
            break  # so many rows it never multiplied
        assert outcome.seen["lies"] == 1
        assert world.client
        assert world.client.operators[operator]._policy.is_excluded(1)
        rows.add(row)
    # About half of the rows of four products.
    assert len(rows) >= 12


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_schedules(assets: Assets) -> None:
    _play(assets, range(EVERYDAY, MANY))


def test_a_schedule_replays_from_its_seed(assets: Assets) -> None:
    busiest = max(range(50), key=lambda seed: len(Schedule.of(seed).faults))
    first, second = (World(Schedule.of(busiest), assets).run() for _ in range(2))
    assert first.attempts and first == second


def test_a_rolling_restart_with_a_single_worker_each_loses_no_step(assets: Assets) -> None:
    faults = tuple(
        Fault(0.02 + 10 * turn, "graceful restart", operator, 0, seconds=5.0)
        for turn, operator in enumerate((0, 1, 0, 1))
    )
    schedule = Schedule(1, "shares", (1, 1), Job(3, 2, 5, 0), 2, 8, True, faults)
    outcome = World(schedule, assets).run()
    assert not outcome.violations
    assert outcome.lives == 1 and outcome.repeated


@pytest.mark.parametrize("masking", ["shares", "lattice"])
def test_four_micro_batches_in_flight_share_no_mask_and_give_the_same_adapter(
    masking: Literal["shares", "lattice"], assets: Assets
) -> None:
    seen: Counter[str] = Counter()
    for seed in range(12):
        drawn = Schedule.of(seed)
        workers = (2,) if masking == "lattice" else (2, 2)
        fitting = tuple(x for x in drawn.faults if (x.operator or 0) < len(workers) and (x.worker or 0) < 2)
        faults = fitting if seed % 4 else ()
        job = Job(2, 4, 1 + seed % 5, seed % 4)
        schedule = replace(
            drawn, masking=masking, workers=workers, job=job, max_concurrent=8, protected=False, faults=faults
        )
        outcome = World(schedule, assets).run()
        assert not outcome.violations, f"seed {seed}: {outcome.violations}"
        seen["repeated"] += outcome.repeated
        seen["quiet"] += not faults
    assert seen["repeated"] and seen["quiet"]


@pytest.mark.parametrize(
    "plant", [*planted.PLANTS, *planted_shapes.PLANTS], ids=lambda plant: f"{plant.fault}: {plant.bug}"
)
def test_a_planted_bug_is_caught(plant: Plant, assets: Assets) -> None:
    assert plant.hunt(assets), "no schedule showed it"
    assert not World(plant.schedule(0), assets).run().violations, "it is the schedule, not the bug"
