"""What the header of a multiplication must say before anything is computed."""

from collections.abc import Callable
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from blindtune.proto import MAX_MESSAGE_BYTES, PROTOCOL_VERSION, worker_pb2
from blindtune.protocol.expansion import Seed
from blindtune.protocol.parameters import PARAMETER_SETS, ParameterSet
from blindtune.protocol.products import Direction, Product, Span
from blindtune.server.admission.limits import Limits
from blindtune.server.admission.refusals import LayerNotHeld, MalformedRequest, OtherContract, OverLimit
from blindtune.server.store import LayerStore

__all__ = ["Request", "decoded", "parse_header"]

# A layer group has a handful of members; without a bound a header could name a hundred thousand.
_MAX_SPANS = 64
_MESSAGE_OVERHEAD = 64


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Request:
    """A multiplication that this worker can do.

    Attributes:
        product: the matrix.
        rows, columns: shape of the operand.
        outputs: columns of the result.
        parameters: of the residues.
        seed: what the operand is expanded from, or None when its rows follow.
    """

    product: Product
    rows: int
    columns: int
    outputs: int
    parameters: ParameterSet
    seed: Seed | None = field(repr=False)

    @property
    def operand_bytes(self) -> int:
        """Of the rows as they travel."""
        return self.parameters.word_bytes * self.rows * self.columns


def parse_header(
    message: bytes | None,
    store: LayerStore,
    limits: Limits,
    outputs_of: Callable[[Product], int],
) -> Request:
    """Reads and checks the first message of a request.

    Args:
        message: None when the stream ended before any message.
        store: the layers that are held.
        limits: on one request.
        outputs_of: columns of a product's result; raises ValueError if the spans do not fit.

    Raises:
        MalformedRequest: the header breaks the contract.
        LayerNotHeld: it names a layer that is not held.
        OtherContract: it means another model, protocol version or parameter set.
        OverLimit: the operand, or a row of the result, is too large.
    """
    first = decoded(message or b"")
    if first.WhichOneof("part") != "header":
        raise MalformedRequest("the first message of a request must be its header")
    header = first.header
    parameters = _same_contract(header, store)
    product = _product(header.product, store)
    try:
        outputs = outputs_of(product)
    except ValueError as error:
        raise MalformedRequest(str(error)) from error
    if header.columns != product.contraction:
        raise MalformedRequest(
            f"the operand has {header.columns} columns, but the product takes {product.contraction}"
        )
    _require_within_limits(header.rows, header.columns, outputs, parameters, limits)
    return Request(product, header.rows, header.columns, outputs, parameters, _seed(header, parameters))


def decoded(message: bytes) -> worker_pb2.MultiplyRequest:
    """A message of a request. What can't be decoded is an empty one, which is refused like any other."""
    try:
        return worker_pb2.MultiplyRequest.FromString(message)
    except DecodeError:
        return worker_pb2.MultiplyRequest()


def _same_contract(header: worker_pb2.MultiplyHeader, store: LayerStore) -> ParameterSet:
    """The parameter set that the client means."""
    if header.protocol_version != PROTOCOL_VERSION:
        older = "client" if header.protocol_version < PROTOCOL_VERSION else "worker"
        raise OtherContract(
            f"the client speaks protocol version {header.protocol_version} and this worker "
            f"{PROTOCOL_VERSION}: upgrade the {older}"
        )
    if header.fingerprint != store.fingerprint:
        raise OtherContract(
            f"this worker serves {store.model} with fingerprint {store.fingerprint}, but the client "
            f"means {_shown(header.fingerprint)}: give both the same checkpoint and revision"
        )
    if header.parameter_set not in PARAMETER_SETS:
        raise OtherContract(
            f"this worker does not know the parameter set {_shown(header.parameter_set)}: choose one "
            f"of {', '.join(PARAMETER_SETS)} in the client, or upgrade the worker"
        )
    return PARAMETER_SETS[header.parameter_set]


def _product(message: worker_pb2.Product, store: LayerStore) -> Product:
    try:
        direction = Direction(message.direction)
    except ValueError:
        raise MalformedRequest(f"{message.direction} is no direction of a product") from None
    if not message.spans:
        raise MalformedRequest("the product names no layers")
    if len(message.spans) > _MAX_SPANS:
        raise OverLimit(f"the product has {len(message.spans)} spans, more than {_MAX_SPANS}")
    for span in message.spans:
        if span.layer not in store.layers:
            raise LayerNotHeld(f"this worker does not hold a layer {_shown(span.layer)}")
        # Libraries choose their kernels by shape, so only lengths whose products were compared with
        # exact integers are served. They are those that `protocol.products` cuts layers into.
        if span.stop - span.start not in store.contractions:
            raise MalformedRequest(
                f"{span.start}:{span.stop} is none of the spans that layer {span.layer} is cut into"
            )
    try:
        return Product(direction, tuple(Span(s.layer, s.start, s.stop) for s in message.spans))
    except ValueError as error:
        raise MalformedRequest(str(error)) from None


def _require_within_limits(
    rows: int, columns: int, outputs: int, parameters: ParameterSet, limits: Limits
) -> None:
    if not rows:
        raise MalformedRequest("the operand has no rows")
    if rows > limits.max_rows:
        raise OverLimit(f"the operand has {rows} rows, more than this worker's limit {limits.max_rows}")
    size = rows * columns * parameters.word_bytes
    if size > limits.max_operand_bytes:
        raise OverLimit(
            f"an operand of {rows} x {columns} residues has {size} bytes, more than this "
            f"worker's limit {limits.max_operand_bytes}"
        )
    if outputs * parameters.word_bytes > MAX_MESSAGE_BYTES - _MESSAGE_OVERHEAD:
        raise OverLimit(
            f"one row of the result has {outputs} words, which do not fit into a message of "
            f"{MAX_MESSAGE_BYTES} bytes: ask for fewer layers at once"
        )


def _seed(header: worker_pb2.MultiplyHeader, parameters: ParameterSet) -> Seed | None:
    if not header.HasField("seed"):
        return None
    try:
        seed = Seed(header.seed.key, parameters, header.seed.row_offset)
    except ValueError as error:
        raise MalformedRequest(str(error)) from error
    if seed.row_offset + header.rows > 1 << 63:
        raise MalformedRequest("the rows of a seed end at 2^63")
    return seed


def _shown(text: str) -> str:
    """A name out of a request as it may appear in a message: quoted, on one line, not endless."""
    return repr(text if len(text) <= 100 else text[:97] + "...")
