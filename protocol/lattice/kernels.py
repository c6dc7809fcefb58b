"""Masking and unmasking, a few features at a time.

    mask      C[t, i] = X[t, i] + E[t, i] + sum_l (A[i, l] S[l])[t]   mod q
    unmask    Z[t, j] = Y[t, j]           - sum_l (H[j, l] S[l])[t]   mod q, centred

A row of the operand is one coefficient of the ring elements. A and H come packed, int32
[feature tile][rank][256][16], transformed and centred, and S as `transformed` makes it. A product of
two centred residues is at most ((q - 1)/2)^2 < 2^60 in magnitude, so a sum of rank <= 7 of them stays
below 7 * 2^60 < 2^63, which fits the accumulator, and below 2^32 q, which `reduce_sum` asks for.

A tile gets its pointwise sums, one reduction each, and the inverse transform within the first cache.
Then tiles side by side meet the operand, so that its rows, which lie far apart, are read and written
1 KiB at a time. All blocks of an operand use a part of A or H while it is in the cache.
"""

from typing import Any

import numpy as np
from numba import uint32
from numpy.typing import NDArray

from blindtune.protocol.compiled import kernel
from blindtune.protocol.lattice.parameters import DEGREE
from blindtune.protocol.lattice.transform import LANES, inverse, reduce_sum
from blindtune.protocol.parameters import MODULUS
from blindtune.protocol.residues import Centred, Residues
from blindtune.protocol.row_blocks import for_row_blocks

__all__ = ["mask_rows", "mask_with", "unmask_rows", "unmask_with"]

