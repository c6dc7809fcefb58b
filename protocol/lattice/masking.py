"""Masking and unmasking, a few features at a time.

    mask      C[t, i] = X[t, i] + E[t, i] + (A S)[t, i],   (A S)[t, i] = sum_l (A[i, l] S[l])[t]   mod q
    unmask    Z[t, j] = Y[t, j]           - (H S)[t, j]    mod q, centred

A row of the operand is one coefficient of the ring elements. A and H come packed, int32
[feature tile][rank][256][16], transformed and centred, and S as `transformed` makes it. A product of
two centred residues is at most ((q - 1)/2)^2 < 2^60 in magnitude, so a sum of rank <= 7 of them stays
below 7 * 2^60 < 2^63, which fits the accumulator, and below 2^32 q, which `reduce_sums` asks for.

A tile gets its pointwise sums, one reduction each, and the inverse transform within the first cache.
Then tiles side by side become rows, so that those, which lie far apart, are read and written 1 KiB at a
time. A and H are five times as large as an operand of 256 rows and come from memory, a tile while the one
before it is transformed, once for several blocks of an operand.

Masks are written alone, and the operand is added to them: `fused` draws noise row by row, and the memory of
both comes meanwhile.
"""

from queue import SimpleQueue
from typing import Any

import numpy as np
from numba import int64, uint32
from numpy.typing import NDArray

from blindtune.protocol.fixed_point import Float32, Float64, real_value, real_values
from blindtune.protocol.kernels.compiled import kernel
from blindtune.protocol.kernels.low_sums import Words, larger, low_products, magnitude, total_of_words
from blindtune.protocol.kernels.reals import floats, repeated_real, store_reals
from blindtune.protocol.kernels.row_blocks import DRAWN, for_row_blocks
from blindtune.protocol.kernels.vectors import (
    LANES,
    add,
    aligned,
    even_words,
    fence,
    load,
    multiply_signed,
    odd_words,
    prefetch,
    repeated,
    repeated_half,
    store,
    store_aside,
)
from blindtune.protocol.lattice.parameters import DEGREE
from blindtune.protocol.lattice.transform import ASKED, inverse, reduce_sums, transform_of
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.residues import (
    Centred,
    Residues,
    centred_difference,
    centred_differences,
)

__all__ = ["Scales", "add_operand", "mask_rows", "unmask_rows", "unmask_with"]

Scales = tuple[Float64, Float32]

_BLOCKS = 4  # that share a tile of A or H when it is in the cache
_TILES = 16  # side by side, of several blocks; of one alone, twice as many
_AHEAD = 4  # rows: they lie too far apart for processors to see which one comes next
_ASIDE = 1 << 22  # bytes of a result that no cache of a core holds until it is used
_STRIDE = DEGREE * LANES + LANES  # between tiles, so that a coefficient of all of them fits the first cache


@kernel
def _ring_tile(tile, later, factors, ranks, transform, tiles, at, b, blocks):  # type: ignore[no-untyped-def]
    """The product of a tile with one block's S. Meanwhile its share of a later tile comes from memory."""
    for j in range(DEGREE):
        even, odd = repeated_half(int64(0)), repeated_half(int64(0))
        # The length of a tuple belongs to its type, so the compiler unrolls this loop.
        for rank in range(len(ranks)):
            words = load(tile, (rank * DEGREE + j) * LANES)
            factor = repeated_half(int64(factors[rank, j]))
            even = add(even, multiply_signed(even_words(words), factor))
            odd = add(odd, multiply_signed(odd_words(words), factor))
        store(tiles, at + j * LANES, reduce_sums(even, odd, transform.inverse, transform.q))
        if b == 0:
            prefetch(later, ASKED + j * LANES)
    inverse(tiles, at, transform, later, b, blocks)


@kernel
def _ring_tiles(packed, t, end, factors, first, last, ranks, transform, tiles, side):  # type: ignore[no-untyped-def]
    """The products of some tiles with the S of some blocks."""
    for u in range(t, end):
        later = packed[min(u + 1, len(packed) - 1)]
        for b in range(first, last):
            at = ((b - first) * side + u - t) * _STRIDE
            _ring_tile(packed[u], later, factors[b], ranks, transform, tiles, at, b - first, last - first)


