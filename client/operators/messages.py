"""A multiplication as it travels: the messages of a request, and the answer put together from messages.

Without a network, so that whatever carries the messages, gRPC or a simulation, they are the same.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blindtune.proto import PROTOCOL_VERSION, worker_pb2
from blindtune.protocol.errors import VerificationError
from blindtune.protocol.masks import Share
from blindtune.protocol.products import Product

__all__ = ["WorkRequest", "read_answer", "request_messages"]

_CHUNK_BYTES = 1 << 18


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
        return self.share.residues.nbytes if self.share.seed is None else len(self.share.seed.key)


def request_messages(request: WorkRequest) -> Iterator[worker_pb2.MultiplyRequest]:
    """The header, and after it the operand's rows unless a seed stands for them."""
    rows, columns = request.share.residues.shape
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
    yield worker_pb2.MultiplyRequest(header=header)
    if seed is None:
        step = max(1, _CHUNK_BYTES // (4 * columns))
        for start in range(0, rows, step):
            block = request.share.residues[start : start + step]
            yield worker_pb2.MultiplyRequest(residues=block.tobytes())


def read_answer(request: WorkRequest, messages: Iterable[worker_pb2.MultiplyResponse]) -> NDArray[np.uint32]:
    """A worker's answer, of the right shape and otherwise unverified.

    Raises:
        VerificationError: the answer has another size. It says so as soon as there is too much of it, and at
            a message without whole rows, since of such there could be any number.
    """
    rows = request.share.residues.shape[0]
    answer = np.empty((rows, request.outputs), np.uint32)
    filled, target = 0, answer.data.cast("B")
    for message in messages:
        chunk = message.residues
        if not chunk or len(chunk) % (4 * request.outputs):
            raise VerificationError(
                f"a message of the response has {len(chunk)} bytes, which are no whole rows of "
                f"{4 * request.outputs} bytes"
            )
        if filled + len(chunk) > len(target):
            raise VerificationError(f"the response is longer than {len(target)} bytes")
        target[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    if filled != len(target):
        raise VerificationError(f"the response has {filled} bytes, not {len(target)}")
    return answer
