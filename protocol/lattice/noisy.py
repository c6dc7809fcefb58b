"""Floating point to fixed point with noise, z_t = round(a_t x_t) and z + E, in one pass.

Noise is arithmetic alone, fixed point mostly reading and writing of matrices. Row by row the one hides behind
the other, and E never exists as a matrix.
"""

from collections.abc import Sequence

import numpy as np
from numba import uint32
from numpy.typing import NDArray

from blindtune.protocol.chacha20 import BLOCK_WORDS, initial_state
from blindtune.protocol.compiled import kernel
from blindtune.protocol.fixed_point import Float32, Float64, not_finite, quantize_row, radius_of
from blindtune.protocol.lattice.noise import batches_of, sample_row
from blindtune.protocol.parameters import MODULUS
from blindtune.protocol.recycled import large_matrix
from blindtune.protocol.residues import Centred
from blindtune.protocol.row_blocks import DRAWN, for_rows_in_turn
from blindtune.protocol.shared_rows import rows_at_once, take
from blindtune.protocol.vectors import LANES, add, load, load_bytes, store

__all__ = ["largest_budget", "noisy_integers"]


@kernel
def _noisy_rows(x, column_scale, budget, radius, states, runs, batches, eta, out, scales, turn):  # type: ignore[no-untyped-def]
    rows, columns = x.shape
    whole, some, (places, width) = columns - columns % LANES, rows_at_once(columns), batches
    words, noise = np.empty(BLOCK_WORDS * LANES, np.uint32), np.empty((some, columns), np.int8)
    partial, state = np.empty(LANES, np.float64), np.empty(BLOCK_WORDS, np.uint32)
    run = 0
    while True:
        start = take(turn, some)
        if start >= rows:
            return -1
        stop = min(start + some, rows)
        for r in range(start, stop):
            while r >= runs[run, 0] + runs[run, 2]:
                run += 1
            state[:] = states[run]
            state[12] = uint32((runs[run, 1] + r - runs[run, 0]) * width * LANES)
            sample_row(state, words, places, eta, noise[r - start], x, out, r * columns)
        for r in range(start, stop):
            row, e = out[r], noise[r - start]
            scales[r] = quantize_row(x[r], column_scale, budget, radius, row, partial)
            if np.isnan(scales[r]):
                return r
            for i in range(0, whole, LANES):
                store(row, i, add(load(row, i), load_bytes(e, i)))
            for i in range(whole, columns):
                row[i] += np.int32(e[i])


def largest_budget(eta: int) -> int:
    """Up to which integers with noise are centred residues, whatever the noise."""
    return (MODULUS // 2 - eta) ** 2


def noisy_integers(
    x: Float32,
    budget: int,
    column_scale: Float32 | None,
    keys: Sequence[bytes],
    runs: NDArray[np.int64],
    eta: int,
) -> tuple[Centred, Float64]:
    """What `quantize_rows` makes of rows, with noise.

    Args:
        x: float32 [rows, columns].
        budget, column_scale: as for `quantize_rows`; the budget at most `largest_budget`.
        keys: of the runs' noise.
        runs: int64 [keys, 3]: first row of x, first row of what `centred_binomial` makes of the key, and how
            many. They cover all rows in order.
        eta: of the noise.

    Returns:
        Integers with noise, int32 [rows, columns], and scales, float64 [rows].

    Raises:
        UnsupportedError, ValueError: as `quantize_rows` does, or the runs don't fit.
    """
    rows, columns = x.shape
    radius = radius_of(x, budget, column_scale)
    if x.dtype != np.float32 or budget > largest_budget(eta):
        raise ValueError(f"the rows are not float32, or a budget of {budget} leaves no room for noise")
    ends = runs[:, 0] + runs[:, 2]
    if len(keys) != len(runs) or runs[0, 0] != 0 or ends[-1] != rows or (ends[:-1] != runs[1:, 0]).any():
        raise ValueError(f"{len(keys)} keys and {len(runs)} runs do not cover {rows} rows")
    batches = batches_of(int((runs[:, 1] + runs[:, 2]).max()), columns, eta)
    x = np.ascontiguousarray(x)
    column_scale = None if column_scale is None else np.ascontiguousarray(column_scale)
    states = np.stack([initial_state(key) for key in keys])
    out, scales = large_matrix(rows, columns, np.int32), np.empty(rows, np.float64)
    failed: list[int] = []

    def some(turn: NDArray[np.int64]) -> None:
        bad = _noisy_rows(x, column_scale, budget, radius, states, runs, batches, eta, out, scales, turn)
        if bad >= 0:
            failed.append(bad)

    for_rows_in_turn(rows, columns, some, DRAWN)
    if failed:
        raise not_finite(min(failed), rows)
    return out, scales
