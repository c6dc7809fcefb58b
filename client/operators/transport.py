"""Requests to one worker over gRPC.

`Transport` is the little that the rest of the client knows of a network, so that tests put a loopback
or a faulty one in its place.
"""

import os
import threading
from pathlib import Path
from typing import Protocol

import grpc
import numpy as np
from numpy.typing import NDArray

from blindtune.client.config import Operator
from blindtune.client.operators.manifest import shown
from blindtune.client.operators.messages import WorkRequest, read_answer, request_messages
from blindtune.client.operators.policy import Failure
from blindtune.proto import MAX_MESSAGE_BYTES, worker_pb2, worker_pb2_grpc
from blindtune.protocol.errors import ConfigurationError

__all__ = ["GrpcTransport", "Transport", "TransportError"]

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
        call = self._stub().Multiply(request_messages(request), timeout=timeout)
        try:
            return read_answer(request, call)
        except grpc.RpcError as error:
            raise _transport_error(error) from None
        finally:
            call.cancel()  # an answer that went on for too long would keep coming

    def close(self) -> None:
        with self._lock:
            if self._connection is not None and self._connection[0] == os.getpid():
                self._connection[1].close()
            self._connection = None
