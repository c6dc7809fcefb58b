"""Faults and requests in any order that hypothesis thinks of, shrunk to the shortest that fails."""

from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from support.lies import LIES

from blindtune.client.model.layer_group import LayerGroup
from blindtune.errors import BlindtuneError
from blindtune.protocol.products import Product
from simulation.network import Damage
from simulation.scheduler import Killed, Task
from simulation.schedules import FAULTS, OF_THE_CLIENT, Fault, Schedule
from simulation.training import GROUPS, Job
from simulation.world import Assets, World

_SECONDS = st.sampled_from([0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0])
_DAMAGE = st.builds(
    Damage, st.sampled_from(["drop", "duplicate", "truncate", "corrupt", "swap"]), st.integers(0, 5)
)


class Network(RuleBasedStateMachine):
    """A client with requests under way, while its workers come to harm."""

    assets: ClassVar[Assets]

    @initialize(
        seed=st.integers(0, 2**16),
        workers=st.lists(st.integers(1, 3), min_size=2, max_size=3),
        lattice=st.booleans(),
        max_rows=st.sampled_from([1, 3, 1024]),
        max_concurrent=st.sampled_from([1, 2, 8]),
    )
    def begin(self, seed: int, workers: list[int], lattice: bool, max_rows: int, max_concurrent: int) -> None:
        masking = "lattice" if lattice else "shares"
        operators = tuple(workers[:1] if lattice else workers)
        nothing = Job(0, 0, 0, 0)
        self.world = World(
            Schedule(seed, masking, operators, nothing, max_rows, max_concurrent, False, ()),  # type: ignore[arg-type]
            self.assets,
        )
        self.client = self.world.new_client()
        groups = [LayerGroup(names, self.assets.kit, self.client.judged) for names in GROUPS]
        self.products: list[Product] = [product for group in groups for product in group.products]
        self.asked: list[Task] = []

    @rule(which=st.integers(0, 3), rows=st.integers(1, 9), seed=st.integers(0, 9))
    def ask(self, which: int, rows: int, seed: int) -> None:
        product = self.products[which % len(self.products)]
        operand = np.random.default_rng(seed).integers(-(10**5), 10**5, (rows, product.contraction))
        client = self.client
        self.asked.append(
            self.world.scheduler.spawn(
                lambda: client.judged.multiply_integers(operand.astype(np.int32), product), client.name
            )
        )

    @rule(seconds=_SECONDS)
    def time_passes(self, seconds: float) -> None:
        self.world.scheduler.drain(seconds)

    @rule(
        kind=st.sampled_from(FAULTS),
        operator=st.integers(0, 2),
        worker=st.integers(0, 2),
        seconds=_SECONDS,
        row=st.integers(0, 9),
        lie=st.sampled_from(list(LIES)),
        damage=_DAMAGE,
    )
    def something_breaks(
        self, kind: str, operator: int, worker: int, seconds: float, row: int, lie: str, damage: Damage
    ) -> None:
        workers = self.world.workers[operator % len(self.world.workers)]
        if kind in OF_THE_CLIENT:
            self.client_trouble(kind, seconds)
            return
        at = self.world.scheduler.now
        where = operator % len(self.world.workers), worker % len(workers)
        fault = Fault(at, kind, *where, seconds, row=row, lie=lie, damage=damage)  # type: ignore[arg-type]
        self.world.strike(fault)

    def client_trouble(self, kind: str, seconds: float) -> None:
        if kind == "clock jump":
            self.client.skew += seconds
            return
        self.world.scheduler.kill(self.client.name)
        self.client = self.world.new_client()

    @rule()
    def all_is_answered(self) -> None:
        for task in self.asked:
            self.world.scheduler.run(task)
            assert task.error is None or isinstance(task.error, BlindtuneError | Killed), task.error
        self.asked.clear()

    @invariant()
    def nothing_is_broken(self) -> None:
        assert not self.world.ledger.violations

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.all_is_answered()
            for workers in self.world.workers:
                for worker in workers:
                    worker.computing.recover()
            self.world.judge_what_is_left()
            self.nothing_is_broken()
            self.world.scheduler.end()


def _run(assets: Assets, examples: int, steps: int, derandomize: bool) -> None:
    Network.assets = assets
    run_state_machine_as_test(
        Network,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=derandomize,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_any_order_of_faults_and_requests(assets: Assets) -> None:
    _run(assets, 60, 20, derandomize=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_orders_of_faults_and_requests(assets: Assets) -> None:
    _run(assets, 300, 50, derandomize=False)
