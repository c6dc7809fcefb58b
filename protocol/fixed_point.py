"""Fixed point without overflow: a proof for every row, not a calibration.

For each row x_t the client chooses its own scale a_t and sends integers z_t = round(a_t x_t) with

    sum_i z_t[i]^2  <=  S,      S = floor( ((q - 1)/2 - noise)^2 / N ),    N = max_j sum_i M[i, j]^2

so that by Cauchy-Schwarz |(z_t M)_j| <= (q - 1)/2 - noise for every output j: no value wraps around the
modulus, whatever the data. S and N are exact integers, and the sum of squares is checked in integers.

Rounding to the nearest integers moves a row of d columns by at most sqrt(d)/2, hence the first attempt
a_t = (sqrt(S) - sqrt(d)/2) / |x_t|.

Rows of long gradients (`Product.diffused`) are rounded with the error diffused instead. What rounding leaves
of a column is carried to the sixteenth column after it, which is the next one of its lane:

    z[i] = round(a x[i] + c[i - 16]),      c[i] = a x[i] + c[i - 16] - z[i],      c[i] = 0 for i < 0

Each |c[i]| <= 1/2, so z[i] - a x[i] = c[i - 16] - c[i] is at most 1 in magnitude, and a row moves by at most
sqrt(d): its first attempt is a_t = (sqrt(S) - sqrt(d)) / |x_t|. In return, the errors of a lane add up to 1/2
at most, however many columns there are. To the nearest, columns below 1/2 would all be zero, and where they
have one sign, as the small probabilities of a softmax have, no average makes up for it.

Norms are taken in float64 over 16 interleaved partial sums, for each row alone, so that a row's
integers never depend on its neighbours. Scales stay on the client.
"""

from math import isqrt

import numpy as np
from numba import njit
from numpy.typing import NDArray

from blindtune.errors import UnsupportedError
from blindtune.protocol.kernels.compiled import kernel
from blindtune.protocol.kernels.reals import (
    add_reals,
    load_reals,
    multiply_reals,
    nearest,
    nearest_reals,
    real,
    repeated_real,
    store_reals,
    subtract_reals,
    total_of_half,
)
from blindtune.protocol.kernels.row_blocks import for_row_blocks
from blindtune.protocol.kernels.vectors import (
    LANES,
    add,
    even_words,
    load,
    multiply_signed,
    odd_words,
    repeated_half,
    store,
)
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.residues import Centred

__all__ = [
    "dequantize_row",
    "dequantize_rows",
    "not_finite",
    "quantize_row",
    "quantize_rows",
    "radius_of",
    "real_value",
    "real_values",
    "remainder",
    "square_budget",
]

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
def _values(row, column_scale, i):  # type: ignore[no-untyped-def]
    if column_scale is None:
        return load_reals(row, i)
    return multiply_reals(load_reals(row, i), load_reals(column_scale, i))


@kernel
def _square_norm(row, column_scale, values, partial):  # type: ignore[no-untyped-def]
    """Copies a row, and sums up squares: those of columns k, k + 16, ... first, in order, then those sums."""
    whole = row.shape[0] - row.shape[0] % LANES
    sums = repeated_real(0.0)
    for i in range(0, whole, LANES):
        some = _values(row, column_scale, i)
        store_reals(values, i, some)
        sums = add_reals(sums, multiply_reals(some, some))
    store_reals(partial, 0, sums)
    for i in range(whole, row.shape[0]):
        values[i] = _value(row, column_scale, i)
        partial[i - whole] += values[i] * values[i]
    square = 0.0
    for k in range(LANES):
        square += partial[k]
    return square


