"""Centred binomial noise B(eta) from a 32-byte key: ChaCha20 (RFC 8439), seekable by row.

    sample = (number of ones among 2 eta bits) - eta

An inverted bit is as random as the bit, so this is the difference of two sums of eta bits: mean 0,
variance eta/2. The bits of a sample have fixed places, so nothing about the noise shows in how much of the
stream was used, and no bit belongs to two samples.

Sixteen blocks of 16 words of 4 bytes are a *batch*, in which every word number j has 64 bytes
(j, 0) ... (j, 63), in the order of the stream. With 2 eta = 8 b + r, r < 8, a batch gives 64 g samples, g
as large as there is room: sample 64 i + p of a batch, i < g, has

    all bits of bytes (b i, p) ... (b i + b - 1, p),    and bits r i ... r i + r - 1 of byte (15, p)

Where b = 0, all words are used like the last one: sample 64 i + p has bits r k ... r k + r - 1 of byte
(j, p), of which i = c j + k, k < c = floor(8 / r).

For eta = 21, b = 5, r = 2, g = 3: a batch gives 192 samples, and 504 of 512 bits are used. For eta = 8 it
gives 512, and for eta = 2 it gives 2,048. Row t of a matrix begins with batch t w, where w batches hold a
row.
"""

import numpy as np
from numba import uint32
from numpy.typing import NDArray

from blindtune.protocol.kernels.chacha20 import BLOCK_WORDS, KEY_BYTES, ask, batch, initial_state
from blindtune.protocol.kernels.compiled import kernel
from blindtune.protocol.kernels.row_blocks import DRAWN, for_row_blocks
from blindtune.protocol.kernels.vectors import (
    LANES,
    add,
    bits_and,
    count_ones,
    load,
    repeated,
    shift_right,
    store,
    subtract_bytes,
)

__all__ = ["batches_of", "centred_binomial", "sample_row"]

_GROUP = 4 * LANES  # samples side by side


def _places(eta: int) -> tuple[int, int, int]:
    """b, r and g of the definition."""
    whole, rest = divmod(2 * eta, 8)
    if not whole:
        return whole, rest, BLOCK_WORDS * (8 // rest)
    groups = (BLOCK_WORDS - (rest > 0)) // whole
    return whole, rest, min(groups, 8 // rest) if rest else groups


@kernel
def sample_row(state, words, places, eta, out, read=None, written=None, at=0):  # type: ignore[no-untyped-def]
    """One row of samples.

    Args:
        state: uint32 [16], of the row's first batch. Its counter moves on.
        words: uint32 [256], used meanwhile.
        places, eta: see `batches_of`.
        out: int8 [columns], contiguous.
        read, written, at: as for `key_stream`.
    """
    whole, rest, groups = places
    columns = out.shape[0]
    mask = repeated(uint32(((1 << rest) - 1) * 0x01010101))
    for start in range(0, columns, groups * _GROUP):
        if read is not None:
            ask(read, written, at + start, groups * _GROUP)
        batch(state, words, 0)
        for i in range(min(groups, (columns - start + _GROUP - 1) // _GROUP)):
            j, k = (BLOCK_WORDS - 1, i) if whole else divmod(i, 8 // rest)
            ones = count_ones(bits_and(shift_right(load(words, LANES * j), uint32(rest * k)), mask))
            # A byte counts at most 64, so sums of bytes do not carry.
            for j in range(whole * i, whole * i + whole):
                ones = add(ones, count_ones(load(words, LANES * j)))
            ones = subtract_bytes(ones, eta)
            column = start + _GROUP * i
            if column + _GROUP <= columns:
                store(out, column, ones)
            else:
                samples = np.empty(_GROUP, np.int8)
                store(samples, 0, ones)
                for p in range(columns - column):
                    out[column + p] = samples[p]


@kernel
def _sample(initial, first, places, eta, out):  # type: ignore[no-untyped-def]
    """Rows of samples from a batch on."""
    state, words = initial.copy(), np.empty(BLOCK_WORDS * LANES, np.uint32)
    state[12] = uint32(first * LANES)
    for r in range(out.shape[0]):
        sample_row(state, words, places, eta, out[r])


def batches_of(rows: int, columns: int, eta: int) -> tuple[tuple[int, int, int], int]:
    """b, r and g of the definition, and how many batches hold a row.

    Raises:
        ValueError: so many rows are larger than a key stream.
    """
    places = _places(eta)
    width = -(-columns // (places[2] * _GROUP))
    if rows * width * LANES > 1 << 32:
        raise ValueError(f"{rows} rows of {columns} samples are more than one key stream")
    return places, width


def centred_binomial(
    key: bytes, first_row: int, rows: int, columns: int, eta: int, out: NDArray[np.int8] | None = None
) -> NDArray[np.int8]:
    """Some rows of a matrix of independent samples from B(eta).

    Args:
        key: 32 bytes.
        first_row: index of the first row.
        rows: number of rows.
        columns: number of columns of the whole matrix, on which its elements depend.
        eta: 1 ... 32.
        out: int8 [rows, columns], contiguous; receives the samples.

    Returns:
        int8 [rows, columns], in -eta ... eta.

    Raises:
        ValueError: the matrix is larger than a key stream, the key does not have 32 bytes, or ``out`` is no
            such array.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
    places, width = batches_of(first_row + rows, columns, eta)
    if out is None:
        out = np.empty((rows, columns), np.int8)
    if out.shape != (rows, columns) or out.dtype != np.int8 or not out.flags.c_contiguous:
        raise ValueError(f"{rows} rows of {columns} samples do not fit the array for them")
    initial, result = initial_state(key), out

    def some_rows(start: int, stop: int) -> None:
        _sample(initial, (first_row + start) * width, places, eta, result[start:stop])

    if out.size:
        for_row_blocks(rows, columns, some_rows, DRAWN)
    return out
