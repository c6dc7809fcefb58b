"""Centred binomial noise B(eta) from a 32-byte key: ChaCha20 (RFC 8439), seekable by row.

    sample(row r, column i) = popcount(bits 0 ... eta-1) - popcount(bits eta ... 2 eta - 1)
                              of the 64-bit little-endian word number r w + i of the key stream,
                              w = columns, rounded up to a multiple of 8

Sums of independent bits have mean 0 and variance eta/2. A sample takes one word whatever its value, so
nothing about the noise shows in how much of the stream was used. w makes each row begin with a
64-byte block of the stream, where ChaCha20 can start.
"""

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numba import types, uint64
from numba.extending import intrinsic
from numpy.typing import NDArray

from blindtune.protocol.compiled import kernel
from blindtune.protocol.row_blocks import for_row_blocks

__all__ = ["centred_binomial"]

_BLOCK = 8  # words in one block of ChaCha20
_WORDS_AT_ONCE = 1 << 14  # 128 KiB, which stay in the cache between the cipher and the counting


@intrinsic
def _ones(context, word):  # type: ignore[no-untyped-def]
    """The number of ones in a 64-bit word, in one instruction."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@kernel
def _sample(words, eta, out):  # type: ignore[no-untyped-def]
    # a - b = a + (eta - b) - eta: inverting the second half of the bits leaves one sum to count.
    kept = (uint64(1) << uint64(2 * eta)) - uint64(1) if eta < 32 else ~uint64(0)
    inverted = kept ^ ((uint64(1) << uint64(eta)) - uint64(1))
    for r in range(out.shape[0]):
        for i in range(out.shape[1]):
            out[r, i] = np.int8(np.int64(_ones((words[r, i] & kept) ^ inverted)) - eta)


def centred_binomial(key: bytes, first_row: int, rows: int, columns: int, eta: int) -> NDArray[np.int8]:
    """Some rows of a matrix of independent samples from B(eta).

    Args:
        key: 32 bytes.
        first_row: index of the first row.
        rows: number of rows.
        columns: number of columns of the whole matrix, on which its elements depend.
        eta: 1 ... 32.

    Returns:
        int8 [rows, columns], in -eta ... eta.

    Raises:
        ValueError: the matrix is larger than a key stream.
    """
    width = -(-columns // _BLOCK)  # in blocks
    if (first_row + rows) * width > 1 << 32:
        raise ValueError(f"{first_row + rows} rows of {columns} samples are more than one key stream")
    out = np.empty((rows, columns), np.int8)

    def some_rows(start: int, stop: int) -> None:
        step = min(stop - start, max(1, _WORDS_AT_ONCE // (width * _BLOCK)))
        words = np.empty((step, width * _BLOCK), np.uint64)
        zeros = bytes(words.nbytes)
        for row in range(start, stop, step):
            count = min(step, stop - row)
            counter = ((first_row + row) * width).to_bytes(4, "little")
            encryptor = Cipher(ChaCha20(key, counter + bytes(12)), mode=None).encryptor()
            part = words[:count]
            encryptor.update_into(memoryview(zeros)[: part.nbytes], part.data.cast("B"))
            _sample(part, eta, out[row : row + count])

    if out.size:
        for_row_blocks(rows, columns, some_rows)
    return out
