"""Workers without a network or a process: what a client is tested with where only the client matters."""

import heapq
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np
from numpy.typing import NDArray

from blindtune.checkpoint import Checkpoint
from blindtune.client.kit.kit import Kit
from blindtune.client.operators.decisions import Failure
from blindtune.client.operators.manifest import Expectations
from blindtune.client.operators.messages import WorkRequest
from blindtune.client.operators.operator import OperatorClient
from blindtune.client.operators.transport import StopRequest, Transport, TransportError
from blindtune.client.rounds.multiplier import RemoteMultiplier
from blindtune.errors import VerificationError
from blindtune.proto import MAX_MESSAGE_BYTES, PROTOCOL_VERSION, worker_pb2
from blindtune.protocol.certificate.history import REASKS
from blindtune.protocol.masks import MaskSource
from blindtune.protocol.multiplication.exactness import exact_method
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import PARAMETER_SETS, Q31
from blindtune.protocol.shares.source import ShareSource
from blindtune.protocol.weights import INT8
from blindtune.server.admission.limits import Limits
from blindtune.server.hooks import Multiplying

__all__ = ["LocalWorker", "VirtualTime", "honest_multiplier", "manifest_of", "remote_multiplier"]


class VirtualTime:
    """A clock that moves when somebody sleeps, who also makes the calls that are due meanwhile."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._lock = threading.RLock()
        self._calls: list[tuple[float, int, list[Callable[[], None]]]] = []
        self._numbers = count()

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            with self._lock:
                if not self._calls or self._calls[0][0] > end:
                    self.now = max(self.now, end)
                    return
                due, _, functions = heapq.heappop(self._calls)
                self.now = max(self.now, due)
            for function in functions:
                function()

    def later(self, seconds: float, function: Callable[[], None]) -> Callable[[], None]:
        functions = [function]
        with self._lock:
            heapq.heappush(self._calls, (self.now + seconds, next(self._numbers), functions))
        return functions.clear


def honest_multiplier(checkpoint: Checkpoint) -> Multiplier:
    """What a worker of this checkpoint multiplies with."""
    with checkpoint.reader() as reader:
        layers = {layer.name: reader.read(layer).integers for layer in checkpoint.layers}
    lengths = {min(n, 32_768) for layer in layers.values() for n in layer.shape}
    lengths |= {n % 32_768 for layer in layers.values() for n in layer.shape} - {0}
    return Multiplier(layers, *(exact_method(lengths, x) for x in PARAMETER_SETS.values()))


def manifest_of(kit: Kit, limits: Limits | None = None) -> worker_pb2.Manifest:
    """The manifest of a worker that serves what a kit is for."""
    limits = limits or Limits()
    return worker_pb2.Manifest(
        protocol_versions=[PROTOCOL_VERSION],
        model=kit.description.model,
        scheme=INT8.identifier,
        fingerprint=kit.description.fingerprint,
        layers=[
            worker_pb2.Layer(
                name=name,
                out_features=layer.out_features,
                in_features=layer.in_features,
                fingerprint=layer.fingerprint,
            )
            for name, layer in kit.layers.items()
        ],
        parameter_sets=list(PARAMETER_SETS),
        limits=worker_pb2.Limits(
            max_rows=limits.max_rows,
            max_operand_bytes=limits.max_operand_bytes,
            max_message_bytes=MAX_MESSAGE_BYTES,
        ),
    )


@dataclass
class LocalWorker(Transport):
    """Multiplies in this process, and remembers what it was asked.

    Attributes:
        multiplier: multiplies, or lies.
        stated: its manifest; None if it does not answer.
        failures: what the next requests fail with; each is used once.
        before: called with each request before it is answered.
        requests: all that arrived.
    """

    multiplier: Multiplying
    stated: worker_pb2.Manifest | None = None
    failures: list[Exception] = field(default_factory=list)
    before: Callable[[WorkRequest], None] = lambda request: None
    requests: list[WorkRequest] = field(default_factory=list)
    closed: bool = False

    def manifest(self, timeout: float) -> worker_pb2.Manifest:
        if self.stated is None:
            raise TransportError(Failure.UNREACHABLE, "UNAVAILABLE: nobody is there")
        return self.stated

    def multiply(
        self,
        request: WorkRequest,
        timeout: float,
        answer: NDArray[np.uint32],
        stop: StopRequest | None = None,
    ) -> Generator[int, None, None]:
        self.requests.append(request)
        self.before(request)
        if self.failures:
            raise self.failures.pop(0)
        share = request.share
        operand = share.residues if share.seed is None else share.seed.expand(*share.residues.shape)
        product = self.multiplier.multiply(request.product, operand, PARAMETER_SETS[request.parameter_set])
        if product.shape != answer.shape:
            raise VerificationError("the response has another size")
        answer[:] = product
        yield len(answer)

    def close(self) -> None:
        self.closed = True


def remote_multiplier(
    kit: Kit,
    workers: Sequence[Sequence[Transport]],
    retry_seconds: float = 60.0,
    ask_ahead: bool = False,
    source: MaskSource | None = None,
    most_reasks: int = REASKS,
) -> RemoteMultiplier:
    """A multiplier whose operators, alpha, beta, ..., have these workers; with shares, or another source."""
    time = VirtualTime()
    expected = Expectations(
        model=kit.description.model,
        fingerprint=kit.description.fingerprint,
        parameter_set=Q31.name,
        layers={name: layer.fingerprint for name, layer in kit.layers.items()},
    )
    operators = []
    for index, transports in enumerate(workers):
        name = ("alpha", "beta", "gamma", "delta")[index]
        addresses = [(f"{name}-{i}:7100", transport) for i, transport in enumerate(transports)]
        operators.append(
            OperatorClient(
                index,
                name,
                addresses,
                expected,
                retry_seconds,
                60.0,
                clock=time.clock,
                sleep=time.sleep,
                later=time.later,
            )
        )
    source = source or ShareSource(len(operators), Q31)
    return RemoteMultiplier(source, operators, kit, ask_ahead=ask_ahead, most_reasks=most_reasks)
