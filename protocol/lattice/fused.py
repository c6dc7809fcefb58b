"""Floating point to masked residues: C = A S + E + z mod q, z_t = round(a_t x_t), in one pass, and N_t . v.

Noise is arithmetic alone, fixed point and A S mostly reading and writing of matrices. Row by row the one
hides behind the other, and neither E nor z nor N = z + E exists as a matrix.
"""

from collections.abc import Sequence
from math import isqrt

import numpy as np
from numba import uint32
from numpy.typing import NDArray

from blindtune.protocol.fixed_point import Float32, Float64, not_finite, quantize_row, radius_of
from blindtune.protocol.kernels.chacha20 import BLOCK_WORDS, initial_state
from blindtune.protocol.kernels.compiled import kernel
from blindtune.protocol.kernels.low_sums import Words, low_products, total_of_words
from blindtune.protocol.kernels.reals import total_of_half
from blindtune.protocol.kernels.row_blocks import DRAWN, for_rows_in_turn
from blindtune.protocol.kernels.shared_rows import rows_at_once, take
from blindtune.protocol.kernels.vectors import (
    LANES,
    add,
    aligned,
    load,
    load_bytes,
    repeated,
    repeated_half,
    store,
)
from blindtune.protocol.lattice.noise import batches_of, sample_row
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.residues import Residues, dots_fit, residues_of, signed_products, sums_of

__all__ = ["add_noisy_integers", "largest_budget", "noisy_dots_fit"]


@kernel
def _add_noisy_row(integers, noise, v, image, q, out, used):  # type: ignore[no-untyped-def]
    """Adds both to a row of residues; the dot products of their sum, with v mod 2^64, image mod 2^32."""
    whole, dots = out.shape[0] - out.shape[0] % LANES, repeated_half(np.int64(0))
    sums = repeated(uint32(0))
    for i in range(0, whole, LANES):
        words = add(load(integers, i), load_bytes(noise, i))
        if v is not None:
            dots = add(dots, signed_products(words, load(v, i)))
        if image is not None:
            sums = low_products(sums, words, load(image, i))
        store(out, i, sums_of(residues_of(words, q), load(out, i), q))
    total, small = np.int64(total_of_half(dots)), total_of_words(sums, used)
    for i in range(whole, out.shape[0]):
        integer = np.int64(integers[i]) + np.int64(noise[i])
        if v is not None:
            total += integer * np.int64(v[i])
        if image is not None:
            small = uint32(small + uint32(integer) * image[i])
        out[i] = uint32((np.int64(out[i]) + integer) % np.int64(q))
    return total, small


@kernel
def _noisy_dot(integers, noise, v):  # type: ignore[no-untyped-def]
    """The dot product of the sum of both with one more v mod 2^64."""
    whole, dots = v.shape[0] - v.shape[0] % LANES, repeated_half(np.int64(0))
    for i in range(0, whole, LANES):
        dots = add(dots, signed_products(add(load(integers, i), load_bytes(noise, i)), load(v, i)))
    total = np.int64(total_of_half(dots))
    for i in range(whole, v.shape[0]):
        total += (np.int64(integers[i]) + np.int64(noise[i])) * np.int64(v[i])
    return total


@kernel
def _add_noisy_rows(  # type: ignore[no-untyped-def]
    x,
    column_scale,
    budget,
    radius,
    diffused,
    states,
    runs,
    batches,
    eta,
    v,
    image,
    q,
    out,
    scales,
    dots,
    sums,
    turn,
):
    rows, columns = x.shape
    some, (places, width) = rows_at_once(columns), batches
    words, integers = aligned(BLOCK_WORDS * LANES), aligned(columns).view(np.int32)
    noise, values = np.empty(columns, np.int8), aligned(2 * (columns + LANES)).view(np.float64)
    state, run = np.empty(BLOCK_WORDS, np.uint32), 0
    used = np.empty(LANES, np.uint32)
    while True:
        start = take(turn, some)
        if start >= rows:
            return -1
        for r in range(start, min(start + some, rows)):
            while r >= runs[run, 0] + runs[run, 2]:
                run += 1
            state[:] = states[run]
            state[12] = uint32((runs[run, 1] + r - runs[run, 0]) * width * LANES)
            sample_row(state, words, places, eta, noise, x, out, r * columns)
            scales[r] = quantize_row(x[r], column_scale, budget, radius, diffused, integers, values)
            if np.isnan(scales[r]):
                return r
            if v is None:
                dots[0, r], sums[r] = _add_noisy_row(integers, noise, None, image, q, out[r], used)
            else:
                dots[0, r], sums[r] = _add_noisy_row(integers, noise, v[0], image, q, out[r], used)
                for k in range(1, v.shape[0]):
                    dots[k, r] = _noisy_dot(integers, noise, v[k])


