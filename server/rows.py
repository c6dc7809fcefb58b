"""Operands coming in and results going out, a block of rows at a time.

Rows are independent, so a request's memory is bounded by its blocks and not by its length, and the
first rows of a result leave while the last rows of the operand are still on their way. The first block is
a small one, so that this is so for requests of a single full block too.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from blindtune.checkpoint import FrozenLayer
from blindtune.common.blocks import BLOCK_ELEMENTS, BYTES_OF_AN_ELEMENT, MOST_BLOCK_ROWS
from blindtune.proto.rows import REQUEST_ROWS, RESPONSE_ROWS
from blindtune.protocol.expansion import Seed
from blindtune.protocol.operands import SeededRows
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.residues import Residues, require_residues
from blindtune.protocol.wire_words import to_residues, to_words
from blindtune.server.admission.limits import Limits
from blindtune.server.admission.refusals import MalformedRequest
from blindtune.server.wire import Request, decoded

__all__ = ["expanded_blocks", "received_blocks", "response_messages", "workspace_bytes"]

# While the first rows are multiplied, the next ones arrive: enough rows for an int8 product to be efficient.
_FIRST_BLOCK_ROWS = 256
CHUNK_BYTES = 1 << 20


def workspace_bytes(layers: Iterable[FrozenLayer], limits: Limits) -> int:
    """Bytes that blocks take, if as many requests as may run are all in the middle of their largest.

    No more than for a product of all layers, which is wider than any that can be asked for.
    """
    widest = sum(layer.out_features + layer.in_features for layer in layers)
    elements = min(BLOCK_ELEMENTS, min(MOST_BLOCK_ROWS, limits.max_rows) * widest)
    return limits.max_concurrent * elements * BYTES_OF_AN_ELEMENT


def received_blocks(messages: Iterator[bytes], request: Request, size: int) -> Iterator[Residues]:
    """The operand's rows as they arrive, in blocks of ``size`` (the first and the last may be shorter).

    Every word of a block has been checked to be a residue. The last block appears only after the
    stream has ended with the announced number of rows.

    Raises:
        MalformedRequest: a message holds no whole rows, or there are more or fewer than announced.
        VerificationError: a word is no residue.
    """
    row_bytes = request.parameters.word_bytes * request.columns
    remaining, most = row_bytes * request.rows, row_bytes * size
    block = _Block(min(most, row_bytes * _FIRST_BLOCK_ROWS, remaining), row_bytes, request)
    for message in messages:
        chunk = _chunk(message, row_bytes)
        if len(chunk) > remaining:
            raise MalformedRequest(f"more rows arrived than the {request.rows} announced")
        remaining -= len(chunk)
        while chunk:
            chunk = block.take(chunk)
            missing = remaining + len(chunk)
            if block.is_full and missing:
                yield block.rows
                block = _Block(min(most, missing), row_bytes, request)
    if remaining:
        rows = request.rows - remaining // row_bytes
        raise MalformedRequest(f"the stream ended after {rows} of {request.rows} rows")
    yield block.rows


class _Block:
    """Rows on their way into one array.

    Attributes:
        rows: uint32 [rows, columns]. Those that are there have been checked to be residues.
    """

    def __init__(self, size: int, row_bytes: int, request: Request) -> None:
        self.rows = np.empty((size // row_bytes, request.columns), np.uint32)
        self._row_bytes = row_bytes
        self._filled = 0
        self._parameters = request.parameters

    @property
    def is_full(self) -> bool:
        return self._filled == len(self.rows)

    def take(self, chunk: memoryview) -> memoryview:
        """Copies what fits, and returns the rest."""
        left = self.rows[self._filled :]
        rows = left[: len(chunk) // self._row_bytes]
        taken = self._row_bytes * len(rows)
        to_residues(chunk[:taken], rows, self._parameters)
        # At once: the words are in the processor's cache, and the next message is on its way.
        require_residues(rows, self._parameters, "the operand")
        self._filled += len(rows)
        return chunk[taken:]


def _chunk(message: bytes, row_bytes: int) -> memoryview:
    """Whole rows of the operand, as bytes."""
    data = REQUEST_ROWS.rows(message)
    if data is None:
        part = decoded(message)
        if part.WhichOneof("part") != "residues":
            raise MalformedRequest("after the header, every message must carry rows of the operand")
        data = memoryview(part.residues)
    if not data or len(data) % row_bytes:
        raise MalformedRequest(
            f"a message carries {len(data)} bytes, which are no whole rows of {row_bytes} bytes"
        )
    return data


def expanded_blocks(
    messages: Iterator[bytes], request: Request, seed: Seed, size: int
) -> Iterator[SeededRows]:
    """The rows of a seed, in blocks of ``size`` (the first and the last may be shorter).

    They are expanded where they are multiplied.

    Raises:
        MalformedRequest: rows arrived as well.
    """
    for _ in messages:
        raise MalformedRequest("the operand is a seed, and yet more messages follow the header")
    whole = SeededRows(seed, request.rows, request.columns)
    start, rows = 0, min(size, _FIRST_BLOCK_ROWS)
    while start < request.rows:
        yield whole[start : start + rows]
        start, rows = start + rows, size


def response_messages(result: Residues, parameters: ParameterSet) -> Iterator[bytes]:
    """A block of the result in messages of whole rows, each of at most 1 MiB or a single row."""
    result = np.ascontiguousarray(result)
    step = max(1, CHUNK_BYTES // (parameters.word_bytes * result.shape[1]))
    for start in range(0, len(result), step):
        yield RESPONSE_ROWS.message(to_words(result[start : start + step], parameters))
