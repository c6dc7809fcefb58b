"""An operator's workers: the real service behind a simulated server that can crash, hang and lie."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import grpc
from support.lies import Rogue

from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import Q31, ParameterSet
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Residues
from blindtune.server.admission.limits import Limits
from blindtune.server.admission.places import Places, bounds_of
from blindtune.server.admission.rate import RateLimit
from blindtune.server.admission.turns import TurnsOfConnections
from blindtune.server.admission.watchdog import Watchdog
from blindtune.server.service import WorkerService
from blindtune.server.store import LayerStore
from simulation.network import Broken, DeadlineExceeded, Link, Stream
from simulation.scheduler import Scheduler, Signal, Task

__all__ = ["Call", "SimulatedWorker"]

FOREVER = float("inf")


class _Aborted(Exception):
    """The service refused a call."""


class Call:
    """One request on its way, as the worker's side sees it: what gRPC calls a servicer context."""

    def __init__(self, scheduler: Scheduler, link: Link, client: str) -> None:
        self.uplink = Stream(scheduler, link, "worker")
        self.downlink = Stream(scheduler, link, "client")
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self.task: Task | None = None
        self.client = client
        self._active = True
        self._acknowledged = False
        self._callbacks: list[Callable[[], object]] = []

    def requests(self) -> Iterator[bytes]:
        """What the client sends."""
        return self.uplink.messages(FOREVER)

    def cancel(self) -> None:
        """Ends the call for both sides; the client is told unless it is the one who left."""
        self.close(grpc.StatusCode.CANCELLED, "")

    def close(self, code: grpc.StatusCode, details: str) -> None:
        """Ends the call at once."""
        if self._active:
            self._active = False
            self.code, self.details = self.code or code, self.details or details
            self.uplink.break_off(Broken())
            self.downlink.break_off(Broken())
            self._tell()

    def complete(self, code: grpc.StatusCode) -> None:
        """Ends the call after all that was sent."""
        if self._active:
            self._active = False
            self.code = self.code or code
            self.uplink.break_off(Broken())
            self.downlink.end()
            self._tell()

    def _tell(self) -> None:
        for callback in self._callbacks:
            callback()

    def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        self.code, self.details = code, details
        raise _Aborted

    def send_initial_metadata(self, metadata: Sequence[tuple[str, str]]) -> None:
        if not self._acknowledged:
            self._acknowledged = True
            self.downlink.acknowledge()

    def is_active(self) -> bool:
        return self._active

    def add_callback(self, callback: Callable[[], object]) -> bool:
        self._callbacks.append(callback)
        return self._active

    def time_remaining(self) -> float:
        return FOREVER

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def peer(self) -> str:
        return f"ipv4:{self.client}"

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}