def largest_budget(eta: int, parameters: ParameterSet) -> int:
    """Up to which integers with noise are centred residues, whatever the noise."""
    return (parameters.half - eta) ** 2


def noisy_dots_fit(budget: int, eta: int, columns: int, parameters: ParameterSet) -> bool:
    """Whether the dot products of `add_noisy_integers` are below 2^63 in magnitude, whatever the noise."""
    return dots_fit((isqrt(budget) + 1 + eta * (isqrt(columns) + 1)) ** 2, columns, parameters)


def add_noisy_integers(
    x: Float32,
    budget: int,
    column_scale: Float32 | None,
    diffused: bool,
    keys: Sequence[bytes],
    runs: NDArray[np.int64],
    eta: int,
    v: Residues | None,
    parameters: ParameterSet,
    out: Residues,
    image: Words | None = None,
) -> tuple[Float64, NDArray[np.int64], Words]:
    """Adds what `quantize_rows` makes of rows, and noise.

    Args:
        x: float32 [rows, columns].
        budget, column_scale, diffused: as for `quantize_rows`; the budget at most `largest_budget`.
        keys: of the runs' noise.
        runs: int64 [keys, 3]: first row of x, first row of what `centred_binomial` makes of the key, and how
            many. They cover all rows in order.
        eta: of the noise.
        v: uint32 [vectors, columns], below q.
        parameters: of the residues.
        out: uint32 [rows, columns], contiguous, all below q; becomes the sum mod q. If this raises, some rows
            are still as they were.
        image: V of a certificate, uint32 [columns].

    Returns:
        Scales, float64 [rows]; with ``v`` the dot products of the integers with noise with each, int64
        [vectors, rows], mod 2^64; and with ``image`` those with it, uint32 [rows], mod 2^32.

    Raises:
        UnsupportedError, ValueError: as `quantize_rows` does, or the arguments don't fit.
    """
    rows, columns = x.shape
    radius = radius_of(x, budget, column_scale, diffused)
    if x.dtype != np.float32 or budget > largest_budget(eta, parameters):
        raise ValueError(f"the rows are not float32, or a budget of {budget} leaves no room for noise")
    ends = runs[:, 0] + runs[:, 2]
    if len(keys) != len(runs) or runs[0, 0] != 0 or ends[-1] != rows or (ends[:-1] != runs[1:, 0]).any():
        raise ValueError(f"{len(keys)} keys and {len(runs)} runs do not cover {rows} rows")
    vectors = [vector for vector in (v, image) if vector is not None]
    fits = out.shape == x.shape and out.flags.c_contiguous and all(w.shape[-1] == columns for w in vectors)
    fits = fits and (v is None or v.ndim == 2)
    if not fits or any(array.dtype != np.uint32 for array in (out, *vectors)):
        raise ValueError(f"the masks or a vector are not uint32, or do not fit {rows} rows of {columns}")
    batches = batches_of(int((runs[:, 1] + runs[:, 2]).max()), columns, eta)
    x = np.ascontiguousarray(x)
    column_scale = None if column_scale is None else np.ascontiguousarray(column_scale)
    v = None if v is None else np.ascontiguousarray(v)
    image = None if image is None else np.ascontiguousarray(image)
    states = np.stack([initial_state(key) for key in keys])
    scales, dots, sums = (
        np.empty(rows, np.float64),
        np.empty((1 if v is None else len(v), rows), np.int64),
        np.empty(rows, np.uint32),
    )
    failed: list[int] = []

    def some(turn: NDArray[np.int64]) -> None:
        bad = _add_noisy_rows(
            x,
            column_scale,
            budget,
            radius,
            diffused,
            states,
            runs,
            batches,
            eta,
            v,
            image,
            parameters.q,
            out,
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
    return scales, dots, sums
