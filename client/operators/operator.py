"""One operator: its replicas, verified answers, and retries of the same bytes.

A share is bound to its recipient when the mask is drawn, and an `OperatorClient` refuses any other:
nothing here can carry a share to another operator.

Rows are independent, so an operand is cut into blocks, which go to the replicas side by side, to whichever is
least busy. Rows of an answer are verified as they arrive, before anybody else sees them; one wrong row fails
all of its block, which another replica is then asked for.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace

import tenacity

from blindtune.client.operators import lanes
from blindtune.client.operators.buffers import Buffers
from blindtune.client.operators.manifest import Expectations, check_manifest
from blindtune.client.operators.messages import WorkRequest
from blindtune.client.operators.policy import Ask, Failure, GiveUp, WorkerPolicy
from blindtune.client.operators.threads import Threads
from blindtune.client.operators.transport import Transport, TransportError
from blindtune.proto import worker_pb2
from blindtune.protocol.errors import (
    IncompatibleWorkerError,
    OperatorUnavailableError,
    ProtocolError,
    UntrustworthyOperatorError,
    VerificationError,
)
from blindtune.protocol.masks import Share
from blindtune.protocol.residues import Residues
from blindtune.protocol.verification import CheckVectors

__all__ = ["Exclusion", "OperatorClient", "OperatorStatistics", "Pending"]

_logger = logging.getLogger(__name__)
_BLOCK_BYTES = 32 << 20
_MANIFEST_SECONDS = 10.0
_PAUSE_SECONDS = 0.25
_GRACE_SECONDS = 5.0
_KEPT_BYTES = 128 << 20
# As many as a worker lets one client run, unless it is told otherwise. More would be turned away.
_REQUESTS_PER_WORKER = 4
# Below this the int8 products of a block take noticeably longer for each row, on CPUs as on GPUs.
_LEAST_BLOCK_ROWS = 256
# Blocks for each worker: with one, the slowest worker decides when an operand is done.
_BLOCKS_PER_WORKER = 4


@dataclass(frozen=True)
class Exclusion:
    """A worker that is not asked again in this run.

    Attributes:
        worker: its address.
        failure: why.
        product: label of the product that it was asked for.
    """

    worker: str
    failure: Failure
    product: str


@dataclass
class OperatorStatistics:
    """What passed between the client and one operator.

    Attributes:
        requests: requests that were sent, retries included: one for each block of rows.
        retries: of them, those that an earlier attempt had failed.
        rows: rows of their operands.
        bytes_sent, bytes_received: payload, without the framing of gRPC and TLS.
        verified_responses: answers that passed the check.
        verification_seconds: time that checking answers took, summed over answers.
        lies: answers that did not, each with the worker's address.
        excluded: workers that lied or serve something else, one entry for each failure.
        failures: requests that failed, by how they did.
    """

    requests: int = 0
    retries: int = 0
    rows: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    verified_responses: int = 0
    verification_seconds: float = 0.0
    lies: tuple[str, ...] = ()
    excluded: tuple[Exclusion, ...] = ()
    failures: Counter[Failure] = field(default_factory=Counter)


class Pending:
    """A product that an operator was asked for."""

    def __init__(self, under_way: lanes.UnderWay, answer: Residues, buffers: Buffers) -> None:
        self._under_way = under_way
        self._answer = answer
        self._buffers = buffers

    @property
    def nbytes(self) -> int:
        """Bytes of the answer, which it takes from the start."""
        return self._answer.nbytes

    def exception(self) -> BaseException | None:
        """Waits until nothing of it is under way any more, and returns what went wrong."""
        return self._under_way.exception()

    def result(self) -> Residues:
        """Waits likewise, and returns the product, verified, or raises."""
        if error := self.exception():
            raise error
        return self._answer

    def release(self) -> None:
        """Lets the memory of the result be used again, by whoever got it and is done with it."""
        self._buffers.give(self._answer)


class OperatorClient:
    """Multiplies shares at the workers of one operator.

    Args:
        index: which share this operator may see.
        name: for messages.
        workers: address and transport of each replica.
        expected: what each must serve.
        retry_seconds: how long a request is tried.
        request_timeout: seconds for one attempt.
        clock, sleep: monotonic seconds, and waiting for some. Unless given, `close` ends the waiting.
        executor: makes so many threads, which wait for workers.
    """

    def __init__(
        self,
        index: int,
        name: str,
        workers: Sequence[tuple[str, Transport]],
        expected: Expectations,
        retry_seconds: float,
        request_timeout: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
        executor: Callable[[int], Executor] = ThreadPoolExecutor,
    ) -> None:
        self.index = index
        self.name = name
        self._addresses = [address for address, _ in workers]
        self._transports = [transport for _, transport in workers]
        self._expected = expected
        self._policy = WorkerPolicy(len(workers), retry_seconds, request_timeout)
        self._retry_seconds = retry_seconds
        self._timeout = request_timeout
        self._closed = threading.Event()
        self._clock = clock
        self._sleep = sleep
        self._executor = executor
        self._threads = Threads(_REQUESTS_PER_WORKER * len(workers), executor)
        self._buffers = Buffers(_KEPT_BYTES)
        self._lock = threading.Lock()
        self._statistics = OperatorStatistics()
        self._max_rows = 1 << 30
        self._max_bytes = _BLOCK_BYTES

    @property
    def statistics(self) -> OperatorStatistics:
        """A copy of the figures so far."""
        with self._lock:
            return replace(self._statistics, failures=self._statistics.failures.copy())

    def connect(self) -> None:
        """Asks every worker what it holds.

        Raises:
            IncompatibleWorkerError: a worker serves something else.
            OperatorUnavailableError: no worker answers.
        """
        started = self._clock()
        answered = threading.Event()

        def out_of_patience(state: tenacity.RetryCallState) -> bool:
            # Once a replica has answered, the others are not worth a long wait.
            patience = min(_GRACE_SECONDS, self._retry_seconds) if answered.is_set() else self._retry_seconds
            return self._closed.is_set() or self._clock() >= started + patience

        def ask(worker: int) -> Exception | None:
            attempts = tenacity.Retrying(
                retry=tenacity.retry_if_exception(_passes),
                stop=out_of_patience,
                wait=tenacity.wait_fixed(_PAUSE_SECONDS),
                sleep=self._pause,
                reraise=True,
            )
            try:
                manifest = attempts(self._transports[worker].manifest, min(_MANIFEST_SECONDS, self._timeout))
            except TransportError as error:
                if _passes(error):
                    return error
                raise IncompatibleWorkerError(f"{self._who(worker)} refused: {error}") from None
            answered.set()
            self._accept(worker, manifest)
            return None

        with self._executor(len(self._transports)) as pool:
            problems = list(pool.map(ask, range(len(self._transports))))
        silent = [f"{self._who(i)}: {problem}" for i, problem in enumerate(problems) if problem]
        if len(silent) == len(problems):
            raise OperatorUnavailableError(
                f"no worker of operator {self.name} answers ({'; '.join(silent)}): check that it runs, its "
                "address and its certificates"
            )
        for message in silent:
            _logger.warning("%s; going on with the operator's other workers", message)

    def _pause(self, seconds: float) -> None:
        """Waits, but not on after `close`."""
        if self._sleep is None:
            self._closed.wait(seconds)
        else:
            self._sleep(seconds)

    def _accept(self, worker: int, manifest: worker_pb2.Manifest) -> None:
        check_manifest(manifest, self._expected, self._who(worker))
        with self._lock:
            self._max_rows = min(self._max_rows, manifest.limits.max_rows or self._max_rows)
            self._max_bytes = min(self._max_bytes, manifest.limits.max_operand_bytes or self._max_bytes)

    def multiply(self, request: WorkRequest, check: CheckVectors, vectors: int = 1) -> Residues:
        """The product, verified. See `start`.

        Raises:
            OperatorUnavailableError: no worker answers.
            UntrustworthyOperatorError: none is left, since they gave wrong answers.
        """
        return self.start(request, check, vectors).result()

    def start(self, request: WorkRequest, check: CheckVectors, vectors: int = 1) -> Pending:
        """Asks for a product, without waiting for it.

        Args:
            request: a share for this operator.
            check: the product's secret vectors.
            vectors: how many of them to check with.

        Raises:
            ProtocolError: the share is for another operator.
            OperatorUnavailableError: after `close`.
        """
        share = request.share
        if share.recipient != self.index:
            raise ProtocolError(
                f"a share for operator {share.recipient} was about to go to operator {self.index}"
            )
        rows, columns = share.shape
        with self._lock:
            most = max(1, min(self._max_rows, self._max_bytes // (4 * columns)))
            workers = self._policy.ready(self._clock())
        parts = _BLOCKS_PER_WORKER * workers if workers > 1 else 1
        answer = self._buffers.take(rows, request.outputs)

        def ask(first: int, stop: int) -> None:
            block = replace(request, share=share.rows(first, stop)) if stop - first < rows else request
            self._multiply_block(block, check, vectors, answer[first:stop])

        blocks = lanes.cut(rows, most, _LEAST_BLOCK_ROWS, parts)
        try:
            under_way = lanes.start(self._threads.get(), blocks, max(1, workers), ask)
        except RuntimeError:
            if not self._closed.is_set():
                raise
            raise OperatorUnavailableError(self._was_closed()) from None
        return Pending(under_way, answer, self._buffers)

    def _multiply_block(
        self, request: WorkRequest, check: CheckVectors, vectors: int, answer: Residues
    ) -> None:
        # `request` is never changed: every attempt sends the same bytes.
        with self._lock:
            attempts = self._policy.request(self._clock())
        while True:
            if self._closed.is_set():
                raise OperatorUnavailableError(self._was_closed())
            with self._lock:
                decision = self._policy.choose(attempts, self._clock())
            if isinstance(decision, GiveUp):
                error_class = UntrustworthyOperatorError if decision.lied else OperatorUnavailableError
                raise error_class(self._explain(decision.reason))
            if not isinstance(decision, Ask):
                self._pause(decision.seconds)
                continue
            worker = decision.worker
            with self._lock:
                self._statistics.retries += bool(attempts.failed)
            try:
                self._ask(worker, request, check, vectors, answer)
            except TransportError as error:
                failure, detail = error.failure, str(error)
            except VerificationError as error:
                failure, detail = Failure.LIED, str(error)
            except BaseException:
                # Interrupted: the worker did nothing wrong, but the request is no longer in flight.
                with self._lock:
                    self._policy.abandoned(worker)
                raise
            else:
                with self._lock:
                    self._policy.succeeded(worker)
                    self._statistics.verified_responses += 1
                return
            if failure is Failure.UNREACHABLE and self._closed.is_set():
                # The worker did nothing wrong, and nobody waits for it.
                with self._lock:
                    self._policy.abandoned(worker)
                raise OperatorUnavailableError(self._was_closed())
            self._note_failure(worker, request, failure, detail)
            with self._lock:
                self._policy.failed(attempts, worker, failure, detail, self._clock())

    def _ask(
        self, worker: int, request: WorkRequest, check: CheckVectors, vectors: int, answer: Residues
    ) -> None:
        rows, _ = request.share.shape
        with self._lock:
            self._statistics.requests += 1
            self._statistics.rows += rows
            self._statistics.bytes_sent += request.payload_bytes
        arrived, verified, seconds = 0, 0, 0.0
        arrivals = self._transports[worker].multiply(request, self._timeout, answer)
        try:
            with closing(arrivals):
                for more in arrivals:
                    if not verified <= more <= rows:
                        raise VerificationError(f"the response went from {verified} to {more} of {rows} rows")
                    arrived = more
                    started = self._clock()
                    try:
                        _verify(check, request.share, answer, slice(verified, arrived), vectors)
                    finally:
                        seconds += self._clock() - started
                    verified = arrived
        finally:
            with self._lock:
                self._statistics.bytes_received += answer[:arrived].nbytes
                self._statistics.verification_seconds += seconds
        if verified != rows:
            raise VerificationError(f"the response ended after {verified} of {rows} rows")

    def _note_failure(self, worker: int, request: WorkRequest, failure: Failure, detail: str) -> None:
        with self._lock:
            self._statistics.failures[failure] += 1
        if failure in (Failure.LIED, Failure.INCOMPATIBLE):
            found = Exclusion(self._addresses[worker], failure, request.product.label)
            with self._lock:
                self._statistics.excluded += (found,)
        if failure is Failure.LIED:
            with self._lock:
                self._statistics.lies += (self._addresses[worker],)
            _logger.error(
                "%s gave a wrong answer and is not asked again in this run (%s; %s)",
                self._who(worker),
                request.product.label,
                detail,
            )
        else:
            _logger.warning("%s %s: %s", self._who(worker), failure.value, detail)

    def _was_closed(self) -> str:
        return f"the connection to operator {self.name} was closed"

    def _who(self, worker: int) -> str:
        return f"worker {self._addresses[worker]} of operator {self.name}"

    def _explain(self, reason: str) -> str:
        workers = "; ".join(
            f"{address}: {self._policy.describe(i)}" for i, address in enumerate(self._addresses)
        )
        return (
            f"operator {self.name}: {reason} ({workers}). Nothing was lost: restart or replace its workers "
            "and resume from the last checkpoint"
        )

    def close(self) -> None:
        """Closes all connections. Requests under way end with an error, and are not tried again."""
        self._closed.set()
        for transport in self._transports:
            transport.close()
        self._threads.close()


def _verify(check: CheckVectors, share: Share, answer: Residues, rows: slice, vectors: int) -> None:
    try:
        if share.expected is not None and vectors == 1:
            check.verify_expected(share.expected[rows], answer[rows])
        else:
            check.verify(share.residues[rows], answer[rows], vectors)
    except VerificationError as error:
        raise VerificationError(
            f"{error} (of those from row {rows.start} on)" if rows.start else str(error)
        ) from None


def _passes(error: BaseException) -> bool:
    """Whether a failure may be over at the next attempt."""
    return isinstance(error, TransportError) and error.failure is not Failure.INCOMPATIBLE
