"""One operator: its replicas, verified answers, and retries of the same bytes.

A share is bound to its recipient when the mask is drawn, and an `OperatorClient` refuses any other:
nothing here can carry a share to another operator.

Rows are independent, so an operand is cut into blocks, which go to the replicas side by side, to whichever is
least busy. Rows of an answer are verified as they arrive, before anybody else sees them; one wrong row fails
all of its block, which another replica is then asked for (`blindtune.client.operators.asking`).
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import tenacity

from blindtune.client.operators import lanes
from blindtune.client.operators.asking import Asking, Question
from blindtune.client.operators.buffers import Buffers
from blindtune.client.operators.decisions import Failure
from blindtune.client.operators.figures import Exclusion, OperatorStatistics
from blindtune.client.operators.manifest import Expectations, check_manifest
from blindtune.client.operators.messages import WorkRequest
from blindtune.client.operators.policy import WorkerPolicy
from blindtune.client.operators.threads import Threads
from blindtune.client.operators.timers import Later, Timers
from blindtune.client.operators.transport import Transport, TransportError
from blindtune.errors import IncompatibleWorkerError, OperatorUnavailableError, ProtocolError
from blindtune.proto import worker_pb2
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
# A worker that takes less than this would be asked in so many small pieces that it delayed its replicas.
_LEAST_LIMIT_ROWS, _LEAST_LIMIT_BYTES = 64, 1 << 20


@dataclass(frozen=True)
class _Limits:
    """What a worker takes in one request."""

    rows: int = 1 << 30
    operand_bytes: int = _BLOCK_BYTES

    def most(self, rows: int, row_bytes: int) -> int:
        """Rows of an operand that fit."""
        return max(1, min(rows, self.rows, self.operand_bytes // row_bytes))


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
        later: calls something after some seconds; a thread does, unless given.
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
        later: Later | None = None,
        executor: Callable[[int], Executor] = ThreadPoolExecutor,
    ) -> None:
        self.index = index
        self.name = name
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
        # One for each replica that is free, since only such repeat what others are asked for.
        self._hedges = Threads(len(workers), executor)
        self._timers = Timers()
        self._buffers = Buffers(_KEPT_BYTES)
        self._limits = [_Limits()] * len(workers)
        self._asking = Asking(
            name,
            workers,
            self._policy,
            request_timeout,
            clock,
            self._pause,
            later or self._timers.later,
            self._hedges,
            self._buffers,
            self._closed,
        )

    @property
    def statistics(self) -> OperatorStatistics:
        """A copy of the figures so far."""
        return self._asking.statistics

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
                raise IncompatibleWorkerError(f"{self._asking.who(worker)} refused: {error}") from None
            answered.set()
            self._accept(worker, manifest)
            return None

        with self._executor(len(self._transports)) as pool:
            problems = list(pool.map(ask, range(len(self._transports))))
        silent = [f"{self._asking.who(i)}: {problem}" for i, problem in enumerate(problems) if problem]
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
        who = self._asking.who(worker)
        check_manifest(manifest, self._expected, who)
        stated, none = manifest.limits, _Limits()
        rows, size = stated.max_rows or none.rows, stated.max_operand_bytes or none.operand_bytes
        if rows < _LEAST_LIMIT_ROWS or size < _LEAST_LIMIT_BYTES:
            raise IncompatibleWorkerError(
                f"{who} takes operands of at most {rows} rows and {size} bytes, but {_LEAST_LIMIT_ROWS} rows "
                f"and {_LEAST_LIMIT_BYTES} bytes are needed: start it with larger --max-rows and "
                "--max-operand-bytes"
            )
        self._limits[worker] = _Limits(rows, min(size, none.operand_bytes))
        self._policy.acknowledges(worker, manifest.acknowledges)

    def multiply(self, request: WorkRequest, check: CheckVectors, vectors: int | None = None) -> Residues:
        """The product, verified. See `start`.

        Raises:
            OperatorUnavailableError: no worker answers.
            UntrustworthyOperatorError: none is left, since they gave wrong answers.
        """
        return self.start(request, check, vectors).result()

    def start(self, request: WorkRequest, check: CheckVectors, vectors: int | None = None) -> Pending:
        """Asks for a product, without waiting for it.

        Args:
            request: a share for this operator.
            check: the product's secret vectors.
            vectors: how many of them to check with; as many as every day unless given.

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
        question = Question(request, check, vectors)
        most = [limits.most(rows, request.parameters.word_bytes * columns) for limits in self._limits]
        workers = self._asking.ready()
        parts = _BLOCKS_PER_WORKER * len(workers) if len(workers) > 1 else 1
        answer = self._buffers.take(rows, request.outputs)

        def ask(first: int, stop: int) -> int:
            block = question.rows(first, stop)
            return first + self._asking.ask(block, most, answer[first:stop])

        # A worker that takes fewer rows gets the first of a block, and the others become one of their own.
        largest = max((most[i] for i in workers), default=max(most))
        blocks = lanes.cut(rows, largest, _LEAST_BLOCK_ROWS, parts)
        try:
            under_way = lanes.start(self._threads.get(), blocks, max(1, len(workers)), ask)
        except RuntimeError:
            if not self._closed.is_set():
                raise
            raise self._asking.was_closed() from None
        return Pending(under_way, answer, self._buffers)

    def close(self) -> None:
        """Closes all connections. Requests under way end with an error, and are not tried again."""
        self._closed.set()
        for transport in self._transports:
            transport.close()
        self._threads.close()
        self._hedges.close()
        self._timers.close()


def _passes(error: BaseException) -> bool:
    """Whether a failure may be over at the next attempt."""
    return isinstance(error, TransportError) and error.failure is not Failure.INCOMPATIBLE
