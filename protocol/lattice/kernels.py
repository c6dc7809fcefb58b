"""Masking and unmasking, a tile of features at a time.

    mask      C[t, i] = X[t, i] + E[t, i] + sum_l (A[i, l] S[l])[t]   mod q
    unmask    Z[t, j] = Y[t, j]           - sum_l (H[j, l] S[l])[t]   mod q, centred

Row t of the operand is coefficient t of the ring elements. A and H come packed, int32
[feature tile][rank][256][16], transformed and centred; S transformed and centred as `transformed` has it.
A product of two centred residues is at most ((q - 1)/2)^2 < 2^60 in magnitude, and a sum of rank <= 7 of
them is below 2^63 and below 2^32 q: it fits the accumulator, and `reduce_sum` takes it.

For each tile: pointwise sum, one reduction, inverse transform, all within the cache, and one pass over
the operand. All blocks of an operand meet a tile before the next tile is read.
"""

from collections.abc import Sequence

import numpy as np
from numba import njit, uint32
from numpy.typing import NDArray

from blindtune.protocol.lattice.parameters import DEGREE
from blindtune.protocol.lattice.transform import LANES, inverse, reduce_sum
from blindtune.protocol.parameters import MODULUS
from blindtune.protocol.residues import Centred, Residues
from blindtune.protocol.row_blocks import for_row_blocks

__all__ = ["Run", "mask_rows", "unmask_rows"]

_Q = np.uint32(MODULUS)
_HALF = np.uint32((MODULUS - 1) // 2)


@njit(inline="always")
def _ring_product(packed, factors, ranks, tile):  # type: ignore[no-untyped-def]
    """The sum over the rank of the products of a tile's ring elements with one block's S."""
    for j in range(DEGREE):
        for f in range(LANES):
            total = np.int64(0)
            # The length of a tuple belongs to its type: the compiler unrolls this loop.
            for rank in range(len(ranks)):
                total += np.int64(packed[rank, j, f]) * np.int64(factors[rank, j])
            tile[j, f] = reduce_sum(total)
    inverse(tile)


@njit(nogil=True, cache=True)
def _mask(packed, factors, ranks, runs, x, e, out, rest, start, stop):  # type: ignore[no-untyped-def]
    tile = np.empty((DEGREE, LANES), np.uint32)
    for t in range(start, stop):
        column = t * LANES
        width = min(LANES, out.shape[1] - column)
        for b in range(runs.shape[0]):
            _ring_product(packed[t], factors[b], ranks, tile)
            row, first, count = runs[b, 0], runs[b, 1], runs[b, 2]
            for r in range(count):
                for f in range(width):
                    value = np.int32(x[row + r, column + f] + np.int32(e[row + r, column + f]))
                    residue = uint32(value)
                    residue = min(residue, uint32(residue + _Q))
                    total = uint32(residue + tile[first + r, f])
                    out[row + r, column + f] = min(total, uint32(total - _Q))
        for r in range(rest.shape[0]):
            for f in range(width):
                rest[r, column + f] = tile[DEGREE - rest.shape[0] + r, f]


@njit(nogil=True, cache=True)
def _unmask(packed, factors, ranks, runs, y, out, rest, start, stop):  # type: ignore[no-untyped-def]
    tile = np.empty((DEGREE, LANES), np.uint32)
    for t in range(start, stop):
        column = t * LANES
        width = min(LANES, out.shape[1] - column)
        for b in range(runs.shape[0]):
            _ring_product(packed[t], factors[b], ranks, tile)
            row, first, count = runs[b, 0], runs[b, 1], runs[b, 2]
            for r in range(count):
                for f in range(width):
                    difference = uint32(y[row + r, column + f] - tile[first + r, f])
                    residue = min(difference, uint32(difference + _Q))
                    centred = uint32(residue - _Q) if residue > _HALF else residue
                    out[row + r, column + f] = np.int32(centred)
        for r in range(rest.shape[0]):
            for f in range(width):
                rest[r, column + f] = tile[DEGREE - rest.shape[0] + r, f]