@kernel
def _together(blocks, tiles):  # type: ignore[no-untyped-def]
    """How many blocks, and how many tiles side by side, are computed before they become rows."""
    return min(blocks, _BLOCKS), max(1, min(tiles, _TILES if blocks > 1 else 2 * _TILES))


@kernel
def _put_rows(tiles, place, first, count, out, row, i, k):  # type: ignore[no-untyped-def]
    """Coefficients ``first ... first + count - 1`` of tiles side by side, as columns i ... k - 1 of rows.

    The operand is added to them only when all of them are there, and a cache holds none until then.
    """
    columns, whole = out.shape[1], (k - i) // LANES
    for r in range(count):
        coefficient, at = place + (first + r) * LANES, (row + r) * columns + i
        for u in range(whole):
            store_aside(out, at + u * LANES, load(tiles, u * _STRIDE + coefficient))
        for j in range((k - i) % LANES):
            out[row + r, i + whole * LANES + j] = tiles[whole * _STRIDE + coefficient + j]


@kernel
def _add_row(x, e, q, out):  # type: ignore[no-untyped-def]
    """Adds, and returns the largest of x + (q-1)/2 mod 2^32, below q if all x are centred residues."""
    largest = uint32(0)
    for i in range(out.shape[0]):
        largest = max(largest, uint32(uint32(x[i]) + uint32(q >> 1)))
        residue = uint32(np.int32(x[i] + np.int32(e[i])))
        total = uint32(min(residue, uint32(residue + q)) + out[i])
        out[i] = min(total, uint32(total - q))
    return largest


@kernel
def _unmask_row(y, mask, inverse, column_scale, u, first, q, out):  # type: ignore[no-untyped-def]
    """Integers, or real numbers with column scales, from ``first`` on, and 1 / the row's scale.

    Returns the integers' dot product with words mod 2^32, and their largest magnitude, or zeros.
    """
    total, peak = uint32(0), uint32(0)
    for i in range(out.shape[0]):
        integer = centred_difference(y[i], mask[i], q)
        if u is not None:
            total = uint32(total + uint32(integer) * u[first + i])
            peak = max(peak, magnitude(integer))
        if column_scale is None:
            out[i] = integer
        else:
            out[i] = real_value(integer, inverse, column_scale[first + i])
    return total, peak


@kernel
def _add_rows(x, e, q, out, start, stop):  # type: ignore[no-untyped-def]
    largest = uint32(0)
    for r in range(start, stop):
        largest = max(largest, _add_row(x[r], e[r], q, out[r]))
    return largest


@kernel
def _unmask_some(y, mask, inverses, column_scale, u, q, out, sums, start, stop):  # type: ignore[no-untyped-def]
    for r in range(start, stop):
        total, peak = _unmask_row(y[r], mask[r], inverses[r], column_scale, u, 0, q, out[r])
        if u is not None:
            sums[0, r], sums[1, r] = total, peak


@kernel
def _mask(packed, factors, ranks, transform, runs, out, rest, start, stop):  # type: ignore[no-untyped-def]
    blocks, side = _together(runs.shape[0], stop - start)
    tiles = aligned(blocks * side * _STRIDE)
    for t in range(start, stop, side):
        end = min(t + side, stop)
        i, k, place = t * LANES, min(end * LANES, out.shape[1]), 0
        for b in range(runs.shape[0]):
            if b % blocks == 0:
                last = min(b + blocks, runs.shape[0])
                _ring_tiles(packed, t, end, factors, b, last, ranks, transform, tiles, side)
            place = b % blocks * side * _STRIDE
            _put_rows(tiles, place, runs[b, 1], runs[b, 2], out, runs[b, 0], i, k)
        _put_rows(tiles, place, DEGREE - rest.shape[0], rest.shape[0], rest, 0, i, k)
    fence()


