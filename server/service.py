"""The two calls of the contract: the manifest, and the one verb."""

import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import unquote

import grpc

from blindtune.common.blocks import block_rows
from blindtune.errors import VerificationError
from blindtune.proto import MAX_MESSAGE_BYTES, PROTOCOL_VERSION, worker_pb2
from blindtune.protocol.expansion import Seed
from blindtune.protocol.operands import Operand, SeededRows
from blindtune.protocol.parameters import PARAMETER_SETS
from blindtune.protocol.residues import Residues
from blindtune.server.admission.identity import Identify, by_certificate
from blindtune.server.admission.limits import Limits
from blindtune.server.admission.places import LeftError, Places
from blindtune.server.admission.refusals import Refusal
from blindtune.server.admission.turns import TurnsOfConnections
from blindtune.server.admission.watchdog import Watchdog
from blindtune.server.hooks import Multiplying, Observer
from blindtune.server.memory import give_back_cache, is_out_of_memory
from blindtune.server.metrics import WorkerMetrics
from blindtune.server.rows import expanded_blocks, received_blocks, response_messages
from blindtune.server.store import LayerStore
from blindtune.server.version import software_version
from blindtune.server.wire import Request, parse_header

__all__ = ["SERVICE_NAME", "WorkerService"]

_logger = logging.getLogger(__name__)
SERVICE_NAME: str = worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class WorkerService:
    """Serves products of a store's layers. Keeps nothing between requests.

    `Multiply` takes and gives messages as bytes: they are read and written without protobuf's copies.

    Args:
        store: the layers.
        limits: on one request.
        places: where requests run and wait.
        multiplier: the store's own unless given.
        observer: shown every operand, if given.
        metrics: counts requests, if given.
        identify: names the client of a request.
        watchdog: cancels requests of clients that stall, if somebody sweeps it.
        clock: monotonic seconds, for the log.
        turns: order of the answers that share a connection.
    """

    def __init__(
        self,
        store: LayerStore,
        limits: Limits,
        places: Places,
        multiplier: Multiplying | None = None,
        observer: Observer | None = None,
        metrics: WorkerMetrics | None = None,
        *,
        identify: Identify = by_certificate,
        watchdog: Watchdog | None = None,
        clock: Callable[[], float] = time.perf_counter,
        turns: TurnsOfConnections | None = None,
    ) -> None:
        self._store = store
        self._limits = limits
        self._places = places
        self._multiplier: Multiplying = multiplier or store.multiplier()
        self._observer = observer
        self._metrics = metrics
        self._identify = identify
        self._watchdog = watchdog or Watchdog(limits.patience_seconds, limits.min_bytes_per_second)
        self._clock = clock
        self._manifest = _manifest(store, limits)
        self._turns = turns or TurnsOfConnections()

    def add_to(self, server: grpc.Server) -> None:
        """Lets a server serve it."""
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "GetManifest": grpc.unary_unary_rpc_method_handler(
                self.GetManifest,
                worker_pb2.GetManifestRequest.FromString,
                worker_pb2.Manifest.SerializeToString,
            ),
            "Multiply": grpc.stream_stream_rpc_method_handler(self.Multiply),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, methods),))

    def GetManifest(
        self, request: worker_pb2.GetManifestRequest, context: grpc.ServicerContext
    ) -> worker_pb2.Manifest:
        try:
            self._places.count(self._identify(context))
        except Refusal as refusal:
            if self._metrics is not None:
                self._metrics.rejected(refusal)
            context.abort(refusal.code, str(refusal))
        return self._manifest

    def Multiply(self, request_iterator: Iterable[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        call = _Call(context, self._clock)
        try:
            call.client = self._identify(context)
            with (
                self._places.place(call.client, context.time_remaining()) as place,
                self._watchdog.watch(call.stall) as patience,
            ):
                if not context.add_callback(place.leave):
                    raise LeftError
                place.hurried_by(patience.hurry)
                messages = call.incoming(patience.incoming(request_iterator))
                request = parse_header(
                    next(messages, None), self._store, self._limits, self._multiplier.outputs
                )
                call.request = request
                place.line_up(_work(request), 0 if request.seed else request.operand_bytes)
                # At once, since the answer may be long in coming: the client need not take this for silence.
                context.send_initial_metadata(())
                place.wait_for_turn()
                with place.running(patience, _block_bytes(request)):
                    yield from patience.outgoing(call.outgoing(self._answer(call, request, messages)))
            call.status = grpc.StatusCode.OK
        except Exception as error:
            if call.is_over() or isinstance(error, LeftError):
                return  # the client is gone, and the error says no more than that
            call.status, message = _status_of(error)
            if self._metrics is not None:
                self._metrics.rejected(error)
            if call.status is grpc.StatusCode.INTERNAL:
                _logger.exception("a request failed", extra={"request_id": call.request_id})
                message = f"internal error of this worker, request {call.request_id} in its log"
            context.abort(call.status, message)
        finally:
            _logger.info("multiply", extra=call.fields())
            if self._metrics is not None:
                call.count(self._metrics)

    def _answer(self, call: "_Call", request: Request, messages: Iterator[bytes]) -> Iterator[bytes]:
        size = block_rows(request.columns, request.outputs)
        blocks: Iterator[Operand]
        if request.seed is None:
            blocks = received_blocks(messages, request, size)
        else:
            self._observe(request, request.seed)
            blocks = expanded_blocks(messages, request, request.seed, size)
        turns = self._turns.of(call.peer)
        left = request.parameters.word_bytes * request.rows * request.outputs
        for block in blocks:
            if not isinstance(block, SeededRows):
                self._observe(request, block)
            for result in self._results(call, request, block):
                yield from turns.in_turn(response_messages(result, request.parameters), left)
                left -= request.parameters.word_bytes * result.size

    def _results(self, call: "_Call", request: Request, block: Operand) -> Iterator[Residues]:
        """The product of a block, in parts that memory suffices for.

        Raises:
            MemoryError: it does not even suffice for one row.
            LeftError: nobody waits for them any more.
        """
        start = 0
        while start < len(block):
            # A client that has gone is noticed between parts: nothing is computed for nobody.
            if call.is_over():
                raise LeftError
            rows = min(call.rows_at_once, len(block) - start)
            result = self._multiply_if_it_fits(request, block[start : start + rows])
            if result is not None:
                start += rows
                yield result
            elif rows > 1:
                call.rows_at_once = rows // 2
                give_back_cache()
                _logger.warning(
                    "out of memory, going on with fewer rows at once",
                    extra={"request_id": call.request_id, "rows": call.rows_at_once},
                )
            else:
                give_back_cache()
                raise MemoryError

    def _multiply_if_it_fits(self, request: Request, operand: Operand) -> Residues | None:
        try:
            return self._multiplier.multiply(request.product, operand, request.parameters)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # The error's traceback holds all that was allocated until then; it ends with this function.
            return None

    def _observe(self, request: Request, part: Residues | Seed) -> None:
        if self._observer is not None:
            self._observer.operand(request, part)


class _Call:
    """What is logged of one request: its metadata, and never its operand."""

    def __init__(self, context: grpc.ServicerContext, clock: Callable[[], float]) -> None:
        given = dict(context.invocation_metadata() or ()).get("x-request-id")
        if not isinstance(given, str) or not _REQUEST_ID.fullmatch(given):
            given = uuid.uuid4().hex
        self.request_id = given
        self.context = context
        self.peer = unquote(context.peer())
        self.client = ""
        self.stalled = False
        self.request: Request | None = None
        self.rows_at_once = 1 << 30
        self.bytes_in = 0
        self.bytes_out = 0
        # Stands when the client goes away before the answer is complete.
        self.status = grpc.StatusCode.CANCELLED
        self._clock = clock
        self._started = clock()

    def incoming(self, messages: Iterable[bytes]) -> Iterator[bytes]:
        """Passes messages on and counts their bytes."""
        for message in messages:
            self.bytes_in += len(message)
            yield message

    def outgoing(self, messages: Iterable[bytes]) -> Iterator[bytes]:
        """The same for messages to the client."""
        for message in messages:
            self.bytes_out += len(message)
            yield message

    def is_over(self) -> bool:
        """Whether nobody waits for an answer any more."""
        # A call that was cancelled can look for a moment as if its messages had just come to an end.
        return self.stalled or not self.context.is_active()

    def stall(self) -> None:
        """Ends the call, from another thread: its client kept it waiting for too long."""
        self.stalled = True
        self.context.cancel()

    def count(self, metrics: WorkerMetrics) -> None:
        """Adds the request to the worker's figures."""
        seconds = self._clock() - self._started
        metrics.finished(self.request, self.status.name, self.bytes_in, self.bytes_out, seconds)
        if self.stalled:
            metrics.stalled()

    def fields(self) -> dict[str, object]:
        """The fields of the request's log line."""
        request = self.request
        known: dict[str, object] = {}
        if request is not None:
            known = {
                "direction": request.product.direction.name.lower(),
                "layers": len(request.product.spans),
                "rows": request.rows,
                "columns": request.columns,
                "operand": "rows" if request.seed is None else "seed",
            }
        return {
            "request_id": self.request_id,
            "peer": self.peer,
            "client": self.client,
            **known,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "seconds": round(self._clock() - self._started, 6),
            "status": self.status.name,
            "stalled": self.stalled,
        }


def _block_bytes(request: Request) -> int:
    """What a block of its operand and of its answer take."""
    return (
        4
        * min(request.rows, block_rows(request.columns, request.outputs))
        * (request.columns + request.outputs)
    )


def _work(request: Request) -> int:
    """Multiplications of two numbers."""
    return request.rows * request.columns * request.outputs


def _status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    if isinstance(error, Refusal):
        return error.code, str(error)
    if isinstance(error, VerificationError):
        return grpc.StatusCode.INVALID_ARGUMENT, str(error)
    if is_out_of_memory(error):
        return grpc.StatusCode.RESOURCE_EXHAUSTED, "this worker ran out of memory: send fewer rows"
    return grpc.StatusCode.INTERNAL, ""


def _manifest(store: LayerStore, limits: Limits) -> worker_pb2.Manifest:
    return worker_pb2.Manifest(
        protocol_versions=[PROTOCOL_VERSION],
        software_version=software_version(),
        model=store.model,
        revision=store.revision,
        scheme=store.scheme.identifier,
        fingerprint=store.fingerprint,
        layers=[
            worker_pb2.Layer(
                name=name,
                out_features=layer.out_features,
                in_features=layer.in_features,
                fingerprint=layer.fingerprint,
            )
            for name, layer in store.layers.items()
        ],
        parameter_sets=list(PARAMETER_SETS),
        limits=worker_pb2.Limits(
            max_rows=limits.max_rows,
            max_operand_bytes=limits.max_operand_bytes,
            max_message_bytes=MAX_MESSAGE_BYTES,
        ),
        product_method=store.product_method,
        acknowledges=True,
    )
