"""A multiplication as it travels: the messages of a request, and the answer put together from messages.

Messages are bytes, and nothing here knows a network, so that whatever carries them, gRPC or a simulation,
they are the same.
"""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blindtune.errors import VerificationError
from blindtune.proto import PROTOCOL_VERSION, worker_pb2
from blindtune.proto.rows import REQUEST_ROWS, RESPONSE_ROWS
from blindtune.protocol.masks import Share
from blindtune.protocol.parameters import PARAMETER_SETS, ParameterSet
from blindtune.protocol.products import Product
from blindtune.protocol.wire_words import to_residues, to_words

__all__ = ["CHUNK_BYTES", "WorkRequest", "read_rows", "request_messages"]

CHUNK_BYTES = 1 << 20
"""Rows of a message have at most so many bytes, unless a single row has more.

grpcio's price is for each message as much as for each byte. Larger ones would take the slowest clients that a
worker bears with longer than its patience, which sees a message only when all of it is there.
"""


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
        rows, columns = self.share.shape
        if self.share.seed is not None:
            return len(self.share.seed.key)
        return self.parameters.word_bytes * rows * columns

    @property
    def parameters(self) -> ParameterSet:
        """The parameter set of that name."""
        return PARAMETER_SETS[self.parameter_set]


def request_messages(request: WorkRequest) -> Iterator[bytes]:
    """The header, and after it the operand's rows unless a seed stands for them."""
    rows, columns = request.share.shape
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
    yield worker_pb2.MultiplyRequest(header=header).SerializeToString()
    if seed is None:
        step = max(1, CHUNK_BYTES // (request.parameters.word_bytes * columns))
        for start in range(0, rows, step):
            block = request.share.residues[start : start + step]
            yield REQUEST_ROWS.message(to_words(block, request.parameters))


def read_rows(
    request: WorkRequest, messages: Iterable[bytes], answer: NDArray[np.uint32]
) -> Generator[int, None, None]:
    """Reads a worker's answer, of the right shape and otherwise unverified.

    Args:
        request: what was asked.
        messages: of the answer, as they arrive.
        answer: uint32 [rows, outputs], in C order, where the rows go.

    Yields:
        After each message, how many of the rows are there.

    Raises:
        VerificationError: the answer has another size. It says so as soon as there is too much of it, and at
            a message without whole rows, since of such there could be any number.
        google.protobuf.message.DecodeError: bytes are no message.
    """
    row_bytes, filled = request.parameters.word_bytes * request.outputs, 0
    for message in messages:
        chunk = RESPONSE_ROWS.rows(message)
        if chunk is None:
            chunk = memoryview(worker_pb2.MultiplyResponse.FromString(message).residues)
        if not chunk or len(chunk) % row_bytes:
            raise VerificationError(
                f"a message of the response has {len(chunk)} bytes, which are no whole rows of "
                f"{row_bytes} bytes"
            )
        rows = len(chunk) // row_bytes
        if filled + rows > len(answer):
            raise VerificationError(f"the response is longer than {row_bytes * len(answer)} bytes")
        to_residues(chunk, answer[filled : filled + rows], request.parameters)
        filled += rows
        yield filled
    if filled != len(answer):
        raise VerificationError(f"the response has {row_bytes * filled} bytes, not {row_bytes * len(answer)}")
