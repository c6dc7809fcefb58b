"""Floating point to shares, and answers to floating point, in one pass over each matrix.

    up      z_t = round(a_t x_t),   R_i = expand(seed_i),   C = z + sum R_i mod q,   R_i . v,   C . v
    down    y = ((Y - sum_i R_i M  mod q, centred) / a_t) * column scale

with C . v = z . v + sum R_i . v mod q, of which z . v is a sum of small integers. These are `fixed_point`,
`expansion`, `residues` and `verification`, row by row: what one step makes is still in the first cache when
the next one reads it. Matrices are far larger than caches, and reading and writing them takes as long as the
arithmetic.
"""

from collections.abc import Sequence

import numpy as np
from numba import uint32, uint64
from numpy.typing import NDArray

from blindtune.protocol.expansion import expand_rows
from blindtune.protocol.fixed_point import (
    Float32,
    Float64,
    not_finite,
    quantize_row,
    radius_of,
    real_value,
    real_values,
)
from blindtune.protocol.kernels.chacha20 import initial_state
from blindtune.protocol.kernels.compiled import kernel
from blindtune.protocol.kernels.low_sums import (
    Words,
    larger,
    low_products,
    magnitude,
    row_sum,
    total_of_words,
)
from blindtune.protocol.kernels.reals import repeated_real, store_reals
from blindtune.protocol.kernels.recycled import large_matrix
from blindtune.protocol.kernels.row_blocks import DRAWN, for_rows_in_turn
from blindtune.protocol.kernels.shared_rows import rows_at_once, take
from blindtune.protocol.kernels.vectors import AHEAD, LANES, aligned, load, prefetch, repeated, store
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.residues import (
    Residues,
    add_rows,
    centred_difference,
    centred_differences,
    dot,
    dots_fit,
    hide_row,
    hide_rows,
)

__all__ = ["hide_reals", "reveal_reals", "reveal_reals_with_sums"]


@kernel
def _hide(  # type: ignore[no-untyped-def]
    x,
    column_scale,
    budget,
    radius,
    diffused,
    states,
    v,
    fits,
    image,
    q,
    bits,
    masked,
    scales,
    dots,
    sums,
    turn,
):
    rows, columns = x.shape
    step, count = rows_at_once(columns), len(states)
    integers = aligned(columns).view(np.int32).reshape((1, columns))
    values = aligned(2 * (columns + LANES)).view(np.float64)
    masks = aligned(count * step * columns).reshape((count, step, columns))
    used = np.empty(LANES, np.uint32)
    while True:
        start = take(turn, step)
        if start >= rows:
            return -1
        some = min(step, rows - start)
        expand_rows(states[0], uint64(start), q, bits, masks[0, :some], x, masked)
        for k in range(1, count):
            expand_rows(states[k], uint64(start), q, bits, masks[k, :some])
        for r in range(start, start + some):
            i = r - start
            scales[r] = quantize_row(x[r], column_scale, budget, radius, diffused, integers[0], values)
            if np.isnan(scales[r]):
                return r
            if image is not None:
                sums[r] = row_sum(integers[0], image, used)
            row, expected = masked[r : r + 1], uint64(0)
            if v is None:
                hide_rows(integers, masks[0, i : i + 1], q, row)
            else:
                dots[0, 0, r], small = hide_row(integers[0], masks[0, i], v[0], q, row[0])
                expected = uint64(small % np.int64(q)) + uint64(dots[0, 0, r])
            for k in range(1, count):
                add_rows(row, masks[k, i : i + 1], q, row)
                if v is not None:
                    dots[k, 0, r] = dot(masks[k, i], v[0], q)
                    expected += uint64(dots[k, 0, r])
            if v is not None:
                dots[count, 0, r] = uint32(expected % uint64(q)) if fits else dot(row[0], v[0], q)
                # The row and its masks are in the cache.
                for j in range(1, v.shape[0]):
                    for k in range(count):
                        dots[k, j, r] = dot(masks[k, i], v[j], q)
                    dots[count, j, r] = dot(row[0], v[j], q)


