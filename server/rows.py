"""Operands coming in and results going out, a block of rows at a time.

Rows are independent, so a request's memory is bounded by its blocks and not by its length, and the
first rows of a result leave while the last rows of the operand are still on their way.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from blindtune.checkpoint import FrozenLayer
from blindtune.proto import worker_pb2
from blindtune.protocol.expansion import Seed
from blindtune.protocol.residues import Residues, require_residues
from blindtune.server.limits import Limits
from blindtune.server.refusals import MalformedRequest
from blindtune.server.wire import Request

__all__ = ["block_rows", "expanded_blocks", "received_blocks", "response_messages", "workspace_bytes"]

# A block of E elements takes about 32 E bytes while it is multiplied: operand, limbs, int32 sums, result.
_BYTES_OF_AN_ELEMENT = 32
_BLOCK_ELEMENTS = 8 << 20
_MOST_BLOCK_ROWS = 1024
_CHUNK_BYTES = 256 << 10


def block_rows(request: Request) -> int:
    """How many rows of a request are multiplied at once."""
    return max(1, min(_MOST_BLOCK_ROWS, _BLOCK_ELEMENTS // max(request.columns, request.outputs)))


def workspace_bytes(layers: Iterable[FrozenLayer], limits: Limits) -> int:
    """Bytes that blocks take, if as many requests as may run are all in the middle of their largest.

    No more than for a product of all layers, which is wider than any that can be asked for.
    """
    widest = sum(layer.out_features + layer.in_features for layer in layers)
    elements = min(_BLOCK_ELEMENTS, min(_MOST_BLOCK_ROWS, limits.max_rows) * widest)
    return limits.max_concurrent * elements * _BYTES_OF_AN_ELEMENT


def received_blocks(
    messages: Iterator[worker_pb2.MultiplyRequest], request: Request, size: int
) -> Iterator[Residues]:
    """The operand's rows as they arrive, in blocks of ``size`` (the last may be shorter).

    Every word of a block has been checked to be a residue. The last block appears only after the
    stream has ended with the announced number of rows.

    Raises:
        MalformedRequest: a message holds no whole rows, or there are more or fewer than announced.
        VerificationError: a word is no residue.
    """
    remaining = request.rows
    block = np.empty((min(size, remaining), request.columns), np.uint32)
    filled = 0
    for message in messages:
        chunk = _chunk(message, request.columns)
        if len(chunk) > remaining:
            raise MalformedRequest(f"more rows arrived than the {request.rows} announced")
        remaining -= len(chunk)
        while len(chunk):
            if filled == len(block):
                require_residues(block, "the operand")
                yield block
                block = np.empty((min(size, remaining + len(chunk)), request.columns), np.uint32)
                filled = 0
            taken = chunk[: len(block) - filled]
            block[filled : filled + len(taken)] = taken
            filled += len(taken)
            chunk = chunk[len(taken) :]
    if remaining:
        raise MalformedRequest(f"the stream ended after {request.rows - remaining} of {request.rows} rows")
    require_residues(block, "the operand")
    yield block


def _chunk(message: worker_pb2.MultiplyRequest, columns: int) -> NDArray[np.uint32]:
    if message.WhichOneof("part") != "residues":
        raise MalformedRequest("after the header, every message must carry rows of the operand")
    data = message.residues
    if not data or len(data) % (4 * columns):
        raise MalformedRequest(
            f"a message carries {len(data)} bytes, which are no whole rows of {4 * columns} bytes"
        )
    return np.frombuffer(data, "<u4").reshape(-1, columns)


def expanded_blocks(
    messages: Iterator[worker_pb2.MultiplyRequest], request: Request, seed: Seed, size: int
) -> Iterator[Residues]:
    """The rows of a seed's expansion, in blocks of ``size`` (the last may be shorter).

    Raises:
        MalformedRequest: rows arrived as well.
    """
    for _ in messages:
        raise MalformedRequest("the operand is a seed, and yet more messages follow the header")
    for start in range(0, request.rows, size):
        rows = min(size, request.rows - start)
        yield Seed(seed.key, seed.row_offset + start).expand(rows, request.columns)


def response_messages(result: Residues) -> Iterator[worker_pb2.MultiplyResponse]:
    """A block of the result in messages of whole rows, each of about 256 KiB or a single row."""
    step = max(1, _CHUNK_BYTES // (4 * result.shape[1]))
    for start in range(0, len(result), step):
        yield worker_pb2.MultiplyResponse(residues=result[start : start + step].tobytes())
