"""Runs a schedule with the real client and the real workers, and judges what came of it."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.transports import manifest_of

from blindtune.checkpoint import Checkpoint
from blindtune.client.kit.hints import HintStore
from blindtune.client.kit.kit import Kit
from blindtune.client.kit.prepare import prepare
from blindtune.client.operators import messages
from blindtune.client.operators.decisions import Failure
from blindtune.client.rounds.multiplier import ReferenceMultiplier
from blindtune.common import blocks
from blindtune.errors import BlindtuneError
from blindtune.proto import worker_pb2
from blindtune.protocol.lattice.parameters import MLWE1280
from blindtune.protocol.lattice.source import LatticeSource
from blindtune.protocol.masks import MaskSource, Share
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Residues
from blindtune.protocol.shares.source import ShareSource
from blindtune.server import rows
from blindtune.server.store import LayerStore
from simulation.client import LEAST_BLOCK_ROWS, Client
from simulation.ledger import Ledger
from simulation.network import WINDOW, Link
from simulation.scheduler import Deadlock, Killed, Scheduler, Task
from simulation.schedules import Fault, Schedule
from simulation.training import Job, State, train
from simulation.workers import SimulatedWorker

__all__ = ["Assets", "Outcome", "World", "small_messages"]


@contextmanager
def small_messages() -> Iterator[None]:
    """Cuts operands and answers into many messages, although they are tiny."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "CHUNK_BYTES", 300)
        patch.setattr(rows, "CHUNK_BYTES", 300)
        patch.setattr(blocks, "MOST_BLOCK_ROWS", 3)
        patch.setattr("blindtune.client.operators.operator._LEAST_BLOCK_ROWS", LEAST_BLOCK_ROWS)
        patch.setattr("blindtune.client.operators.operator._LEAST_LIMIT_ROWS", 1)
        # Runs are so short that one in twenty requests would be none.
        patch.setattr("blindtune.client.operators.policy._HEDGES", 0.5)
        patch.setattr(logging.getLogger("blindtune"), "disabled", True)
        for name in ("blindtune.server.service", "blindtune.client.operators.asking"):
            patch.setattr(logging.getLogger(name), "disabled", True)
        yield


