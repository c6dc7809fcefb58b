"""Requests to one worker over gRPC.

`Transport` is the little that the rest of the client knows of a network, so that tests put a loopback
or a faulty one in its place.
"""

import logging
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Protocol

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from blindtune.client.config.addresses import grpc_target
from blindtune.client.config.blind_config import Operator
from blindtune.client.operators.decisions import Failure
from blindtune.client.operators.manifest import shown
from blindtune.client.operators.messages import WorkRequest, read_rows, request_messages
from blindtune.client.tls.files import files_state, read_files
from blindtune.errors import ConfigurationError
from blindtune.proto import MAX_MESSAGE_BYTES, worker_pb2, worker_pb2_grpc
from blindtune.proto.turns import Turns
from blindtune.protocol.kernels.process import this_process

__all__ = ["GrpcTransport", "StopRequest", "Transport", "TransportError", "transport_error"]

_logger = logging.getLogger(__name__)
_CLOSED = "the connection was closed"
_MULTIPLY = f"/{worker_pb2.DESCRIPTOR.services_by_name['Worker'].full_name}/Multiply"
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Each worker gets its own connection, and none goes through a proxy.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # A worker that vanished without a word is noticed in the middle of a request, and a replica asked.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Also while a worker computes for minutes and sends nothing.
    ("grpc.http2.max_pings_without_data", 0),
]


class TransportError(Exception):
    """A request failed.

    Attributes:
        failure: what it means for the worker.
        code: how gRPC says it, where it was gRPC.
    """

    def __init__(self, failure: Failure, detail: str, code: grpc.StatusCode | None = None) -> None:
        super().__init__(detail)
        self.failure = failure
        self.code = code


class StopRequest:
    """Lets another thread end a request.

    Attributes:
        called: whether one did.
    """

    def __init__(self) -> None:
        self.called = False
        self._lock = threading.Lock()
        self._ends: Callable[[], object] = lambda: None

    def by(self, ends: Callable[[], object]) -> None:
        """Says what ends it, from now on."""
        with self._lock:
            self._ends = ends
            called = self.called
        if called:
            ends()

    def __call__(self) -> None:
        """Ends it, or keeps it from being made. Whoever reads its answer gets a `TransportError`."""
        with self._lock:
            self.called = True
            ends = self._ends
        ends()


class Transport(Protocol):
    """A way to reach one worker."""

    def manifest(self, timeout: float) -> worker_pb2.Manifest:
        """What the worker says that it holds.

        Raises:
            TransportError: it can't be reached.
        """

    def multiply(
        self,
        request: WorkRequest,
        timeout: float,
        answer: NDArray[np.uint32],
        stop: StopRequest | None = None,
    ) -> Generator[int, None, None]:
        """Asks the worker. Closing the generator ends the request.

        Args:
            request: what to ask.
            timeout: seconds for all of it.
            answer: uint32 [rows, outputs], in C order, where the rows of the answer go, unverified.
            stop: is told how to end the request while the generator is waiting.

        Yields:
            How many of the rows are there: 0 once the worker has given a sign of life, and then each time
            more are. Those are never written again.

        Raises:
            TransportError: there is no answer.
            VerificationError: the answer has another size.
        """

    def close(self) -> None:
        """Lets go of the connection for good. Calls under way end with an error."""


_FAILURES = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: Failure.BUSY,
    grpc.StatusCode.DEADLINE_EXCEEDED: Failure.SILENT,
    grpc.StatusCode.INVALID_ARGUMENT: Failure.INCOMPATIBLE,
    grpc.StatusCode.NOT_FOUND: Failure.INCOMPATIBLE,
    # A worker that was restarted with smaller limits: the same bytes would be refused again.
    grpc.StatusCode.OUT_OF_RANGE: Failure.INCOMPATIBLE,
    grpc.StatusCode.FAILED_PRECONDITION: Failure.INCOMPATIBLE,
    grpc.StatusCode.UNIMPLEMENTED: Failure.INCOMPATIBLE,
    grpc.StatusCode.UNAUTHENTICATED: Failure.INCOMPATIBLE,
    grpc.StatusCode.PERMISSION_DENIED: Failure.INCOMPATIBLE,
}


def transport_error(error: grpc.RpcError) -> TransportError:
    """What a failed call means."""
    code, details = error.code(), error.details() or ""
    failure = _FAILURES.get(code, Failure.UNREACHABLE)
    return TransportError(failure, f"{code.name}: {shown(details)}", code)


class _Connection:
    """A channel, and what it was opened with.

    Attributes:
        process: the one that may use it.
        stub: the calls of messages.
        multiply: the call of rows, which takes and gives bytes.
        turns: of the requests' messages.
        files: state of the operator's files just before they were read.
        calls: how many run on it.
    """

    def __init__(self, channel: grpc.Channel, files: object) -> None:
        self.process = this_process()
        self.stub = worker_pb2_grpc.WorkerStub(channel)
        self.multiply: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(_MULTIPLY)
        self.turns = Turns()
        self.files = files
        self.calls = 0
        self.close = channel.close


