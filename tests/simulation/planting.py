"""A bug that is planted in the client or the worker, to see which invariant catches it.

Each has to be caught by the schedules themselves, so a plant that goes unnoticed means that the simulator
does not look where it should.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from simulation.schedules import Schedule
from simulation.world import Assets, Outcome, World

__all__ = ["Plant"]

Patch = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Plant:
    """A planted bug.

    Attributes:
        fault: what the network or a worker does, that the bug mishandles.
        bug: what was planted.
        invariant: what is expected to catch it.
        patch: plants it.
        schedule: makes the fault happen; from a number, since not every moment hits.
    """

    fault: str
    bug: str
    invariant: str
    patch: Patch
    schedule: Callable[[int], Schedule]

    def hunt(self, assets: Assets, most: int = 200) -> tuple[int, Outcome] | None:
        """The first schedule in which an invariant catches it; None if none does."""
        for number in range(most):
            with pytest.MonkeyPatch.context() as monkeypatch:
                self.patch(monkeypatch)
                outcome = World(self.schedule(number), assets).run()
            if any(invariant == self.invariant for invariant, _ in outcome.violations):
                return number, outcome
        return None