class _Turn:
    """What a request waits for."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._signal = Signal(scheduler)
        self._has_come = False

    def set(self) -> None:
        self._has_come = True
        self._signal.notify()

    def wait(self) -> None:
        while not self._has_come:
            self._signal.wait()


class _Computing:
    """A multiplier that takes its time, and does what the schedule wants of it.

    Attributes:
        seconds: what a product takes.
        hangs: whether products come to no end, until this is over.
        memory_errors: how many of the next products run out of memory.
        erred: how many rows were wrong since `err_in`.
    """

    def __init__(self, scheduler: Scheduler, rogue: Rogue) -> None:
        self.seconds = 0.001
        self.hangs = False
        self.memory_errors = 0
        self.erred = 0
        self._errs_in: int | None = None
        self._hangs_then = 0.0
        self.recovered = Signal(scheduler)
        self._scheduler = scheduler
        self._rogue = rogue

    def outputs(self, product: Product) -> int:
        return self._rogue.outputs(product)

    def multiply(self, product: Product, operand: Residues, parameters: ParameterSet) -> Residues:
        if self.memory_errors:
            self.memory_errors -= 1
            raise MemoryError
        self._scheduler.sleep(self.seconds)
        while self.hangs:
            self.recovered.wait()
        return self._err(self._rogue.multiply(product, operand, parameters))

    def err_in(self, row: int, hangs: float = 0.0) -> None:
        """Lets a number be wrong in one row: of those multiplied from now on, the one after so many.

        Args:
            hangs: seconds for which nothing is computed after that.
        """
        self._errs_in, self.erred, self._hangs_then = row, 0, hangs

    def hang(self, seconds: float) -> None:
        """Stops all computing for so long."""
        self.hangs = True
        self._scheduler.call_later(seconds, self.recover)

    def recover(self) -> None:
        """Lets it go on."""
        self.hangs = False
        self.recovered.notify()

    def _err(self, answer: Residues) -> Residues:
        row, rows = self._errs_in, len(answer)
        if row is None:
            return answer
        self._errs_in = None if row < rows else row - rows
        if row < rows:
            answer = answer.copy()
            column = row % answer.shape[1]
            answer[row, column] = (int(answer[row, column]) + 1) % Q31.modulus
            self.erred += 1
            if self._hangs_then:
                self.hang(self._hangs_then)
        return answer


class SimulatedWorker:
    """A worker that can be stopped and started.

    Attributes:
        operator, index: whose it is, and which.
        limits: on requests to it.
        link: the way to it.
        alive: whether its process runs.
        calls: those under way.
        rogue: lies on demand.
        computing: slow or out of memory on demand.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        operator: int,
        index: int,
        store: LayerStore,
        honest: Multiplier,
        limits: Limits,
    ) -> None:
        self.operator, self.index = operator, index
        self.link = Link()
        self.rogue = Rogue(honest)
        self.computing = _Computing(scheduler, self.rogue)
        self.calls: set[Call] = set()
        self.most_queued = 0
        self._honest = honest
        self._scheduler = scheduler
        self._store = store
        self.limits = limits
        self.start()

    def __repr__(self) -> str:
        return f"worker {self.index} of operator {self.operator}"

    def start(self) -> None:
        """Starts the process."""
        self.alive = True
        limits = self.limits
        rate = RateLimit(limits.max_requests_per_second, self._clock)
        self.places = Places(bounds_of(limits), rate, clock=self._clock, event=lambda: _Turn(self._scheduler))
        self.watchdog = Watchdog(limits.patience_seconds, limits.min_bytes_per_second, self._clock)
        self.service = WorkerService(
            self._store,
            limits,
            self.places,
            self.computing,
            identify=lambda context: context.client,  # type: ignore[attr-defined]
            watchdog=self.watchdog,
            clock=self._clock,
            # They would be waited for by the wall's clock.
            turns=TurnsOfConnections(patience=0.0),
        )

    def _clock(self) -> float:
        return self._scheduler.now

    def _watch(self) -> None:
        """What the daemon's watchdog thread does, for as long as there is something to watch."""
        while self.calls:
            self._scheduler.sleep(1.0)
            self.watchdog.sweep()

    def kill(self) -> None:
        """Ends the process as a crash would: the kernel resets its connections."""
        self.alive = False
        for call in tuple(self.calls):
            call.close(grpc.StatusCode.UNAVAILABLE, "Connection reset by peer")
            assert call.task
            call.task.kill()
        self.computing.hangs = False

    def restart(self, pause: float, drain: bool) -> None:
        """Stops, gracefully or not, and starts again after a pause."""
        if drain:
            self.places.close()
            deadline = self._scheduler.now + 30.0
            while self.places.inside and self._scheduler.now < deadline:
                self._scheduler.sleep(0.05)
        self.kill()
        self._scheduler.sleep(pause)
        self.start()

    def true_answer(self, product: Product, operand: Residues) -> Residues:
        """What it ought to say."""
        return self._honest.multiply(product, operand, Q31)

    def open_call(self, client: str) -> Call:
        """Begins to serve a request."""
        call = Call(self._scheduler, self.link, client)
        if not self.calls:
            self._scheduler.spawn(self._watch, repr(self))
        self.calls.add(call)
        call.task = self._scheduler.spawn(lambda: self._serve(call), repr(self))
        return call

    def _serve(self, call: Call) -> None:
        context: Any = call
        answer = self.service.Multiply(call.requests(), context)
        try:
            for message in answer:
                call.downlink.send(message)
            call.complete(grpc.StatusCode.OK)
        except _Aborted:
            call.complete(grpc.StatusCode.UNKNOWN)
        except (Broken, DeadlineExceeded):
            call.cancel()
        finally:
            answer.close()
            self.calls.discard(call)
            self.most_queued = max(self.most_queued, call.uplink.most_queued, call.downlink.most_queued)