class GrpcTransport:
    """A worker at an address, over TLS with the operator's own CA, or in plaintext on loopback.

    When a call has failed and the files of the operator have changed since, the next call goes over a new
    connection with the files as they are now: certificates and tokens may be exchanged during a run.
    """

    def __init__(self, operator: Operator, address: str, insecure: bool) -> None:
        self._operator = operator
        self._address = address
        self._insecure = insecure
        self._lock = threading.Lock()
        self._connection: _Connection | None = None
        # Those on which calls still run, though another one has taken their place.
        self._retired: list[_Connection] = []
        self._closed = False
        self._was_let_in = False

    @contextmanager
    def _connected(self) -> Iterator[_Connection]:
        """The block is one call.

        Raises:
            TransportError: it failed.
        """
        with self._lock:
            if self._closed:
                raise TransportError(Failure.UNREACHABLE, _CLOSED)
            # Opened at first use in each process, since channels do not survive a fork.
            if self._connection is None or self._connection.process is not this_process():
                self._connection = self._open()
            connection = self._connection
            connection.calls += 1
        try:
            yield connection
            self._was_let_in = True
        except grpc.RpcError as error:
            raise self._failed(connection, transport_error(error)) from None
        except DecodeError:
            raise TransportError(Failure.UNREACHABLE, "the answer holds bytes that are no message") from None
        except ValueError:
            # gRPC's word for a channel that was closed before the call began.
            if not self._closed:
                raise
            raise TransportError(Failure.UNREACHABLE, _CLOSED) from None
        finally:
            with self._lock:
                connection.calls -= 1
                if connection in self._retired and not connection.calls:
                    self._retired.remove(connection)
                    connection.close()

    def _failed(self, connection: _Connection, error: TransportError) -> TransportError:
        refused = error.code is grpc.StatusCode.UNAUTHENTICATED
        if not refused and error.failure not in (Failure.UNREACHABLE, Failure.SILENT):
            return error
        renewed = self._renew(connection)
        # A worker that let this client in before is probably in the middle of an exchange of tokens.
        if refused and (renewed or self._was_let_in):
            return TransportError(Failure.UNREACHABLE, str(error), error.code)
        return error

    def _renew(self, failed: _Connection) -> bool:
        """Whether the next call goes over another connection than the one that failed."""
        with self._lock:
            if self._connection is not failed:
                return self._connection is not None
            state = self._files_state()
            if state == failed.files:
                return False
            failed.files = state
            try:
                self._connection = self._open()
            except ConfigurationError as error:
                _logger.warning("%s; going on with the files as they were", error)
                return False
            self._retired.append(failed)
            return True

    def _files_state(self) -> object:
        operator = self._operator
        return (
            None
            if self._insecure
            else files_state((operator.ca, operator.cert, operator.key, operator.token))
        )

    def _open(self) -> _Connection:
        # Looked at before they are read: a change in between is then noticed the next time.
        state = self._files_state()
        if self._insecure:
            return _Connection(grpc.insecure_channel(grpc_target(self._address), _OPTIONS), state)
        operator = self._operator
        if operator.ca is None:
            raise ConfigurationError(f"operator {operator.name}: TLS needs ca, with cert and key, or token")
        files = read_files(operator.name, operator.ca, operator.cert, operator.key, operator.token)
        credentials = grpc.ssl_channel_credentials(files.ca, files.key, files.certificate)
        if files.token is not None:
            # gRPC sends it over TLS alone.
            token = grpc.access_token_call_credentials(files.token)
            credentials = grpc.composite_channel_credentials(credentials, token)
        return _Connection(grpc.secure_channel(grpc_target(self._address), credentials, _OPTIONS), state)

    def manifest(self, timeout: float) -> worker_pb2.Manifest:
        with self._connected() as connection:
            return connection.stub.GetManifest(worker_pb2.GetManifestRequest(), timeout=timeout)

    def multiply(
        self,
        request: WorkRequest,
        timeout: float,
        answer: NDArray[np.uint32],
        stop: StopRequest | None = None,
    ) -> Generator[int, None, None]:
        with self._connected() as connection:
            messages = connection.turns.in_turn(request_messages(request), request.payload_bytes)
            call = connection.multiply(messages, timeout=timeout)
            try:
                if stop is not None:
                    stop.by(call.cancel)
                # Where a worker acknowledges nothing they come with the first rows. They come of a call that
                # failed, too: reading on tells.
                call.initial_metadata()
                yield 0
                yield from read_rows(request, call, answer)
            finally:
                call.cancel()  # an answer that went on for too long, or is a lie, would keep coming

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for connection in (self._connection, *self._retired):
                if connection is not None and connection.process is this_process():
                    connection.close()
            self._connection = None
