"""The two calls of the contract: the manifest, and the one verb."""

import logging
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from urllib.parse import unquote

import grpc
import torch

from blindtune.proto import MAX_MESSAGE_BYTES, PROTOCOL_VERSION, worker_pb2, worker_pb2_grpc
from blindtune.protocol.errors import VerificationError
from blindtune.protocol.expansion import Seed
from blindtune.protocol.parameters import PARAMETER_SETS
from blindtune.protocol.residues import Residues
from blindtune.protocol.weights import SCHEME
from blindtune.server.gate import Gate
from blindtune.server.hooks import Multiplying, Observer
from blindtune.server.limits import Limits
from blindtune.server.refusals import Refusal
from blindtune.server.rows import block_rows, expanded_blocks, received_blocks, response_messages
from blindtune.server.store import LayerStore
from blindtune.server.wire import Request, parse_header

__all__ = ["WorkerService", "software_version"]

_logger = logging.getLogger(__name__)
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def software_version() -> str:
    """The installed version of Blindtune."""
    try:
        return version("blindtune")
    except PackageNotFoundError:
        return "unknown"


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Serves products of a store's layers. Keeps nothing between requests.

    Args:
        store: the layers.
        limits: on one request.
        gate: lets requests in.
        multiplier: the store's own unless given.
        observer: shown every operand, if given.
    """

    def __init__(
        self,
        store: LayerStore,
        limits: Limits,
        gate: Gate,
        multiplier: Multiplying | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._store = store
        self._limits = limits
        self._gate = gate
        self._multiplier: Multiplying = multiplier or store.multiplier()
        self._observer = observer
        self._manifest = _manifest(store, limits)

    def GetManifest(
        self, request: worker_pb2.GetManifestRequest, context: grpc.ServicerContext
    ) -> worker_pb2.Manifest:
        return self._manifest

    def Multiply(
        self, request_iterator: Iterable[worker_pb2.MultiplyRequest], context: grpc.ServicerContext
    ) -> Iterator[worker_pb2.MultiplyResponse]:
        call = _Call(context)
        try:
            with self._gate.admit():
                for response in self._answer(call, call.incoming(request_iterator)):
                    call.bytes_out += response.ByteSize()
                    yield response
            call.status = grpc.StatusCode.OK
        except Exception as error:
            if not context.is_active():
                return  # the client is gone, and the error says no more than that
            call.status, message = _status_of(error)
            if call.status is grpc.StatusCode.INTERNAL:
                _logger.exception("a request failed", extra={"request_id": call.request_id})
                message = f"internal error of this worker, request {call.request_id} in its log"
            context.abort(call.status, message)
        finally:
            _logger.info("multiply", extra=call.fields())

    def _answer(
        self, call: "_Call", messages: Iterator[worker_pb2.MultiplyRequest]
    ) -> Iterator[worker_pb2.MultiplyResponse]:
        request = parse_header(next(messages, None), self._store, self._limits, self._multiplier.outputs)
        call.request = request
        size = block_rows(request)
        if request.seed is None:
            blocks = received_blocks(messages, request, size)
        else:
            self._observe(request, request.seed)
            blocks = expanded_blocks(messages, request, request.seed, size)
        for block in blocks:
            if request.seed is None:
                self._observe(request, block)
            yield from response_messages(self._multiplier.multiply(request.product, block))

    def _observe(self, request: Request, part: Residues | Seed) -> None:
        if self._observer is not None:
            self._observer.operand(request, part)


class _Call:
    """What is logged of one request: its metadata, and never its operand."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        given = dict(context.invocation_metadata() or ()).get("x-request-id")
        if not isinstance(given, str) or not _REQUEST_ID.fullmatch(given):
            given = uuid.uuid4().hex
        self.request_id = given
        self.peer = unquote(context.peer())
        self.request: Request | None = None
        self.bytes_in = 0
        self.bytes_out = 0
        # Stands when the client goes away before the answer is complete.
        self.status = grpc.StatusCode.CANCELLED
        self._started = time.perf_counter()

    def incoming(
        self, messages: Iterable[worker_pb2.MultiplyRequest]
    ) -> Iterator[worker_pb2.MultiplyRequest]:
        """Passes messages on and counts their bytes."""
        for message in messages:
            self.bytes_in += message.ByteSize()
            yield message

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
            **known,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "seconds": round(time.perf_counter() - self._started, 6),
            "status": self.status.name,
        }


def _status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    if isinstance(error, Refusal):
        return error.code, str(error)
    if isinstance(error, VerificationError):
        return grpc.StatusCode.INVALID_ARGUMENT, str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return grpc.StatusCode.RESOURCE_EXHAUSTED, "this worker ran out of memory: send fewer rows"
    return grpc.StatusCode.INTERNAL, ""


def _manifest(store: LayerStore, limits: Limits) -> worker_pb2.Manifest:
    return worker_pb2.Manifest(
        protocol_versions=[PROTOCOL_VERSION],
        software_version=software_version(),
        model=store.model,
        revision=store.revision,
        scheme=SCHEME,
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
        product_method=store.method.name,
    )
