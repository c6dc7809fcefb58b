"""Fixed point without overflow: a proof for every row, not a calibration.

For each row x_t the client chooses its own scale a_t and sends integers z_t = round(a_t x_t) with

    sum_i z_t[i]^2  <=  S,      S = floor( ((q - 1)/2 - noise)^2 / N ),    N = max_j sum_i M[i, j]^2

so that by Cauchy-Schwarz |(z_t M)_j| <= (q - 1)/2 - noise for every output j: no value wraps around the
modulus, whatever the data. S and N are exact integers, and the sum of squares is checked in integers.

Rounding moves a row by at most sqrt(d)/2, hence the first attempt a_t = (sqrt(S) - sqrt(d)/2) / |x_t|.
Norms are taken in float64 over 16 interleaved partial sums, for each row alone, so that a row's
integers never depend on its neighbours. Scales stay on the client.
"""

from math import isqrt

import numpy as np
from numpy.typing import NDArray

from blindtune.protocol.compiled import kernel
from blindtune.protocol.errors import UnsupportedError
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.residues import Centred
from blindtune.protocol.row_blocks import for_row_blocks

__all__ = ["dequantize_rows", "quantize_rows", "square_budget"]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

_OK, _NOT_FINITE = 0, 1


def square_budget(parameters: ParameterSet, column_square_sum: int, noise: int = 0) -> int:
    """S, the largest sum of squares of a row of the operand.

    Args:
        parameters: gives q.
        column_square_sum: N, the largest sum of squares of a column of M; 0 for an all-zero M.
        noise: largest magnitude of what the mask adds to a result.

    Raises:
        UnsupportedError: the noise leaves no room.
    """
    room = parameters.half - noise
    if room <= 0:
        raise UnsupportedError(
            f"mask noise of {noise} leaves no room below q/2 in parameter set {parameters.name}: "
            "use a larger parameter set or masking 'shares'"
        )
    return room * room // max(column_square_sum, 1)


@kernel
def _value(row, column_scale, i):  # type: ignore[no-untyped-def]
    if column_scale is None:
        return np.float64(row[i])
    return np.float64(row[i]) * np.float64(column_scale[i])


@kernel
def _square_norm(row, column_scale, partial):  # type: ignore[no-untyped-def]
    """The sum of squares: those of columns k, k + 16, ... first, in order, and then those sums."""
    columns = row.shape[0]
    partial[:] = 0.0
    # Eight squares at a time, so that the sums are not written to memory after each.
    whole = columns - columns % 128
    for i in range(0, whole, 128):
        for k in range(16):
            total = partial[k]
            for j in range(i + k, i + k + 128, 16):
                value = _value(row, column_scale, j)
                total += value * value
            partial[k] = total
    for i in range(whole, columns):
        value = _value(row, column_scale, i)
        partial[i % 16] += value * value
    square = 0.0
    for k in range(16):
        square += partial[k]
    return square


@kernel
def _round(row, column_scale, scale, out):  # type: ignore[no-untyped-def]
    """Rounds a row times its scale, and returns the exact sum of squares."""
    total = np.int64(0)
    for i in range(row.shape[0]):
        integer = np.int32(np.rint(_value(row, column_scale, i) * scale))
        total += np.int64(integer) * np.int64(integer)
        out[i] = integer
    return total


@kernel
def _quantize(x, column_scale, budget, radius, out, scales, start, stop):  # type: ignore[no-untyped-def]
    partial = np.empty(16, np.float64)
    for r in range(start, stop):
        square = _square_norm(x[r], column_scale, partial)
        if not np.isfinite(square):
            return r
        if square == 0.0:
            # Infinitely fine: whatever noise a mask adds to the result of zeros comes back as zero.
            scales[r] = np.inf
            out[r, :] = 0
            continue
        scale = radius / np.sqrt(square)
        while _round(x[r], column_scale, scale, out[r]) > budget:
            scale *= 1.0 - 2.0**-30
        scales[r] = scale
    return -1


def quantize_rows(x: Float32, budget: int, column_scale: Float32 | None = None) -> tuple[Centred, Float64]:
    """Rounds each row, times its own scale, to integers within the budget.

    Args:
        x: float32 [rows, columns]. With ``column_scale``, column i counts as x[:, i] * column_scale[i].
        budget: S, from `square_budget`.
        column_scale: float32 [columns], positive and finite.

    Returns:
        Integers, int32 [rows, columns], and scales, float64 [rows]: integers ~ scale * row. A row of
        zeros stays zeros, and its scale is infinite, so that its result is zero under any noise.

    Raises:
        UnsupportedError: a value is not finite, or the rows are too wide for the budget.
        ValueError: the column scales don't fit.
    """
    rows, columns = x.shape
    radius = isqrt(budget) - columns**0.5 / 2
    if radius < 1:
        raise UnsupportedError(f"rows of {columns} columns leave no precision within a budget of {budget}")
    if column_scale is not None and (
        column_scale.shape != (columns,) or not (np.isfinite(column_scale) & (column_scale > 0)).all()
    ):
        raise ValueError(f"the column scales are not {columns} positive finite numbers")
    out = np.empty((rows, columns), np.int32)
    scales = np.empty(rows, np.float64)
    failed: list[int] = []

    def block(start: int, stop: int) -> None:
        bad = _quantize(x, column_scale, budget, radius, out, scales, start, stop)
        if bad >= 0:
            failed.append(bad)

    for_row_blocks(rows, columns, block)
    if failed:
        raise UnsupportedError(
            f"row {min(failed)} of {rows} holds a value that is not finite (inf or nan): "
            "lower the learning rate, or train in bf16 or fp32; fp16 loss scaling is not supported"
        )
    return out, scales


@kernel
def _dequantize(y, scales, column_scale, out, start, stop):  # type: ignore[no-untyped-def]
    for r in range(start, stop):
        inverse = 1.0 / scales[r]
        for j in range(y.shape[1]):
            out[r, j] = np.float32(np.float64(y[r, j]) * inverse * np.float64(column_scale[j]))


def dequantize_rows(y: Centred, scales: Float64, column_scale: Float32 | None = None) -> Float32:
    """Real values of a product's integers: y[t, j] / scales[t] * column_scale[j].

    Args:
        y: int32 [rows, columns].
        scales: float64 [rows], from `quantize_rows`.
        column_scale: float32 [columns], ones by default.

    Returns:
        float32 [rows, columns], each element rounded once from float64.

    Raises:
        ValueError: the scales don't fit.
    """
    if column_scale is None:
        column_scale = np.ones(y.shape[1], np.float32)
    if scales.shape != y.shape[:1] or column_scale.shape != y.shape[1:]:
        raise ValueError(f"the row or column scales do not fit a matrix of shape {y.shape}")
    out = np.empty(y.shape, np.float32)
    rows, columns = y.shape
    for_row_blocks(rows, columns, lambda a, b: _dequantize(y, scales, column_scale, out, a, b))
    return out