def hide_reals(
    x: Float32,
    budget: int,
    column_scale: Float32 | None,
    diffused: bool,
    keys: Sequence[bytes],
    v: Residues | None,
    parameters: ParameterSet,
    image: Words | None = None,
) -> tuple[Residues, Float64, Residues | None, Words | None]:
    """Quantizes rows and adds the masks that keys expand to.

    Args:
        x: float32 [rows, columns].
        budget, column_scale, diffused: as for `quantize_rows`.
        keys: one or more, each used for nothing else.
        v: uint32 [vectors, columns], verification vectors.
        parameters: of the residues.
        image: V of a certificate, uint32 [columns].

    Returns:
        The masked residues, uint32 [rows, columns]; the scales, float64 [rows]; with ``v`` the dot products
        of the rows of all masks, and then of the masked residues, with each of them, uint32 [keys + 1,
        vectors, rows]; and with ``image`` those of the rows of integers mod 2^32, uint32 [rows].

    Raises:
        UnsupportedError, ValueError: as `quantize_rows` does, or a budget allows for integers that are no
            centred residues, which a mask would not hide.
    """
    rows, columns = x.shape
    radius = radius_of(x, budget, column_scale, diffused)
    if budget > parameters.half**2:
        raise ValueError(f"a budget of {budget} allows for integers that are no centred residues")
    vectors = [vector for vector in (v, image) if vector is not None]
    if (
        x.dtype != np.float32
        or any(w.shape[-1] != columns or w.dtype != np.uint32 for w in vectors)
        or (v is not None and v.ndim != 2)
    ):
        raise ValueError(f"the rows are not float32, or a vector is not {columns} words")
    x = np.ascontiguousarray(x)
    column_scale = None if column_scale is None else np.ascontiguousarray(column_scale)
    v = None if v is None else np.ascontiguousarray(v)
    image = None if image is None else np.ascontiguousarray(image)
    states = np.stack([initial_state(key) for key in keys])
    masked, scales = large_matrix(rows, columns, np.uint32), np.empty(rows, np.float64)
    dots = None if v is None else np.empty((len(keys) + 1, len(v), rows), np.uint32)
    sums = None if image is None else np.empty(rows, np.uint32)
    fits = dots_fit(budget, columns, parameters)
    q, bits, failed = parameters.q, parameters.bits, list[int]()

    def some(turn: NDArray[np.int64]) -> None:
        bad = _hide(
            x,
            column_scale,
            budget,
            radius,
            diffused,
            states,
            v,
            fits,
            image,
            q,
            bits,
            masked,
            scales,
            dots,
            sums,
            turn,
        )
        if bad >= 0:
            failed.append(bad)

    for_rows_in_turn(rows, columns, some, DRAWN)
    if failed:
        raise not_finite(min(failed), rows)
    return masked, scales, dots, sums


@kernel
def _reveal(result, mask, scales, column_scale, u, q, out, sums, peaks, turn):  # type: ignore[no-untyped-def]
    rows, columns = result.shape
    # Several at once, because memory is read fastest in order.
    whole, some = columns - columns % LANES, 8 * rows_at_once(columns)
    words = np.empty(LANES, np.uint32)
    while True:
        start = take(turn, some)
        if start >= rows:
            return
        for r in range(start, min(start + some, rows)):
            y, m, to = result[r], mask[r], out[r]
            inverse = 1.0 / scales[r]
            factor = repeated_real(inverse)
            some_sums, some_peaks = repeated(uint32(0)), repeated(uint32(0))
            for j in range(0, whole, LANES):
                prefetch(y, j + AHEAD)
                prefetch(m, j + AHEAD)
                prefetch(to, j + AHEAD)
                integers = centred_differences(load(y, j), load(m, j), q)
                store_reals(to, j, real_values(integers, factor, column_scale, j))
                if u is not None:
                    some_sums = low_products(some_sums, integers, load(u, j))
                    some_peaks = larger(some_peaks, integers)
            for j in range(whole, columns):
                to[j] = real_value(centred_difference(y[j], m[j], q), inverse, column_scale[j])
            if u is not None:
                total = total_of_words(some_sums, words)
                store(words, 0, some_peaks)
                peak = words.max()
                for j in range(whole, columns):
                    integer = centred_difference(y[j], m[j], q)
                    total = uint32(total + uint32(integer) * u[j])
                    peak = max(peak, magnitude(integer))
                sums[r], peaks[r] = total, peak


def reveal_reals(
    result: Residues,
    mask: Residues,
    scales: Float64,
    column_scale: Float32 | None,
    parameters: ParameterSet,
) -> Float32:
    """Real values of the answer to a masked operand, less its mask's.

    Args:
        result, mask: uint32 [rows, outputs], verified.
        scales, column_scale: as for `dequantize_rows`.
        parameters: of the residues.

    Returns:
        float32 [rows, outputs].

    Raises:
        ValueError: shapes don't fit.
    """
    return _revealed(result, mask, scales, column_scale, None, parameters)[0]


def reveal_reals_with_sums(
    result: Residues,
    mask: Residues,
    scales: Float64,
    column_scale: Float32 | None,
    u: Words,
    parameters: ParameterSet,
) -> tuple[Float32, Words, Words]:
    """`reveal_reals`, and of each row of integers its dot product with words mod 2^32 and largest magnitude.

    Args:
        result, mask, scales, column_scale: as for `reveal_reals`.
        u: uint32 [outputs].
        parameters: of the residues.

    Returns:
        float32 [rows, outputs], uint32 [rows], uint32 [rows].

    Raises:
        ValueError: shapes don't fit.
    """
    return _revealed(result, mask, scales, column_scale, u, parameters)


def _revealed(
    result: Residues,
    mask: Residues,
    scales: Float64,
    column_scale: Float32 | None,
    u: Words | None,
    parameters: ParameterSet,
) -> tuple[Float32, Words, Words]:
    rows, columns = result.shape
    if column_scale is None:
        column_scale = np.ones(columns, np.float32)
    if u is not None and (u.shape != (columns,) or u.dtype != np.uint32):
        raise ValueError(f"there are not {columns} words")
    if mask.shape != result.shape or scales.shape != (rows,) or column_scale.shape != (columns,):
        raise ValueError(f"the mask's answer or the scales do not fit a matrix of shape {result.shape}")
    arrays = [np.ascontiguousarray(array) for array in (result, mask, scales, column_scale)]
    u = None if u is None else np.ascontiguousarray(u)
    out = large_matrix(rows, columns, np.float32)
    sums, peaks = (np.empty(0 if u is None else rows, np.uint32) for _ in range(2))
    q = parameters.q
    for_rows_in_turn(rows, columns, lambda turn: _reveal(*arrays, u, q, out, sums, peaks, turn))
    return out, sums, peaks
