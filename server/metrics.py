"""What a worker counts of its requests, in a registry of its own.

Counts, sizes and times, added up over all clients. No label names a client, an address or a layer, and
nothing here is computed from an operand.
"""

import re
import time
from collections.abc import Callable, Iterator

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from blindtune.errors import VerificationError
from blindtune.protocol.operands import Operand
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Residues
from blindtune.server.admission.refusals import Refusal
from blindtune.server.hooks import Multiplying
from blindtune.server.memory import available_bytes, is_out_of_memory
from blindtune.server.wire import Request

__all__ = ["WorkerMetrics", "rejection_reason"]

_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_WAITING_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
)
_PRODUCT_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# Errors that are no refusals, and how they are counted.
_NOT_RESIDUES, _OUT_OF_MEMORY, _INTERNAL = "not_residues", "out_of_memory", "internal_error"
_STALLED = "stalled"
# Of requests that were turned away before their header was read.
_UNKNOWN = "unknown"


def rejection_reason(error: Exception) -> str:
    """The label of an error: a refusal's class in lower case, ``over_limit`` say."""
    if isinstance(error, Refusal):
        return _reason_of(type(error))
    if isinstance(error, VerificationError):
        return _NOT_RESIDUES
    if is_out_of_memory(error):
        return _OUT_OF_MEMORY
    return _INTERNAL


class WorkerMetrics:
    """The figures of one worker.

    Args:
        capacity: how many requests may run at once.
        in_progress: how many are running now.
        waiting: how many wait for their turn.
        device: that holds the layers.
        build: what the worker is: version, model, and the like.

    Attributes:
        registry: all of them, for whoever shows them.
    """

    def __init__(
        self,
        capacity: int,
        in_progress: Callable[[], int],
        waiting: Callable[[], int],
        device: torch.device,
        build: dict[str, str],
    ) -> None:
        self.registry = registry = CollectorRegistry()
        kind = ["direction", "operand"]
        self._requests = Counter(
            "blindtune_worker_requests",
            "Requests that ended, by their gRPC status.",
            [*kind, "status"],
            registry=registry,
        )
        self._rows = Counter(
            "blindtune_worker_rows",
            "Rows of the operands of requests that were answered.",
            kind,
            registry=registry,
        )
        self._received = Counter(
            "blindtune_worker_received_bytes", "Bytes of the messages of requests.", registry=registry
        )
        self._sent = Counter(
            "blindtune_worker_sent_bytes", "Bytes of the messages of answers.", registry=registry
        )
        self._request_seconds = Histogram(
            "blindtune_worker_request_seconds",
            "Seconds from a request's arrival to the end of its answer, the network included.",
            kind,
            buckets=_REQUEST_SECONDS,
            registry=registry,
        )
        self._product_seconds = Histogram(
            "blindtune_worker_product_seconds",
            "Seconds in the multiplier for one block of rows, a seed's expansion included.",
            ["direction"],
            buckets=_PRODUCT_SECONDS,
            registry=registry,
        )
        self._waiting_seconds = Histogram(
            "blindtune_worker_waiting_seconds",
            "Seconds that requests waited for their turn.",
            buckets=_WAITING_SECONDS,
            registry=registry,
        )
        self._rejected = Counter(
            "blindtune_worker_rejected",
            "Requests that this worker turned away or could not finish.",
            ["reason"],
            registry=registry,
        )
        # A series that appears with its first increment hides that increment from rate().
        for reason in (*_refusals(Refusal), _NOT_RESIDUES, _OUT_OF_MEMORY, _INTERNAL, _STALLED):
            self._rejected.labels(reason)
        Gauge(
            "blindtune_worker_requests_in_progress", "Requests that are running.", registry=registry
        ).set_function(in_progress)
        Gauge(
            "blindtune_worker_requests_waiting", "Requests that wait for their turn.", registry=registry
        ).set_function(waiting)
        Gauge(
            "blindtune_worker_capacity", "Requests that may run at once; more wait.", registry=registry
        ).set(capacity)
        Info("blindtune_worker_build", "What this worker is.", registry=registry).info(build)
        self.registry.register(_Memory(device))
        ProcessCollector(registry=self.registry)

    def finished(
        self, request: Request | None, status: str, bytes_in: int, bytes_out: int, seconds: float
    ) -> None:
        """Counts a request that has ended.

        Args:
            request: its header, or None where none was read.
            status: name of its gRPC status.
            bytes_in, bytes_out: of its messages.
            seconds: from its arrival.
        """
        direction = operand = _UNKNOWN
        if request is not None:
            direction = request.product.direction.name.lower()
            operand = "rows" if request.seed is None else "seed"
        self._requests.labels(direction, operand, status).inc()
        self._received.inc(bytes_in)
        self._sent.inc(bytes_out)
        if request is not None:
            self._request_seconds.labels(direction, operand).observe(seconds)
            if status == "OK":
                self._rows.labels(direction, operand).inc(request.rows)

    def waited(self, seconds: float) -> None:
        """Counts a request whose turn has come."""
        self._waiting_seconds.observe(seconds)

    def rejected(self, error: Exception) -> None:
        """Counts why a request was not answered."""
        self._rejected.labels(rejection_reason(error)).inc()

    def stalled(self) -> None:
        """Counts a request that was ended since its client kept it waiting."""
        self._rejected.labels(_STALLED).inc()

    def timed(self, multiplier: Multiplying) -> Multiplying:
        """The same multiplier, with its time measured."""
        return _Timed(multiplier, self._product_seconds)


class _Timed:
    def __init__(self, multiplier: Multiplying, seconds: Histogram) -> None:
        self._multiplier = multiplier
        self._seconds = seconds

    def outputs(self, product: Product) -> int:
        return self._multiplier.outputs(product)

    def multiply(self, product: Product, operand: Operand, parameters: ParameterSet) -> Residues:
        started = time.perf_counter()
        result = self._multiplier.multiply(product, operand, parameters)
        self._seconds.labels(product.direction.name.lower()).observe(time.perf_counter() - started)
        return result


class _Memory(Collector):
    """Memory when it is asked for: what is left of the machine's, and the GPU's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def describe(self) -> Iterator[Metric]:
        return self._families(measure=False)

    def collect(self) -> Iterator[Metric]:
        return self._families(measure=True)

    def _families(self, measure: bool) -> Iterator[Metric]:
        left = GaugeMetricFamily(
            "blindtune_worker_memory_available_bytes",
            "Memory of the machine, or left under the container's limit, that can still be taken.",
        )
        if measure:
            left.add_metric([], available_bytes(torch.device("cpu")))
        yield left
        free, total, reserved = (
            GaugeMetricFamily(f"blindtune_worker_device_memory_{what}_bytes", text, labels=["device"])
            for what, text in (
                ("free", "Memory of the GPU that nobody has taken."),
                ("total", "Memory of the GPU."),
                ("reserved", "Memory of the GPU that this worker has taken for tensors."),
            )
        )
        if measure and self._device.type == "cuda":
            name = [str(self._device)]
            free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
            free.add_metric(name, free_bytes)
            total.add_metric(name, total_bytes)
            reserved.add_metric(name, torch.cuda.memory_reserved(self._device))
        yield from (free, total, reserved)


def _reason_of(refusal: type[Refusal]) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", refusal.__name__).lower()


def _refusals(base: type[Refusal]) -> Iterator[str]:
    for refusal in base.__subclasses__():
        yield _reason_of(refusal)
        yield from _refusals(refusal)
