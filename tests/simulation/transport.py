"""How the real client reaches simulated workers: the place of `GrpcTransport`."""

from collections.abc import Generator, Iterator
from itertools import chain

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from blindtune.client.operators.decisions import Failure
from blindtune.client.operators.messages import WorkRequest, read_rows, request_messages
from blindtune.client.operators.transport import StopRequest, TransportError, transport_error
from blindtune.proto import worker_pb2
from simulation.ledger import Ledger
from simulation.network import ACKNOWLEDGED, Broken, DeadlineExceeded
from simulation.scheduler import Scheduler, Signal
from simulation.workers import Call, SimulatedWorker

__all__ = ["SimulatedTransport"]

_HALF_WRITTEN = 0xABADCAFE


class _RpcError(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details


class SimulatedTransport:
    """A client's connection to one worker.

    Args:
        scheduler, ledger: of the world.
        worker: at the other end.
        client: name of the client.
        manifest: what the worker says of itself.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        ledger: Ledger,
        worker: SimulatedWorker,
        client: str,
        manifest: worker_pb2.Manifest,
    ) -> None:
        self._scheduler = scheduler
        self._ledger = ledger
        self._worker = worker
        self._client = client
        self._manifest = manifest

    def manifest(self, timeout: float) -> worker_pb2.Manifest:
        try:
            self._connect(self._scheduler.now + timeout)
        except grpc.RpcError as error:
            raise transport_error(error) from None
        return self._manifest

    def _connect(self, deadline: float, stop: StopRequest | None = None) -> None:
        """Waits until the worker is reached, unless the call is stopped meanwhile."""
        link = self._worker.link
        seconds, left = self._scheduler.random.uniform(*link.delay), deadline - self._scheduler.now
        is_late = link.silent or seconds > left
        stopped = Signal(self._scheduler)
        if stop is not None:
            stop.by(stopped.notify)
        if stop is None or not stop.called:
            stopped.wait(self._scheduler.now + (left if is_late else seconds))
        if stop is not None and stop.called:
            raise _RpcError(grpc.StatusCode.CANCELLED, "Channel closed!")
        if is_late:
            raise _RpcError(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
        if not (link.up and self._worker.alive):
            raise _RpcError(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses")

    def multiply(
        self,
        request: WorkRequest,
        timeout: float,
        answer: NDArray[np.uint32],
        stop: StopRequest | None = None,
    ) -> Generator[int, None, None]:
        deadline = self._scheduler.now + timeout
        messages = list(request_messages(request))
        attempt = self._ledger.sent(self._client, self._worker, request, messages)
        rows = 0
        try:
            self._connect(deadline, stop)
            call = self._worker.open_call(self._client)
            if stop is not None:
                stop.by(call.cancel)
            sender = self._scheduler.spawn(lambda: _send(call, messages))
            try:
                arriving = self._answer(call, deadline)
                first = next(arriving, None)
                yield 0
                if first is not None:
                    arriving = chain(() if first is ACKNOWLEDGED else (first,), arriving)
                for rows in read_rows(request, arriving, answer):
                    attempt.arrived(answer[:rows])
                    yield rows
            finally:
                call.cancel()
                sender.kill()
        except grpc.RpcError as error:
            if stop is not None and stop.called:
                answer[rows:] = _HALF_WRITTEN  # a message that was being copied as the stop came
            raise transport_error(error) from None
        except DecodeError:
            raise TransportError(Failure.UNREACHABLE, "no message") from None

    def _answer(self, call: Call, deadline: float) -> Iterator[bytes]:
        try:
            yield from call.downlink.messages(deadline)
        except DeadlineExceeded:
            raise _RpcError(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded") from None
        except Broken:
            raise _RpcError(call.code or grpc.StatusCode.UNAVAILABLE, call.details) from None
        if call.code not in (None, grpc.StatusCode.OK):  # None: a stream that was truncated looks complete
            raise _RpcError(call.code, call.details)

    def close(self) -> None:
        pass


def _send(call: Call, messages: list[bytes]) -> None:
    try:
        for message in messages:
            call.uplink.send(message)
        call.uplink.end()
    except Broken:
        pass  # the worker answered or left without having read everything
