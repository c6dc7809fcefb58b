"""Runs schedules for as long as wanted, replays one, or hunts planted bugs.

    make simulate ARGS="--schedules 100000 --first 1000000"
    make simulate ARGS="--seed 1234567"
    make simulate ARGS="--planted"

The first form ends with 1 and the seed of the first schedule in which an invariant was broken.
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from support.checkpoints import save_checkpoint

from simulation import planted, planted_shapes
from simulation.schedules import Schedule
from simulation.world import Assets, World, small_messages

_console = Console(width=140)


def main(
    schedules: Annotated[int, typer.Option(help="How many schedules to run.")] = 1000,
    first: Annotated[int, typer.Option(help="The seed of the first one.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Run this schedule alone, and show it.")] = None,
    planted: Annotated[bool, typer.Option("--planted", help="Plant bugs; show what catches each.")] = False,
) -> None:
    """Run the real client and the real workers on a simulated network."""
    with tempfile.TemporaryDirectory() as folder, small_messages():
        assets = Assets(save_checkpoint("llama", Path(folder) / "model"), Path(folder) / "kit")
        if planted:
            found = _hunt(assets)
        elif seed is not None:
            schedule = Schedule.of(seed)
            outcome = World(schedule, assets).run()
            _console.print(schedule, outcome, sep="\n\n")
            found = not outcome.violations
        else:
            found = _play(assets, range(first, first + schedules))
    sys.exit(not found)


def _play(assets: Assets, seeds: range) -> bool:
    struck: Counter[str] = Counter()
    requests = repeated = failures = 0
    for seed in track(seeds, "schedules", console=Console(stderr=True)):
        schedule = Schedule.of(seed)
        outcome = World(schedule, assets).run()
        if outcome.violations:
            _console.print(f"seed {seed}: {outcome.violations}")
            return False
        struck.update(fault.kind for fault in schedule.faults)
        requests += outcome.attempts
        repeated += outcome.repeated
        failures += len(outcome.failures)
    _console.print(
        f"{len(seeds)} schedules, {requests} requests, {repeated} of them repeated; {failures} runs ended in "
        "an error and were resumed; no invariant was broken"
    )
    _console.print("faults:", ", ".join(f"{kind} {count}" for kind, count in sorted(struck.items())))
    return True


def _hunt(assets: Assets) -> bool:
    table = Table("what happens", "planted bug", "caught by", "invariant")
    missed = 0
    for plant in (*planted.PLANTS, *planted_shapes.PLANTS):
        caught = plant.hunt(assets)
        missed += caught is None
        seen = "nothing" if caught is None else f"schedule {caught[0]}"
        table.add_row(plant.fault, plant.bug, seen, plant.invariant)
    _console.print(table)
    return not missed


if __name__ == "__main__":
    typer.run(main)