@kernel
def _round(values, scale, out):  # type: ignore[no-untyped-def]
    """Rounds numbers times their scale, and returns the exact sum of squares."""
    columns = out.shape[0]
    whole = columns - columns % LANES
    factor = repeated_real(scale)
    sums = repeated_half(np.int64(0))
    for i in range(0, whole, LANES):
        integers = nearest(multiply_reals(load_reals(values, i), factor))
        even, odd = even_words(integers), odd_words(integers)
        sums = add(sums, add(multiply_signed(even, even), multiply_signed(odd, odd)))
        store(out, i, integers)
    total = np.int64(total_of_half(sums))
    for i in range(whole, columns):
        integer = np.int32(np.rint(values[i] * scale))
        total += np.int64(integer) * np.int64(integer)
        out[i] = integer
    return total


@kernel
def _round_diffused(values, scale, out, carried):  # type: ignore[no-untyped-def]
    """`_round` with errors diffused; ``carried``, float64 [16], is used meanwhile."""
    columns = out.shape[0]
    whole = columns - columns % LANES
    factor, carry = repeated_real(scale), repeated_real(0.0)
    sums = repeated_half(np.int64(0))
    for i in range(0, whole, LANES):
        wanted = add_reals(multiply_reals(load_reals(values, i), factor), carry)
        carry = subtract_reals(wanted, nearest_reals(wanted))
        integers = nearest(wanted)
        even, odd = even_words(integers), odd_words(integers)
        sums = add(sums, add(multiply_signed(even, even), multiply_signed(odd, odd)))
        store(out, i, integers)
    total = np.int64(total_of_half(sums))
    store_reals(carried, 0, carry)
    for i in range(whole, columns):
        integer = np.int32(np.rint(values[i] * scale + carried[i - whole]))
        total += np.int64(integer) * np.int64(integer)
        out[i] = integer
    return total


@kernel
def quantize_row(row, column_scale, budget, radius, diffused, out, values):  # type: ignore[no-untyped-def]
    """One row of `quantize_rows`.

    Each element is read once, so that whoever changes the row meanwhile does not get past the budget.

    Args:
        row, column_scale, budget, radius, diffused: contiguous; see `quantize_rows` and `radius_of`.
        out: int32 [columns], receives the integers.
        values: float64 [columns + 16], used meanwhile.

    Returns:
        The scale, or nan if a value is not finite.
    """
    spare = values[row.shape[0] :]
    square = _square_norm(row, column_scale, values, spare)
    if not np.isfinite(square):
        return np.nan
    if square == 0.0:
        # Infinitely fine: whatever noise a mask adds to the result of zeros comes back as zero.
        out[:] = 0
        return np.inf
    scale = radius / np.sqrt(square)
    while (_round_diffused(values, scale, out, spare) if diffused else _round(values, scale, out)) > budget:
        scale *= 1.0 - 2.0**-30
    return scale


@kernel
def _quantize(x, column_scale, budget, radius, diffused, out, scales, start, stop):  # type: ignore[no-untyped-def]
    values = np.empty(x.shape[1] + LANES, np.float64)
    for r in range(start, stop):
        scales[r] = quantize_row(x[r], column_scale, budget, radius, diffused, out[r], values)
        if np.isnan(scales[r]):
            return r
    return -1


def radius_of(x: Float32, budget: int, column_scale: Float32 | None, diffused: bool) -> float:
    """The norm of a row of integers that stays within the budget after rounding, for `quantize_row`.

    Raises:
        UnsupportedError, ValueError: as `quantize_rows` does, but for values that are not finite.
    """
    columns = x.shape[1]
    radius = isqrt(budget) - columns**0.5 * (1.0 if diffused else 0.5)
    if radius < 1:
        raise UnsupportedError(f"rows of {columns} columns leave no precision within a budget of {budget}")
    if column_scale is not None and (
        column_scale.dtype != np.float32
        or column_scale.shape != (columns,)
        or not (np.isfinite(column_scale) & (column_scale > 0)).all()
    ):
        raise ValueError(f"the column scales are not {columns} positive finite numbers")
    return radius


