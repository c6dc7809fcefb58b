"""Requests to one worker over gRPC.

`Transport` is the little that the rest of the client knows of a network, so that tests put a loopback
or a faulty one in its place.
"""

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import grpc
import numpy as np
from numpy.typing import NDArray

from blindtune.client.config import Operator
from blindtune.client.operators.manifest import shown
from blindtune.client.operators.policy import Failure
from blindtune.proto import MAX_MESSAGE_BYTES, PROTOCOL_VERSION, worker_pb2, worker_pb2_grpc
from blindtune.protocol.errors import ConfigurationError, VerificationError
from blindtune.protocol.masks import Share
from blindtune.protocol.products import Product

__all__ = ["GrpcTransport", "Transport", "TransportError", "WorkRequest"]

_CHUNK_BYTES = 1 << 18
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Each worker gets its own connection, and none goes through a proxy.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.keepalive_time_ms", 60_000),
]


class TransportError(Exception):
    """A request failed; ``failure`` says how."""

    def __init__(self, failure: Failure, detail: str) -> None:
        super().__init__(detail)
        self.failure = failure


@dataclass(frozen=True)
class WorkRequest:
    """A multiplication as it goes to a worker, the same at every attempt.

    Attributes:
        fingerprint: of the model.
        parameter_set: name of the parameter set.
        product: the matrix.
        share: the operand.
        outputs: columns of the answer.
    """

    fingerprint: str
    parameter_set: str
    product: Product
    share: Share
    outputs: int

    @property
    def payload_bytes(self) -> int:
        """Bytes of operand that travel: the residues, or the seed."""
        return self.share.residues.nbytes if self.share.seed is None else len(self.share.seed.key)


class Transport(Protocol):
    """A way to reach one worker."""

    def manifest(self, timeout: float) -> worker_pb2.Manifest:
        """What the worker says that it holds.

        Raises:
            TransportError: it can't be reached.
        """

    def multiply(self, request: WorkRequest, timeout: float) -> NDArray[np.uint32]:
        """The worker's answer, of the right shape and otherwise unverified.

        Raises:
            TransportError: there is no answer.
            VerificationError: the answer has another size.
        """

    def close(self) -> None:
        """Lets go of the connection."""


_FAILURES = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: Failure.BUSY,
    grpc.StatusCode.INVALID_ARGUMENT: Failure.INCOMPATIBLE,
    grpc.StatusCode.NOT_FOUND: Failure.INCOMPATIBLE,
    grpc.StatusCode.FAILED_PRECONDITION: Failure.INCOMPATIBLE,
    grpc.StatusCode.UNIMPLEMENTED: Failure.INCOMPATIBLE,
    grpc.StatusCode.UNAUTHENTICATED: Failure.INCOMPATIBLE,
    grpc.StatusCode.PERMISSION_DENIED: Failure.INCOMPATIBLE,
}


def _transport_error(error: grpc.RpcError) -> TransportError:
    code, details = error.code(), error.details() or ""
    failure = _FAILURES.get(code, Failure.UNREACHABLE)
    return TransportError(failure, f"{code.name}: {shown(details)}")


class GrpcTransport:
    """A worker at an address, over TLS with the operator's own CA, or in plaintext on loopback."""

    def __init__(self, operator: Operator, address: str, insecure: bool) -> None:
        self._operator = operator
        self._address = address
        self._insecure = insecure
        self._lock = threading.Lock()
        self._connection: tuple[int, grpc.Channel, worker_pb2_grpc.WorkerStub] | None = None

    def _stub(self) -> worker_pb2_grpc.WorkerStub:
        """Opens the channel at first use in each process, since channels do not survive a fork."""
        with self._lock:
            if self._connection is None or self._connection[0] != os.getpid():
                channel = self._open()
                self._connection = (os.getpid(), channel, worker_pb2_grpc.WorkerStub(channel))
            return self._connection[2]

    def _open(self) -> grpc.Channel:
        if self._insecure:
            return grpc.insecure_channel(self._address, _OPTIONS)
        operator = self._operator
        if not (operator.ca and operator.cert and operator.key):
            raise ConfigurationError(f"operator {operator.name}: TLS needs ca, cert and key")
        credentials = grpc.ssl_channel_credentials(
            root_certificates=Path(operator.ca).read_bytes(),
            private_key=Path(operator.key).read_bytes(),
            certificate_chain=Path(operator.cert).read_bytes(),
        )
        return grpc.secure_channel(self._address, credentials, _OPTIONS)

    def manifest(self, timeout: float) -> worker_pb2.Manifest:
        try:
            return self._stub().GetManifest(worker_pb2.GetManifestRequest(), timeout=timeout)
        except grpc.RpcError as error:
            raise _transport_error(error) from None

    def multiply(self, request: WorkRequest, timeout: float) -> NDArray[np.uint32]:
        rows = request.share.residues.shape[0]
        answer = np.empty((rows, request.outputs), np.uint32)
        filled, target = 0, answer.data.cast("B")
        call = self._stub().Multiply(_messages(request), timeout=timeout)
        try:
            for message in call:
                chunk = message.residues
                if filled + len(chunk) > len(target):
                    call.cancel()
                    raise VerificationError(f"the response is longer than {len(target)} bytes")
                target[filled : filled + len(chunk)] = chunk
                filled += len(chunk)
        except grpc.RpcError as error:
            raise _transport_error(error) from None
        if filled != len(target):
            raise VerificationError(f"the response has {filled} bytes, not {len(target)}")
        return answer

    def close(self) -> None:
        with self._lock:
            if self._connection is not None and self._connection[0] == os.getpid():
                self._connection[1].close()
            self._connection = None


def _messages(request: WorkRequest) -> Iterator[worker_pb2.MultiplyRequest]:
    rows, columns = request.share.residues.shape
    header = worker_pb2.MultiplyHeader(
        protocol_version=PROTOCOL_VERSION,
        fingerprint=request.fingerprint,
        parameter_set=request.parameter_set,
        product=worker_pb2.Product(
            direction=worker_pb2.Direction.Name(request.product.direction),
            spans=[worker_pb2.Span(layer=s.layer, start=s.start, stop=s.stop) for s in request.product.spans],
        ),
        rows=rows,
        columns=columns,
    )
    seed = request.share.seed
    if seed is not None:
        header.seed.key, header.seed.row_offset = seed.key, seed.row_offset
    yield worker_pb2.MultiplyRequest(header=header)
    if seed is None:
        step = max(1, _CHUNK_BYTES // (4 * columns))
        for start in range(0, rows, step):
            block = request.share.residues[start : start + step]
            yield worker_pb2.MultiplyRequest(residues=block.tobytes())