@kernel
def _unmask(  # type: ignore[no-untyped-def]
    packed, factors, ranks, transform, runs, y, inverses, column_scale, aside, u, out, rest, sums, start, stop
):
    q = transform.q
    columns = out.shape[1]
    blocks, side = _together(runs.shape[0], stop - start)
    tiles, used = aligned(blocks * side * _STRIDE), np.empty(LANES, np.uint32)
    for t in range(start, stop, side):
        end = min(t + side, stop)
        i, k = t * LANES, min(end * LANES, columns)
        whole, place = (k - i) // LANES, 0
        for b in range(runs.shape[0]):
            if b % blocks == 0:
                last = min(b + blocks, runs.shape[0])
                _ring_tiles(packed, t, end, factors, b, last, ranks, transform, tiles, side)
            place = b % blocks * side * _STRIDE
            row, first = runs[b, 0], runs[b, 1]
            for r in range(runs[b, 2]):
                coefficient, at = place + (first + r) * LANES, (row + r) * columns + i
                factor = repeated_real(inverses[row + r])
                some_sums, some_peaks = repeated(uint32(0)), repeated(uint32(0))
                for w in range(whole):
                    prefetch(y, at + _AHEAD * columns + w * LANES)
                    mask_words = load(tiles, w * _STRIDE + coefficient)
                    words = centred_differences(load(y, at + w * LANES), mask_words, q)
                    if u is not None:
                        some_sums = low_products(some_sums, words, load(u, i + w * LANES))
                        some_peaks = larger(some_peaks, words)
                    if column_scale is None:
                        store(out, at + w * LANES, words)
                    else:
                        values = real_values(words, factor, column_scale, i + w * LANES)
                        if aside:
                            store_aside(out, at + w * LANES, floats(values))
                        else:
                            prefetch(out, at + _AHEAD * columns + w * LANES)
                            store_reals(out, at + w * LANES, values)
                if u is not None:
                    sums[0, row + r] += total_of_words(some_sums, used)
                    store(used, 0, some_peaks)
                    sums[1, row + r] = max(sums[1, row + r], used.max())
                if i + whole * LANES < k:
                    j, last = i + whole * LANES, whole * _STRIDE + coefficient
                    total, peak = _unmask_row(
                        y[row + r, j:k],
                        tiles[last : last + LANES],
                        inverses[row + r],
                        column_scale,
                        u,
                        j,
                        q,
                        out[row + r, j:k],
                    )
                    if u is not None:
                        sums[0, row + r] += total
                        sums[1, row + r] = max(sums[1, row + r], peak)
        _put_rows(tiles, place, DEGREE - rest.shape[0], rest.shape[0], rest, 0, i, k)
    fence()


def _read_only(x: NDArray[Any]) -> NDArray[Any]:
    """A contiguous view that cannot be written, so that kernels are compiled for one kind of array."""
    view = np.ascontiguousarray(x).view()
    view.flags.writeable = False
    return view


def _for_tiles(run_tiles, parameters, packed, factors, runs, *arrays):  # type: ignore[no-untyped-def]
    """Runs a kernel over the feature tiles, in threads when it pays."""
    packed, ranks, transform = _read_only(packed), (0,) * packed.shape[1], transform_of(parameters)
    for_row_blocks(
        packed.shape[0],
        len(runs) * DEGREE * LANES,
        lambda start, stop: run_tiles(packed, factors, ranks, transform, runs, *arrays, start, stop),
        DRAWN,
    )