def not_finite(row: int, rows: int) -> UnsupportedError:
    """The error for a row that `quantize_row` refuses. It tells no values."""
    return UnsupportedError(
        f"row {row} of {rows} holds a value that is not finite (inf or nan): "
        "lower the learning rate, or train in bf16 or fp32; fp16 loss scaling is not supported"
    )


def quantize_rows(
    x: Float32, budget: int, column_scale: Float32 | None = None, diffused: bool = False
) -> tuple[Centred, Float64]:
    """Rounds each row, times its own scale, to integers within the budget.

    Args:
        x: float32 [rows, columns]. With ``column_scale``, column i counts as x[:, i] * column_scale[i].
        budget: S, from `square_budget`.
        column_scale: float32 [columns], positive and finite.
        diffused: whether rounding diffuses its errors, as operands of a `Product` that says so need it.

    Returns:
        Integers, int32 [rows, columns], and scales, float64 [rows]: integers ~ scale * row. A row of
        zeros stays zeros, and its scale is infinite, so that its result is zero under any noise.

    Raises:
        UnsupportedError: a value is not finite, or the rows are too wide for the budget.
        ValueError: the column scales don't fit.
    """
    radius = radius_of(x, budget, column_scale, diffused)
    rows, columns = x.shape
    x = np.ascontiguousarray(x)
    column_scale = None if column_scale is None else np.ascontiguousarray(column_scale)
    out = np.empty((rows, columns), np.int32)
    scales = np.empty(rows, np.float64)
    failed: list[int] = []

    def block(start: int, stop: int) -> None:
        bad = _quantize(x, column_scale, budget, radius, diffused, out, scales, start, stop)
        if bad >= 0:
            failed.append(bad)

    for_row_blocks(rows, columns, block)
    if failed:
        raise not_finite(min(failed), rows)
    return out, scales


def remainder(x: Float32, column_scale: Float32 | None, scales: Float64, z: Centred) -> Float32:
    """What integers in the place of scaled rows leave: scale * row - z, float32 [rows, columns].

    Args:
        x, column_scale: as for `quantize_rows`.
        scales: float64 [rows], finite.
        z: integers [rows, columns].
    """
    values = x.astype(np.float64)
    if column_scale is not None:
        values *= column_scale
    values *= scales[:, np.newaxis]
    return (values - z).astype(np.float32)


@njit(inline="always")
def real_values(integers, factor, column_scale, j):  # type: ignore[no-untyped-def]
    """What `dequantize_row` makes of sixteen integers, for columns from j on; ``factor`` is 1 / scale."""
    return multiply_reals(multiply_reals(real(integers), factor), load_reals(column_scale, j))


@njit(inline="always")
def real_value(integer, inverse, column_scale):  # type: ignore[no-untyped-def]
    """What `dequantize_row` makes of one integer."""
    return np.float32(np.float64(integer) * inverse * np.float64(column_scale))


@kernel
def dequantize_row(y, scale, column_scale, out):  # type: ignore[no-untyped-def]
    """One row of `dequantize_rows`."""
    whole = y.shape[0] - y.shape[0] % LANES
    inverse = 1.0 / scale
    factor = repeated_real(inverse)
    for j in range(0, whole, LANES):
        store_reals(out, j, real_values(load(y, j), factor, column_scale, j))
    for j in range(whole, y.shape[0]):
        out[j] = real_value(y[j], inverse, column_scale[j])


@kernel
def _dequantize(y, scales, column_scale, out, start, stop):  # type: ignore[no-untyped-def]
    for r in range(start, stop):
        dequantize_row(y[r], scales[r], column_scale, out[r])


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
    if y.dtype != np.int32:
        raise ValueError(f"the product's integers have elements of type int32, not {y.dtype}")
    y, column_scale = np.ascontiguousarray(y), np.ascontiguousarray(column_scale)
    out = np.empty(y.shape, np.float32)
    rows, columns = y.shape
    for_row_blocks(rows, columns, lambda a, b: _dequantize(y, scales, column_scale, out, a, b))
    return out