_Q = np.uint32(MODULUS)
_HALF = np.uint32((MODULUS - 1) // 2)
_TILES = 16  # side by side


@kernel
def _pointwise(packed, factors, ranks, tile):  # type: ignore[no-untyped-def]
    for j in range(DEGREE):
        for f in range(LANES):
            total = np.int64(0)
            # The length of a tuple belongs to its type, so the compiler unrolls this loop.
            for rank in range(len(ranks)):
                total += np.int64(packed[rank, j, f]) * np.int64(factors[rank, j])
            tile[j, f] = reduce_sum(total)


@kernel
def _place(tile, rows, column):  # type: ignore[no-untyped-def]
    for j in range(DEGREE):
        for f in range(LANES):
            rows[j, column + f] = tile[j, f]


@kernel
def _mask_row(x, e, mask, out):  # type: ignore[no-untyped-def]
    for i in range(out.shape[0]):
        residue = uint32(np.int32(x[i] + np.int32(e[i])))
        residue = min(residue, uint32(residue + _Q))
        total = uint32(residue + mask[i])
        out[i] = min(total, uint32(total - _Q))


@kernel
def _unmask_row(y, mask, out):  # type: ignore[no-untyped-def]
    for i in range(out.shape[0]):
        difference = uint32(y[i] - mask[i])
        residue = min(difference, uint32(difference + _Q))
        out[i] = np.int32(uint32(residue - _Q) if residue > _HALF else residue)


@kernel
def _mask_some(x, e, mask, out, start, stop):  # type: ignore[no-untyped-def]
    for r in range(start, stop):
        _mask_row(x[r], e[r], mask[r], out[r])


@kernel
def _unmask_some(y, mask, out, start, stop):  # type: ignore[no-untyped-def]
    for r in range(start, stop):
        _unmask_row(y[r], mask[r], out[r])


@kernel
def _ring_rows(packed, factors, ranks, tile, rows):  # type: ignore[no-untyped-def]
    """The products of some tiles with one block's S, as 256 rows."""
    for t in range(packed.shape[0]):
        _pointwise(packed[t], factors, ranks, tile)
        inverse(tile)
        _place(tile, rows, LANES * t)


@kernel
def _mask(packed, factors, ranks, runs, x, e, out, rest, start, stop):  # type: ignore[no-untyped-def]
    tile = np.empty((DEGREE, LANES), np.uint32)
    rows = np.empty((DEGREE, LANES * _TILES), np.uint32)
    for t in range(start, stop, _TILES):
        end = min(t + _TILES, stop)
        i, k = t * LANES, min(end * LANES, out.shape[1])
        for b in range(runs.shape[0]):
            _ring_rows(packed[t:end], factors[b], ranks, tile, rows)
            row, first = runs[b, 0], runs[b, 1]
            for r in range(runs[b, 2]):
                _mask_row(x[row + r, i:k], e[row + r, i:k], rows[first + r], out[row + r, i:k])
        for r in range(rest.shape[0]):
            rest[r, i:k] = rows[DEGREE - rest.shape[0] + r, : k - i]


@kernel
def _unmask(packed, factors, ranks, runs, y, out, rest, start, stop):  # type: ignore[no-untyped-def]
    tile = np.empty((DEGREE, LANES), np.uint32)
    rows = np.empty((DEGREE, LANES * _TILES), np.uint32)
    for t in range(start, stop, _TILES):
        end = min(t + _TILES, stop)
        i, k = t * LANES, min(end * LANES, out.shape[1])
        for b in range(runs.shape[0]):
            _ring_rows(packed[t:end], factors[b], ranks, tile, rows)
            row, first = runs[b, 0], runs[b, 1]
            for r in range(runs[b, 2]):
                _unmask_row(y[row + r, i:k], rows[first + r], out[row + r, i:k])
        for r in range(rest.shape[0]):
            rest[r, i:k] = rows[DEGREE - rest.shape[0] + r, : k - i]


def _read_only(x: NDArray[Any]) -> NDArray[Any]:
    """A contiguous view that cannot be written, so that kernels are compiled for one kind of array."""
    view = np.ascontiguousarray(x).view()
    view.flags.writeable = False
    return view


def _for_tiles(run_tiles, packed, factors, runs, *arrays):  # type: ignore[no-untyped-def]
    """Runs a kernel over the feature tiles, in threads when it pays."""
    packed, ranks = _read_only(packed), (0,) * packed.shape[1]
    for_row_blocks(
        packed.shape[0],
        len(runs) * DEGREE * LANES,
        lambda start, stop: run_tiles(packed, factors, ranks, runs, *arrays, start, stop),
    )


def mask_rows(
    packed: Centred,
    factors: Centred,
    runs: NDArray[np.int64],
    operand: Centred,
    noise: NDArray[np.int8],
    out: Residues,
    rest: Residues,
) -> None:
    """Masks rows of an operand.

    Args:
        packed: A, int32 [feature tiles or more, rank, 256, 16].
        factors: int32 [blocks, rank, 256], S of each block as `transformed` makes it.
        runs: int64 [blocks, 3]: first row of the operand, first row of the block, and how many.
        operand: int32 [rows, columns], of magnitude at most (q - 1)/2.
        noise: E for the operand's rows, [rows, columns].
        out: uint32 [rows, columns], receives the masked rows.
        rest: uint32 [some, columns], receives the last rows of the last block's A S.

    Raises:
        ValueError: A has too few tiles, which would leave columns without a mask.
    """
    tiles = -(-operand.shape[1] // LANES)
    if packed.shape[0] < tiles:
        raise ValueError(f"{packed.shape[0]} tiles of A do not cover {operand.shape[1]} columns")
    _for_tiles(_mask, packed[:tiles], factors, runs, _read_only(operand), _read_only(noise), out, rest)


def mask_with(kept: Residues, operand: Centred, noise: NDArray[np.int8], out: Residues) -> None:
    """Masks rows with rows of A S that were computed before; all of one shape."""
    x, e, mask = _read_only(operand), _read_only(noise), _read_only(kept)
    rows, columns = out.shape
    for_row_blocks(rows, columns, lambda start, stop: _mask_some(x, e, mask, out, start, stop))


def unmask_rows(
    packed: Centred,
    factors: Centred,
    runs: NDArray[np.int64],
    response: Residues,
    out: Centred,
    rest: Residues,
) -> None:
    """Removes the masks from rows of a response.

    Args:
        packed: H, int32 [feature tiles, rank, 256, 16].
        factors, runs: as `mask_rows` had them.
        response: uint32 [rows, columns], all below q.
        out: int32 [rows, columns], receives the centred rows.
        rest: uint32 [some, columns], receives the last rows of the last block's H S.
    """
    _for_tiles(_unmask, packed, factors, runs, _read_only(response), out, rest)


def unmask_with(kept: Residues, response: Residues, out: Centred) -> None:
    """Unmasks rows with rows of H S that were computed before; all of one shape."""
    y, mask = _read_only(response), _read_only(kept)
    rows, columns = out.shape
    for_row_blocks(rows, columns, lambda start, stop: _unmask_some(y, mask, out, start, stop))