def mask_rows(
    packed: Centred,
    factors: Centred,
    runs: NDArray[np.int64],
    parameters: ParameterSet,
    out: Residues,
    rest: Residues,
) -> None:
    """Rows of A S, which hide nothing before the noise is added to them.

    Args:
        packed: A, int32 [feature tiles or more, rank, 256, 16].
        factors: int32 [blocks, rank, 256], S of each block as `transformed` makes it.
        runs: int64 [blocks, 3]: first row of the operand, first row of the block, and how many.
        parameters: of the residues.
        out: uint32 [rows of the operand, columns], contiguous, receives the rows.
        rest: uint32 [some, columns], contiguous, receives the last rows of the last block's A S.

    Raises:
        ValueError: A has too few tiles, which would leave columns without a mask.
    """
    tiles = -(-out.shape[1] // LANES)
    if packed.shape[0] < tiles:
        raise ValueError(f"{packed.shape[0]} tiles of A do not cover {out.shape[1]} columns")
    _for_tiles(_mask, parameters, packed[:tiles], factors, runs, out, rest)


def add_operand(operand: Centred, noise: NDArray[np.int8], parameters: ParameterSet, out: Residues) -> bool:
    """Adds an operand and E to rows of A S.

    Args:
        operand: int32 [rows, columns].
        noise: E, int8 [rows, columns].
        parameters: of the residues.
        out: uint32 [rows, columns], all below q; becomes the masked operand.

    Returns:
        Whether all integers are centred residues. If not, ``out`` must not be used: see `require_centred`.
    """
    x, e, q = _read_only(operand), _read_only(noise), parameters.q
    rows, columns = out.shape
    largest: list[int] = []
    for_row_blocks(rows, columns, lambda a, b: largest.append(_add_rows(x, e, q, out, a, b)))
    return max(largest, default=0) < parameters.modulus


def _inverses(rows: int, columns: int, scales: Scales | None) -> tuple[Float64, Float32 | None]:
    """What kernels take for scales: 1 / those of rows, and those of columns."""
    if scales is None:
        return np.ones(rows), None
    of_rows, of_columns = scales
    if of_rows.shape != (rows,) or of_columns.shape != (columns,):
        raise ValueError(f"the row or column scales do not fit a matrix of shape {(rows, columns)}")
    return 1.0 / of_rows, _read_only(of_columns)


def unmask_rows(
    packed: Centred,
    factors: Centred,
    runs: NDArray[np.int64],
    parameters: ParameterSet,
    response: Residues,
    out: Centred | Float32,
    rest: Residues,
    scales: Scales | None = None,
    u: Words | None = None,
    sums: Words | None = None,
) -> None:
    """Removes the masks from rows of a response.

    Args:
        packed: H, int32 [feature tiles, rank, 256, 16].
        factors, runs, parameters: as `mask_rows` had them.
        response: uint32 [rows, columns], all below q.
        out: [rows, columns], contiguous, receives the centred rows as int32; or with scales, as float32, what
            `dequantize_rows` makes of those.
        rest: uint32 [some, columns], receives the last rows of the last block's H S.
        scales: of rows and of columns, as `dequantize_rows` takes them.
        u: words for the columns, uint32 [columns].
        sums: uint32 [2, rows], zeros: receives of each centred row of a run its dot product with these words
            mod 2^32, and its largest magnitude.
    """
    rows, columns = out.shape
    inverses, column_scale = _inverses(rows, columns, scales)
    y, aside = _read_only(response), out.nbytes >= _ASIDE
    if u is None or sums is None:
        arrays = (y, inverses, column_scale, aside, None, out, rest, None)
        _for_tiles(_unmask, parameters, packed, factors, runs, *arrays)
        return
    # Threads compute parts of all rows.
    parts: SimpleQueue[Words] = SimpleQueue()

    def part(*arguments: Any) -> None:
        *others, start, stop = arguments
        of_tiles = np.zeros((2, rows), np.uint32)
        _unmask(*others, of_tiles, start, stop)
        parts.put(of_tiles)

    own = _read_only(u)
    _for_tiles(part, parameters, packed, factors, runs, y, inverses, column_scale, aside, own, out, rest)
    while not parts.empty():
        of_tiles = parts.get()
        sums[0] += of_tiles[0]
        sums[1] = np.maximum(sums[1], of_tiles[1])


def unmask_with(
    kept: Residues,
    response: Residues,
    parameters: ParameterSet,
    out: Centred | Float32,
    scales: Scales | None = None,
    u: Words | None = None,
    sums: Words | None = None,
) -> None:
    """Unmasks rows with rows of H S that were computed before; all of one shape, and as `unmask_rows`."""
    y, mask = _read_only(response), _read_only(kept)
    rows, columns = out.shape
    inverses, column_scale = _inverses(rows, columns, scales)

    own = None if u is None else _read_only(u)

    def block(start: int, stop: int) -> None:
        _unmask_some(y, mask, inverses, column_scale, own, parameters.q, out, sums, start, stop)

    for_row_blocks(rows, columns, block)