class Assets:
    """What all schedules share: a model, its kit, its layers, and reference runs."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        opened = Checkpoint.open(checkpoint)
        prepare(opened, folder)
        self.kit = Kit.open(folder)
        self.store = LayerStore.load(opened)
        self.honest = self.store.multiplier()
        self.reference = ReferenceMultiplier(opened, Q31)
        self.hints = HintStore(self.kit, MLWE1280, self._ask)
        self.final = cache(self._final)

    def _ask(self, product: Product, share: Share) -> Residues:
        return self.honest.multiply(product, share.residues, Q31)

    def _final(self, job: Job) -> State:
        states = [State.first()]
        train(job, self.kit, self.reference, states[0], states.append)
        return states[-1]


@dataclass(frozen=True)
class Outcome:
    """What came of a schedule.

    Attributes:
        violations: broken invariants, with what was seen.
        seconds: virtual time.
        attempts, repeated: requests, and those of them that were sent again.
        failures: errors of ours that ended a client.
        lives: how many clients it took.
        seen: how often what can happen did, besides faults.
        digest: over all that happened, to compare replays.
    """

    violations: list[tuple[str, str]]
    seconds: float
    attempts: int
    repeated: int
    failures: list[str]
    lives: int
    seen: Counter[str]
    digest: str


class World:
    """Everything that a schedule needs."""

    def __init__(self, schedule: Schedule, assets: Assets) -> None:
        self.schedule, self.assets = schedule, assets
        self.scheduler = Scheduler(schedule.seed)
        self.ledger = Ledger()
        self.workers = [
            [
                SimulatedWorker(
                    self.scheduler, operator, index, assets.store, assets.honest, schedule.limits(index)
                )
                for index in range(count)
            ]
            for operator, count in enumerate(schedule.workers)
        ]
        self.saved = State.first()
        self.failures: list[str] = []
        self.lives = 0
        self._drawn = 0
        self.client: Client | None = None
        self._clients: list[Client] = []
        self._life: Task | None = None

    def manifest(self, worker: SimulatedWorker) -> worker_pb2.Manifest:
        """What a worker says of itself."""
        manifest = manifest_of(self.assets.kit, worker.limits)
        manifest.acknowledges = self.schedule.acknowledges
        return manifest

    def random_bytes(self, count: int) -> bytes:
        """In place of the operating system's, and different each time."""
        self._drawn += 1
        return hashlib.shake_256(f"{self.schedule.seed} {self._drawn}".encode()).digest(count)

    def source(self) -> MaskSource:
        """A mask source for a new client."""
        if self.schedule.masking == "shares":
            return ShareSource(len(self.workers), Q31, self.random_bytes)
        hints = self.assets.hints
        return LatticeSource(MLWE1280, hints.public_seed, hints.get, self.random_bytes)

    def save(self, state: State) -> None:
        """Writes a checkpoint."""
        self.saved = state

    def together(self, functions: Sequence[Callable[[], Any]]) -> list[Any]:
        """Runs functions as tasks; all end before an error is raised."""
        tasks = [self.scheduler.spawn(function) for function in functions]
        for task in tasks:
            task.exception()
        return [task.result() for task in tasks]

    def run(self) -> Outcome:
        """Plays the schedule to its end."""
        for fault in self.schedule.faults:
            self.scheduler.call_later(fault.at, lambda fault=fault: self.strike(fault))
        try:
            self.scheduler.run(self.scheduler.spawn(self._supervise))
            self._judge_the_end()
        except Deadlock as error:
            self.ledger.broken("finite", str(error))
        finally:
            self.scheduler.end()
        return Outcome(
            self.ledger.violations,
            self.scheduler.now,
            self.ledger.attempts,
            self.ledger.repeated,
            self.failures,
            self.lives,
            self.seen,
            self._digest(),
        )

    @property
    def seen(self) -> Counter[str]:
        """How often what can happen did."""
        ledger = self.ledger
        found = Counter({"pieces": ledger.pieces, "ahead": ledger.masks_ahead, "lies": len(ledger.liars)})
        found["failures"] = len(self.failures)
        for client in self._clients:
            for operator in client.operators:
                figures = operator.statistics
                found["hedges"] += figures.hedges
                found["hedges won"] += figures.hedges_won
                found["set aside"] += len(figures.set_aside)
                found["silent"] += figures.failures[Failure.SILENT]
        return found

    def _digest(self) -> str:
        story = repr(
            (self.ledger.violations, self.scheduler.now, self.ledger.attempts, self.failures, self.saved)
        )
        return hashlib.sha256(story.encode()).hexdigest()

    def new_client(self) -> Client:
        """Starts the client's process."""
        self.lives += 1
        self.client = Client(self, self.lives)
        self._clients.append(self.client)
        return self.client

    def _supervise(self) -> None:
        """Starts the client, and starts it again when it was killed or gave up."""
        while True:
            client = self.new_client()
            self._life = life = self.scheduler.spawn(client.live, client.name)
            error = life.exception()
            if error is None:
                break
            if isinstance(error, Killed):
                self.scheduler.sleep(1.0)
                continue
            if not isinstance(error, BlindtuneError):
                self.ledger.broken("typed error", f"{type(error).__name__}: {error}")
                return
            self.failures.append(type(error).__name__)
            if self.schedule.protected:
                self.ledger.broken("alive", str(error))
            if self.lives > len(self.schedule.faults) + 2:
                self.ledger.broken("resumable", f"given up again after {self.lives} lives: {error}")
                return
            self._repair()

    def _repair(self) -> None:
        """What operators do when told that their workers are gone."""
        self.scheduler.sleep(500.0)  # by now, most faults that pass have passed
        for worker in self.all_workers():
            worker.link = Link()
            worker.rogue.plan(None)
            if not worker.alive:
                worker.start()

    def all_workers(self) -> list[SimulatedWorker]:
        return [worker for workers in self.workers for worker in workers]

    def strike(self, fault: Fault) -> None:
        """Lets a fault happen."""
        if fault.operator is None:
            self._strike_client(fault)
            return
        assert fault.worker is not None
        worker = self.workers[fault.operator][fault.worker]
        link, later = worker.link, self.scheduler.call_later
        match fault.kind:
            case "slow network":
                link.delay = (fault.seconds / 4, fault.seconds / 2)
            case "reordering":
                link.delay = (0.0, min(fault.seconds, 5.0))
            case "connection refused":
                link.up = False
                later(fault.seconds, lambda: setattr(link, "up", True))
            case "half-open":
                link.silent = True
                later(fault.seconds, lambda: setattr(link, "silent", False))
            case "damaged request":
                assert fault.damage
                link.damage["worker"].append(fault.damage)
            case "damaged answer":
                assert fault.damage
                link.damage["client"].append(fault.damage)
            case "slow reader":
                link.pause = {"client": fault.seconds / 50, "worker": fault.seconds / 50}
            case "crash":
                worker.kill()
            case "restart" | "graceful restart":
                drain = fault.kind == "graceful restart"
                if worker.alive:
                    self.scheduler.spawn(
                        lambda: worker.restart(min(fault.seconds, 40.0), drain), repr(worker)
                    )
            case "lie":
                worker.rogue.plan(fault.lie, times=10**9)
            case "wrong row":
                worker.computing.err_in(fault.row)
            case "lies and hangs":
                worker.computing.err_in(fault.row, fault.seconds)
            case "hang":
                worker.computing.hang(fault.seconds)
            case "out of memory":
                worker.computing.memory_errors += 3
            case "stalled stranger":
                if worker.alive:
                    self._stranger(worker)
        if fault.kind in ("slow network", "reordering"):
            later(fault.seconds, lambda: setattr(link, "delay", (0.001, 0.002)))
        if fault.kind == "slow reader":
            later(fault.seconds, lambda: setattr(link, "pause", {"client": 0.0, "worker": 0.0}))

    def _strike_client(self, fault: Fault) -> None:
        if self.client is None or self._life is None or self._life.done:
            return
        if fault.kind == "clock jump":
            self.client.skew += fault.seconds
            return
        self.scheduler.kill(self.client.name)  # the threads of its pools included

    def _stranger(self, worker: SimulatedWorker) -> None:
        """Another client that opens a request and says no more."""
        worker.open_call("a stranger")

    def _judge_the_end(self) -> None:
        done = self.saved.step == self.schedule.job.steps
        exact = self.schedule.masking == "shares"
        final = self.assets.final(self.schedule.job)
        if not done or (exact and self.saved != final):
            self.ledger.broken("resumable", f"the run ended at step {self.saved.step} with another adapter")
        self.judge_what_is_left()

    def judge_what_is_left(self) -> None:
        """Once nothing is asked for any more, nothing is under way or kept."""
        assert self.client
        for buffers in self.client.buffers:
            buffers.judge()
        for operator in self.client.operators:
            for index, state in enumerate(operator._policy._workers):
                if state.excluded and index == 0 and self.schedule.protected:
                    self.ledger.broken("honest workers", f"a spared worker is out: {state.excluded}")
                if state.in_flight:
                    self.ledger.broken(
                        "bounded memory", f"{state.in_flight} requests are left over at {index}"
                    )
        self.scheduler.drain(1000.0)
        largest = 4 * 64 * 4 + 300  # a row of the widest operand or answer, or a header
        for worker in self.all_workers():
            left = worker.places.inside + worker.places.waiting
            if left:
                self.ledger.broken("bounded memory", f"{worker} still holds {left} places")
            if worker.most_queued > WINDOW + largest:
                self.ledger.broken("bounded memory", f"{worker.most_queued} bytes were under way at once")
