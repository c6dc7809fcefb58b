"""Dot products modulo 2^32, and largest magnitudes, of rows of small integers.

    sum_i x_t[i] w[i] mod 2^32,      max_i |x_t[i]|

Products modulo 2^32 keep nothing but low words, so that sixteen elements take one multiplication and one
addition, and nothing overflows.
"""

import numpy as np
from numba import njit, uint32
from numpy.typing import NDArray

from blindtune.protocol.kernels.compiled import kernel
from blindtune.protocol.kernels.row_blocks import READ, for_row_blocks
from blindtune.protocol.kernels.vectors import (
    LANES,
    add,
    greatest,
    least,
    load,
    multiply_low,
    repeated,
    store,
    subtract,
)

__all__ = [
    "Words",
    "larger",
    "low_products",
    "magnitude",
    "row_peaks",
    "row_sum",
    "row_sums",
    "total_of_words",
]

Words = NDArray[np.uint32]


@njit(inline="always")
def low_products(sums, integers, words):  # type: ignore[no-untyped-def]
    """Sixteen sums mod 2^32, each with one more product."""
    return add(sums, multiply_low(integers, words))


@njit(inline="always")
def larger(peaks, integers):  # type: ignore[no-untyped-def]
    """The larger of sixteen magnitudes and those of sixteen integers."""
    # Of x and -x mod 2^32, the one that is not negative is the smaller word.
    return greatest(peaks, least(integers, subtract(repeated(uint32(0)), integers)))


@njit(inline="always")
def magnitude(integer):  # type: ignore[no-untyped-def]
    """|x| of one 32-bit integer, as a word."""
    return min(uint32(integer), uint32(-integer))


@kernel
def total_of_words(vector, words):  # type: ignore[no-untyped-def]
    """The sum mod 2^32 of sixteen words; ``words``, uint32 [16], are used meanwhile."""
    store(words, 0, vector)
    total = uint32(0)
    for i in range(LANES):
        total = uint32(total + words[i])
    return total


@kernel
def row_sum(row, words, used):  # type: ignore[no-untyped-def]
    """One row of `row_sums`.

    Args:
        row: int32 [columns], contiguous.
        words: uint32 [columns], contiguous.
        used: uint32 [16], used meanwhile.
    """
    whole = row.shape[0] - row.shape[0] % LANES
    sums = repeated(uint32(0))
    for i in range(0, whole, LANES):
        sums = low_products(sums, load(row, i), load(words, i))
    total = total_of_words(sums, used)
    for i in range(whole, row.shape[0]):
        total = uint32(total + uint32(row[i]) * words[i])
    return total


@kernel
def _sums(x, words, out, start, stop):  # type: ignore[no-untyped-def]
    used = np.empty(LANES, np.uint32)
    for r in range(start, stop):
        out[r] = row_sum(x[r], words, used)


@kernel
def _peaks(x, out, start, stop):  # type: ignore[no-untyped-def]
    for r in range(start, stop):
        peak = uint32(0)
        for i in range(x.shape[1]):
            peak = max(peak, magnitude(x[r, i]))
        out[r] = peak


def row_sums(x: NDArray[np.int32], words: Words) -> Words:
    """The dot products of rows with words.

    Args:
        x: int32 [rows, columns].
        words: uint32 [columns].

    Returns:
        uint32 [rows], mod 2^32.
    """
    rows, columns = x.shape
    if x.dtype != np.int32 or words.shape != (columns,) or words.dtype != np.uint32:
        raise ValueError(f"the rows are not int32, or there are not {columns} words")
    x, words, out = np.ascontiguousarray(x), np.ascontiguousarray(words), np.empty(rows, np.uint32)
    for_row_blocks(rows, columns, lambda a, b: _sums(x, words, out, a, b), READ)
    return out


def row_peaks(x: NDArray[np.int32]) -> Words:
    """The largest magnitude in each row of int32 [rows, columns]: uint32 [rows]."""
    rows, columns = x.shape
    out = np.empty(rows, np.uint32)
    for_row_blocks(rows, columns, lambda a, b: _peaks(x, out, a, b), READ)
    return out
