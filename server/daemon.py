"""A store, a service and a socket as a running server that can be stopped without losing a request."""

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from blindtune.proto import MAX_MESSAGE_BYTES, worker_pb2, worker_pb2_grpc
from blindtune.server.gate import Gate
from blindtune.server.hooks import Multiplying, Observer
from blindtune.server.limits import Limits
from blindtune.server.service import WorkerService
from blindtune.server.store import LayerStore
from blindtune.server.transport import Endpoint

__all__ = ["SERVICE_NAME", "RunningWorker", "serve"]

SERVICE_NAME: str = worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name

# Threads for manifests, health checks, reflection and refusals while all others multiply.
_SPARE_THREADS = 8
_CLOSING_SECONDS = 2.0

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A second daemon on the same port must fail, not share it.
    ("grpc.so_reuseport", 0),
    # A client that vanished without a word is noticed, and does not hold its place for ever.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
)


class RunningWorker:
    """A worker that serves until it is stopped.

    Attributes:
        port: where it listens.
        address: ``HOST:PORT``.
    """

    def __init__(
        self, server: grpc.Server, gate: Gate, health_service: health.HealthServicer, address: str, port: int
    ) -> None:
        self.address = address
        self.port = port
        self._server = server
        self._gate = gate
        self._health = health_service
        self._stopping = threading.Lock()

    @property
    def requests_inside(self) -> int:
        """How many multiplications are running."""
        return self._gate.inside

    def stop(self, drain_seconds: float = 30.0) -> bool:
        """Refuses new requests, reports NOT_SERVING, finishes those inside, and closes the socket.

        Args:
            drain_seconds: how long requests inside may still take; then they are cancelled.

        Returns:
            Whether all of them finished. Stopping again does no harm.
        """
        self._gate.close()
        self._health.enter_graceful_shutdown()
        with self._stopping:
            finished = self._gate.wait_until_empty(drain_seconds)
            # A request leaves the gate a moment before its status leaves the machine.
            self._server.stop(_CLOSING_SECONDS if finished else None).wait()
        return finished


def serve(
    store: LayerStore,
    endpoint: Endpoint,
    *,
    limits: Limits | None = None,
    multiplier: Multiplying | None = None,
    observer: Observer | None = None,
) -> RunningWorker:
    """Starts a worker in this process.

    Args:
        store: the layers that it serves.
        endpoint: where it listens.
        limits: on requests; the defaults unless given.
        multiplier: in place of the store's own, for tests and demonstrations.
        observer: shown every operand, for tests and demonstrations.

    Raises:
        ConfigurationError: it cannot listen there.
    """
    limits = limits or Limits()
    gate = Gate(limits.max_concurrent)
    threads = limits.max_concurrent + _SPARE_THREADS
    server = grpc.server(
        ThreadPoolExecutor(threads, thread_name_prefix="blindtune-worker"),
        options=_OPTIONS,
        # Calls beyond the threads are refused: without this bound they would queue.
        maximum_concurrent_rpcs=threads,
    )
    worker_pb2_grpc.add_WorkerServicer_to_server(
        WorkerService(store, limits, gate, multiplier, observer), server
    )
    health_service = health.HealthServicer()
    health_service.set(SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    port = endpoint.bind(server)
    server.start()
    return RunningWorker(server, gate, health_service, endpoint.address(port), port)
