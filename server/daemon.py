"""A store, a service and a socket as a running server that can be stopped without losing a request."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from blindtune.proto import MAX_MESSAGE_BYTES
from blindtune.protocol.kernels.allocator import keep_freed_memory
from blindtune.server.admission.gate import Gate
from blindtune.server.admission.identity import Identify, by_certificate, by_token
from blindtune.server.admission.interceptors import DecodeAll, RequireToken, WatchClients
from blindtune.server.admission.limits import Limits
from blindtune.server.admission.places import WINDOW_BYTES, Places, bounds_of
from blindtune.server.admission.rate import RateLimit
from blindtune.server.admission.strangers import MOST_STRANGERS, PLACES_OF_STRANGERS, Strangers
from blindtune.server.admission.tokens import Tokens
from blindtune.server.admission.watchdog import Watchdog
from blindtune.server.health import HealthService
from blindtune.server.hooks import Multiplying, Observer
from blindtune.server.metrics import WorkerMetrics
from blindtune.server.service import SERVICE_NAME, WorkerService
from blindtune.server.store import LayerStore
from blindtune.server.threads import InThreads
from blindtune.server.transport import Endpoint
from blindtune.server.version import software_version

__all__ = ["KEPT_BYTES", "SERVICE_NAME", "RunningWorker", "serve"]

_MULTIPLY = f"/{SERVICE_NAME}/Multiply"

# Manifests, health checks and reflection at a time while all others multiply, and those of one client.
_OTHER_CALLS = 64
_OTHER_CALLS_PER_CLIENT = 6
# Threads for them, and for refusals.
_SPARE_THREADS = _OTHER_CALLS + 4
# How many of these may be taken by clients that watch the health, for as long as they like.
_WATCHES = 4
_CLOSING_SECONDS = 2.0
KEPT_BYTES = 256 << 20
"""Freed memory that is kept for the next product. A worker serves many clients, and leaves the rest to the
system."""

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A second daemon on the same port must fail, not share it.
    ("grpc.so_reuseport", 0),
    # A client that vanished without a word is noticed, and does not hold its place for ever.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # What gRPC takes in of an operand that nobody reads yet. It would else be up to 16 MiB for each request,
    # guessed from how fast connections are; from 4 MiB on a link of 1 Gb/s and 40 ms is as fast.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    # A connection carries many times what one client may run at once, and no more.
    ("grpc.max_concurrent_streams", 128),
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.absolute_max_metadata_size", 16 << 10),
)


class RunningWorker:
    """A worker that serves until it is stopped.

    Attributes:
        port: where it listens.
        address: ``HOST:PORT``.
        metrics: its figures.
    """

    def __init__(
        self,
        server: grpc.Server,
        places: Places,
        health_service: health.HealthServicer,
        address: str,
        port: int,
        metrics: WorkerMetrics,
        watchdogs: Sequence[Watchdog],
        pools: Sequence[Executor],
    ) -> None:
        self.address = address
        self.port = port
        self.metrics = metrics
        self._server = server
        self._places = places
        self._health = health_service
        self._pools = pools
        self._stopping = threading.Lock()
        self._stopped = threading.Event()
        for watchdog in watchdogs:
            threading.Thread(
                target=watchdog.run, args=(self._stopped,), name="blindtune-watchdog", daemon=True
            ).start()

    @property
    def requests_inside(self) -> int:
        """How many multiplications are running."""
        return self._places.inside

    @property
    def requests_waiting(self) -> int:
        """How many wait for their turn."""
        return self._places.waiting

    def stop(self, drain_seconds: float = 30.0) -> bool:
        """Refuses requests that wait or are new, reports NOT_SERVING, finishes those that run, and closes.

        Args:
            drain_seconds: how long requests inside may still take; then they are cancelled.

        Returns:
            Whether all of them finished. Stopping again does no harm.
        """
        self._places.close()
        self._health.enter_graceful_shutdown()
        with self._stopping:
            finished = self._places.wait_until_empty(drain_seconds)
            # A request leaves the gate a moment before its status leaves the machine.
            self._server.stop(_CLOSING_SECONDS if finished else None).wait()
            self._stopped.set()
        return finished

    def join(self) -> None:
        """Waits until its threads have ended, once it was stopped. One whose device hangs never does."""
        for pool in self._pools:
            pool.shutdown()


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
        ConfigurationError: it cannot listen there, or the file of tokens is unusable.
    """
    keep_freed_memory(KEPT_BYTES)
    limits = limits or Limits()
    metrics = _metrics(store, limits, lambda: places)
    places = Places(bounds_of(limits), RateLimit(limits.max_requests_per_second), waited=metrics.waited)
    watchdog = Watchdog(limits.patience_seconds, limits.min_bytes_per_second)
    interceptors: list[grpc.ServerInterceptor] = []
    identify: Identify = by_certificate
    tokens = strangers = None
    if endpoint.tokens is not None:
        tokens, strangers = Tokens(endpoint.tokens), Strangers(limits.patience_seconds)
        identify = by_token(tokens)
        interceptors.append(RequireToken(tokens, metrics.rejected))
    others = Gate(_OTHER_CALLS, _OTHER_CALLS_PER_CLIENT)
    interceptors += [
        DecodeAll(),
        WatchClients(watchdog, others, identify, frozenset([_MULTIPLY]), strangers, tokens),
    ]
    # One for each request that runs or waits.
    threads = limits.max_concurrent + limits.max_waiting + _SPARE_THREADS
    pool = ThreadPoolExecutor(threads, thread_name_prefix="blindtune-worker")
    products = ThreadPoolExecutor(limits.max_concurrent, thread_name_prefix="blindtune-product")
    server = grpc.server(
        pool,
        interceptors=interceptors,
        options=(*_OPTIONS, ("grpc.server_handshake_timeout_ms", round(1000 * limits.handshake_seconds))),
        # Calls beyond the threads are refused: without this bound they would queue. Strangers have their own.
        maximum_concurrent_rpcs=threads + (MOST_STRANGERS if strangers else 0),
    )
    service = WorkerService(
        store,
        limits,
        places,
        InThreads(metrics.timed(multiplier or store.multiplier()), products),
        observer,
        metrics,
        identify=identify,
        watchdog=watchdog,
    )
    service.add_to(server)
    # Strangers hold no more of them than they have places, and so none that are meant for others.
    health_service = HealthService(_WATCHES + (PLACES_OF_STRANGERS if strangers else 0))
    health_service.set(SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    port = endpoint.bind(server)
    server.start()
    watchdogs, pools = [watchdog], [pool, products]
    if strangers is not None:
        watchdogs.append(strangers.watchdog)
        pools.append(strangers.pool)
    return RunningWorker(
        server, places, health_service, endpoint.address(port), port, metrics, watchdogs, pools
    )


def _metrics(store: LayerStore, limits: Limits, places: Callable[[], Places]) -> WorkerMetrics:
    device = next(iter(store.layers.values())).integers.device
    build = {
        "version": software_version(),
        "model": store.model,
        "fingerprint": store.fingerprint,
        "product_method": store.product_method,
        "device": str(device),
    }
    return WorkerMetrics(
        limits.max_concurrent, lambda: places().inside, lambda: places().waiting, device, build
    )
