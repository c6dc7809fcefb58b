"""Fixed point in exact arithmetic: the budget, the bound on products, scales, and the way back."""

from collections.abc import Callable
from fractions import Fraction
from math import isqrt, sqrt

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blindtune.errors import UnsupportedError
from blindtune.protocol.fixed_point import _quantize, dequantize_rows, quantize_rows, square_budget
from blindtune.protocol.parameters import Q31

HALF = (Q31.modulus - 1) // 2
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = 2.0**-149
"""The smallest denormal of float32."""

BUDGETS = [
    pytest.param(square_budget(Q31, 0), id="zero matrix"),
    pytest.param(square_budget(Q31, 127 * 127), id="one weight"),
    pytest.param(square_budget(Q31, 2048 * 40 * 40), id="2048 weights"),
    pytest.param(square_budget(Q31, 32_768 * 127 * 127), id="32768 extreme weights"),
]


def square_sums(integers: np.ndarray) -> list[int]:
    return [sum(int(z) ** 2 for z in row) for row in integers]


def exact_row(x: np.ndarray, column_scale: np.ndarray | None = None) -> list[Fraction]:
    scale = np.ones(x.size, np.float32) if column_scale is None else column_scale
    return [Fraction(float(a)) * Fraction(float(b)) for a, b in zip(x, scale, strict=True)]


def largest_rounding_error(
    x: np.ndarray, integers: np.ndarray, scales: np.ndarray, column_scale: np.ndarray | None = None
) -> float:
    """max |z - scale x| over the elements, in exact arithmetic."""
    worst = Fraction(0)
    for row, z, scale in zip(x, integers, scales, strict=True):
        for value, integer in zip(exact_row(row, column_scale), z, strict=True):
            worst = max(worst, abs(int(integer) - Fraction(float(scale)) * value))
    return float(worst)


def gaussian(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def single_outlier(outlier: float, others: float) -> Callable[[int, int], np.ndarray]:
    def rows(count: int, columns: int) -> np.ndarray:
        x = np.full((count, columns), others, np.float32)
        x[np.arange(count), np.arange(count) % columns] = outlier
        return x

    return rows


def all_scales_of_magnitude(rows: int, columns: int) -> np.ndarray:
    exponents = np.random.default_rng(1).uniform(-149, 127, (rows, columns))
    return (np.exp2(exponents) * np.sign(gaussian(rows, columns))).astype(np.float32)


KINDS: dict[str, Callable[[int, int], np.ndarray]] = {
    "gaussian": gaussian,
    "1e30": lambda rows, columns: gaussian(rows, columns) * np.float32(1e30),
    "largest float32": lambda rows, columns: np.full((rows, columns), LARGEST, np.float32),
    "1e-38": lambda rows, columns: gaussian(rows, columns) * np.float32(1e-38),
    "denormal": lambda rows, columns: np.full((rows, columns), -SMALLEST, np.float32),
    "all magnitudes": all_scales_of_magnitude,
    "outlier of 1e30 among 1": single_outlier(1e30, 1.0),
    "outlier of 1 among 1e-38": single_outlier(1.0, -1e-38),
    "outlier among zeros": single_outlier(-3.0, 0.0),
    "all equal": lambda rows, columns: np.full((rows, columns), 1.1, np.float32),
    "ramp": lambda rows, columns: np.tile(np.arange(1, columns + 1, dtype=np.float32), (rows, 1)),
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(column=st.integers(0, 1 << 40), noise=st.integers(0, HALF - 1))
@example(0, 0)
@example(1, HALF - 1)
def test_the_budget_is_the_largest_that_cauchy_and_schwarz_allow(column: int, noise: int) -> None:
    budget, room = square_budget(Q31, column, noise), HALF - noise
    assert budget * max(column, 1) <= room * room < (budget + 1) * max(column, 1)
    assert budget < 1 << 62


@pytest.mark.parametrize("noise", [HALF, HALF + 1, Q31.modulus])
def test_noise_that_fills_the_range_is_refused(noise: int) -> None:
    with pytest.raises(UnsupportedError, match=str(noise)):
        square_budget(Q31, 100, noise)


@EACH_KIND
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 33])
def test_no_row_exceeds_its_budget_nor_wastes_it(kind: str, budget: int, columns: int) -> None:
    x = KINDS[kind](3, columns)
    integers, scales = quantize_rows(x, budget)
    assert integers.dtype == np.int32 and scales.dtype == np.float64
    assert np.all(np.isfinite(scales)) and np.all(scales > 0)
    squares = square_sums(integers)
    assert max(squares) <= budget
    # Aimed at sqrt(S) - sqrt(d)/2, and rounding moves a row by at most sqrt(d)/2 from there.
    assert min(squares) >= (isqrt(budget) - sqrt(columns) - 1) ** 2
    # Half a unit, and the rounding of float64 products of up to 2^30.
    assert largest_rounding_error(x, integers, scales) <= 0.5 + 2.0**-21


@pytest.mark.parametrize("kind", ["gaussian", "1e30", "1e-38", "denormal", "all magnitudes"])
def test_4097_rows_in_threads_stay_within_the_budget(kind: str) -> None:
    x = KINDS[kind](4097, 40)
    budget = square_budget(Q31, 2048 * 40 * 40)
    integers, _ = quantize_rows(x, budget)
    squares = (integers.astype(np.int64) ** 2).sum(axis=1)  # Each below 2^31 squared over 2048: exact.
    assert int(squares.max()) <= budget
    assert int(squares.min()) >= (isqrt(budget) - sqrt(40) - 1) ** 2


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    x=st.lists(
        st.one_of(
            st.floats(width=32, allow_nan=False, allow_infinity=False),
            st.sampled_from([0.0, -0.0, 1.0, -1.0, SMALLEST, 1e-38, LARGEST, -LARGEST]),
        ),
        min_size=1,
        max_size=40,
    ),
    column=st.integers(0, 32_768 * 127 * 127),
)
def test_any_finite_row_stays_within_any_budget(x: list[float], column: int) -> None:
    row, budget = np.array([x], np.float32), square_budget(Q31, column)
    integers, scales = quantize_rows(row, budget)
    assert square_sums(integers)[0] <= budget
    if np.any(row):
        assert largest_rounding_error(row, integers, scales) <= 0.5 + 2.0**-21
        assert square_sums(integers)[0] >= (isqrt(budget) - sqrt(len(x)) - 1) ** 2


def by_definition(
    x: np.ndarray, budget: int, column_scale: np.ndarray | None
) -> tuple[list[list[int]], list[float]]:
    """Integers and scales in Python's floats: sixteen interleaved sums, added in order."""
    integers, scales = [], []
    for row in x:
        values = [float(v) for v in row]
        if column_scale is not None:
            values = [v * float(c) for v, c in zip(values, column_scale, strict=True)]
        partial = [0.0] * 16
        for i, value in enumerate(values):
            partial[i % 16] += value * value
        square = 0.0
        for part in partial:
            square += part
        if square == 0:
            integers.append([0] * len(values))
            scales.append(np.inf)
            continue
        scale = (isqrt(budget) - len(values) ** 0.5 / 2) / sqrt(square)
        while sum(round(v * scale) ** 2 for v in values) > budget:
            scale *= 1.0 - 2.0**-30
        integers.append([round(v * scale) for v in values])
        scales.append(scale)
    return integers, scales


@EACH_KIND
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 127, 128, 129, 143, 144, 300, 1024])
@pytest.mark.parametrize("scaled", [False, True])
def test_integers_and_scales_are_those_of_the_definition_to_the_bit(
    kind: str, columns: int, scaled: bool
) -> None:
    x, budget = KINDS[kind](3, columns), square_budget(Q31, 2048 * 40 * 40)
    x[1] = 0
    column_scale = np.exp(gaussian(1, columns, seed=6)[0]).astype(np.float32) if scaled else None
    integers, scales = quantize_rows(x, budget, column_scale)
    expected_integers, expected_scales = by_definition(x, budget, column_scale)
    assert integers.tolist() == expected_integers
    assert scales.tolist() == expected_scales


def test_rows_whose_elements_all_round_up_stay_within_the_budget() -> None:
    # Small budgets and equal elements: rounding up moves the norm by sqrt(d)/2, the most it can.
    for columns in (4, 9, 16, 64, 100):
        x = np.ones((1, columns), np.float32)
        for budget in range(isqrt(columns) ** 2 * 4, isqrt(columns) ** 2 * 40):
            integers, _ = quantize_rows(x, budget)
            assert square_sums(integers)[0] <= budget


def test_a_first_attempt_that_is_too_large_is_lowered_until_it_fits() -> None:
    # The radius that is used makes this unnecessary but for rounding; the proof rests on it all the same.
    x, budget = gaussian(5, 40), 10**12
    integers, scales = np.empty((5, 40), np.int32), np.empty(5)
    radius = isqrt(budget) * (1 + 1e-6)
    assert _quantize(x, np.ones(40, np.float32), budget, radius, False, integers, scales, 0, 5) == -1
    assert max(square_sums(integers)) <= budget
    assert min(square_sums(integers)) >= (isqrt(budget) - sqrt(40) - 1) ** 2
    assert largest_rounding_error(x, integers, scales) <= 0.5 + 2.0**-21


@pytest.mark.parametrize("aligned", ["exactly", "by sign", "with noise"])
@pytest.mark.parametrize(("contraction", "outputs"), [(1, 5), (64, 40), (3000, 7), (32_768, 2)])
def test_no_output_wraps_for_an_operand_aligned_with_the_worst_column(
    contraction: int, outputs: int, aligned: str
) -> None:
    generator = np.random.default_rng(contraction)
    matrix = generator.integers(-127, 128, (contraction, outputs)).astype(object)
    matrix[:, -1] = generator.choice([-127, 127], contraction)
    column_sums = [sum(int(m) ** 2 for m in matrix[:, j]) for j in range(outputs)]
    assert column_sums[-1] == max(column_sums)
    noise = 5_000_000 if aligned == "with noise" else 0
    budget = square_budget(Q31, max(column_sums), noise)
    for column in range(min(outputs, 4) * -1, 0):
        direction = matrix[:, column].astype(np.float32)
        x = np.sign(direction) if aligned == "by sign" else direction
        rows = np.stack([x, -x, x * np.float32(1e30), x * np.float32(1e-38)])
        integers, _ = quantize_rows(rows, budget)
        products = integers.astype(object) @ matrix
        assert max(abs(int(p)) for p in products.flat) <= HALF - noise
        if column == -1 and contraction < 32_768:
            # The bound is met with equality up to rounding, so a budget a little larger would wrap.
            assert min(abs(int(p)) for p in products[:, -1]) >= 0.99 * (HALF - noise)


def test_a_product_beyond_the_bound_would_wrap() -> None:
    # The budget is not generous: one more unit of the largest operand passes (q - 1)/2.
    budget = square_budget(Q31, 127 * 127)
    integers, _ = quantize_rows(np.array([[1.0]], np.float32), budget)
    assert abs(int(integers[0, 0])) * 127 <= HALF < (abs(int(integers[0, 0])) + 2) * 127


@pytest.mark.parametrize("kind", ["gaussian", "all magnitudes", "outlier of 1e30 among 1"])
def test_a_rows_integers_are_the_same_alone_in_any_batch_and_at_any_position(kind: str) -> None:
    x, budget = KINDS[kind](5000, 37), square_budget(Q31, 10**6)
    order = np.random.default_rng(3).permutation(len(x))
    integers, scales = quantize_rows(x, budget)
    shuffled, shuffled_scales = quantize_rows(np.ascontiguousarray(x[order]), budget)
    assert np.array_equal(shuffled, integers[order])
    assert np.array_equal(shuffled_scales, scales[order])
    for row in (0, 1, 2499, 2500, 4999):
        alone, scale = quantize_rows(np.ascontiguousarray(x[row : row + 1]), budget)
        assert np.array_equal(alone[0], integers[row]) and scale[0] == scales[row]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.data())
def test_neighbours_of_any_kind_do_not_change_a_row(data: st.DataObject) -> None:
    kinds = data.draw(st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=6))
    columns = data.draw(st.integers(1, 50))
    x = np.concatenate([KINDS[kind](1, columns) for kind in kinds] + [np.zeros((1, columns), np.float32)])
    integers, scales = quantize_rows(x, 10**12)
    for row in range(len(x)):
        alone, scale = quantize_rows(x[row : row + 1], 10**12)
        assert np.array_equal(alone[0], integers[row]) and scale[0] == scales[row]


@pytest.mark.parametrize("strides", ["transposed", "every second column"])
def test_the_memory_layout_of_the_operand_does_not_change_its_integers(strides: str) -> None:
    x = gaussian(70, 80)
    view = np.asfortranarray(x) if strides == "transposed" else np.repeat(x, 2, axis=1)[:, ::2]
    for a, b in zip(quantize_rows(view, 10**12), quantize_rows(x, 10**12), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(("rows", "row", "column"), [(1, 0, 0), (3, 2, 32), (3, 1, 15), (4097, 4096, 39)])
def test_a_value_that_is_not_finite_is_refused_with_its_row(
    value: float, rows: int, row: int, column: int
) -> None:
    x = gaussian(rows, 40)
    x[row, column] = value
    with pytest.raises(UnsupportedError, match=f"row {row} of {rows} "):
        quantize_rows(x, 10**12)


def test_the_first_of_several_bad_rows_is_named_also_when_threads_find_them() -> None:
    x = gaussian(5000, 40)
    x[[4999, 2600, 713, 714], 3] = np.nan
    with pytest.raises(UnsupportedError, match="row 713 of 5000 "):
        quantize_rows(x, 10**12)


def test_a_message_about_a_bad_row_tells_no_values() -> None:
    x = np.full((2, 3), 123.25, np.float32)
    x[1, 1] = np.inf
    with pytest.raises(UnsupportedError) as caught:
        quantize_rows(x, 10**12)
    assert "123" not in str(caught.value)


def test_rows_of_zeros_stay_zeros_whatever_noise_their_mask_leaves() -> None:
    x = gaussian(5, 20)
    x[[0, 3]] = 0
    x[3, ::2] = -0.0
    integers, scales = quantize_rows(x, 10**12)
    assert not np.any(integers[[0, 3]])
    assert np.all(np.any(integers[[1, 2, 4]], axis=1))
    noisy = integers + np.arange(-10, 10, dtype=np.int32)
    assert not np.any(dequantize_rows(noisy, scales)[[0, 3]])
    assert np.all(np.isfinite(dequantize_rows(noisy, scales)))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_operands_give_empty_integers(shape: tuple[int, int]) -> None:
    integers, scales = quantize_rows(np.empty(shape, np.float32), 10**12)
    assert integers.shape == shape and scales.shape == shape[:1]


def test_a_budget_too_small_for_the_width_is_refused() -> None:
    quantize_rows(np.ones((1, 100), np.float32), 36)
    with pytest.raises(UnsupportedError, match="100 columns"):
        quantize_rows(np.ones((1, 100), np.float32), 35)


@pytest.mark.parametrize("columns", [64, 2048, 8192])
def test_the_relative_error_of_a_row_is_what_uniform_rounding_predicts(columns: int) -> None:
    # A rounding error is uniform in +-1/2 with variance 1/12, against a norm of sqrt(S) - sqrt(d)/2.
    x, budget = gaussian(32, columns), square_budget(Q31, columns * 40 * 40)
    integers, scales = quantize_rows(x, budget)
    error = np.linalg.norm(integers / scales[:, None] - x, axis=1) / np.linalg.norm(x, axis=1)
    predicted = sqrt(columns / 12) / (sqrt(budget) - sqrt(columns) / 2)
    assert 0.95 < float(error.mean()) / predicted < 1.05


def test_scaling_a_row_by_a_power_of_two_changes_its_scale_only() -> None:
    x, budget = gaussian(8, 50), 10**12
    integers, scales = quantize_rows(x, budget)
    for exponent in (-100, -1, 1, 100):
        scaled, other = quantize_rows(x * np.float32(2.0**exponent), budget)
        assert np.array_equal(scaled, integers)
        assert np.array_equal(other * 2.0**exponent, scales)


# Column scales.


def test_a_column_scale_of_powers_of_two_equals_scaling_the_operand() -> None:
    x = gaussian(9, 45)
    column_scale = np.exp2(np.random.default_rng(5).integers(-20, 20, 45)).astype(np.float32)
    for a, b in zip(
        quantize_rows(x, 10**12, column_scale), quantize_rows(x * column_scale, 10**12), strict=True
    ):
        assert np.array_equal(a, b)


@EACH_KIND
def test_scaled_columns_stay_within_the_budget_and_are_rounded_once(kind: str) -> None:
    x = KINDS[kind](2, 33)
    column_scale = np.exp(gaussian(1, 33, seed=6)[0] * 3).astype(np.float32)
    column_scale[[3, 20]] = SMALLEST, LARGEST
    for budget in (10**9, square_budget(Q31, 0)):
        integers, scales = quantize_rows(x, budget, column_scale)
        assert max(square_sums(integers)) <= budget
        assert min(square_sums(integers)) >= (isqrt(budget) - sqrt(33) - 1) ** 2
        assert largest_rounding_error(x, integers, scales, column_scale) <= 0.5 + 2.0**-21


def test_ones_as_column_scale_change_nothing() -> None:
    x, ones = gaussian(4, 20), np.ones(20, np.float32)
    for a, b in zip(quantize_rows(x, 10**12, ones), quantize_rows(x, 10**12), strict=True):
        assert np.array_equal(a, b)
    y, scales = quantize_rows(x, 10**12)
    assert np.array_equal(dequantize_rows(y, scales, ones), dequantize_rows(y, scales))


# The way back.


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    y=st.integers(-HALF, HALF),
    scale=st.floats(2.0**-100, 2.0**180),
    column_scale=st.floats(2.0**-100, 2.0**100, width=32),
)
def test_an_element_comes_back_as_the_nearest_float32_of_the_exact_quotient(
    y: int, scale: float, column_scale: float
) -> None:
    result = dequantize_rows(
        np.array([[y]], np.int32), np.array([scale]), np.array([column_scale], np.float32)
    )
    assert result.dtype == np.float32
    exact = Fraction(y) / Fraction(scale) * Fraction(column_scale)
    if abs(exact) > Fraction(LARGEST):
        assert abs(result[0, 0]) >= np.float32(LARGEST)
        return
    # Half a unit in the last place of float32, and three roundings in float64.
    unit = max(abs(exact) * Fraction(2) ** -23, Fraction(2) ** -149)
    assert abs(Fraction(float(result[0, 0])) - exact) <= unit / 2 + abs(exact) * Fraction(2) ** -50


def test_scales_belong_to_rows_and_column_scales_to_columns() -> None:
    y = np.array([[1, 2, 3], [10, 20, 30]], np.int32)
    result = dequantize_rows(y, np.array([2.0, 5.0]), np.array([1.0, 10.0, 100.0], np.float32))
    assert result.tolist() == [[0.5, 10.0, 150.0], [2.0, 40.0, 600.0]]


def test_dequantizing_in_threads_equals_numpy() -> None:
    generator = np.random.default_rng(0)
    y = generator.integers(-HALF, HALF, (4097, 50)).astype(np.int32)
    scales, columns = generator.uniform(1, 2, 4097), generator.uniform(1, 2, 50).astype(np.float32)
    expected = y * (1 / scales)[:, None] * columns.astype(np.float64)
    assert np.array_equal(dequantize_rows(y, scales, columns), expected.astype(np.float32))


@EACH_KIND
def test_quantizing_and_dequantizing_returns_each_row_within_half_a_unit(kind: str) -> None:
    x, budget = KINDS[kind](3, 33), square_budget(Q31, 127 * 127)
    integers, scales = quantize_rows(x, budget)
    back = dequantize_rows(integers, scales)
    assert np.all(np.isfinite(back))
    for row in range(3):
        unit = 1 / scales[row]
        error = np.abs(back[row].astype(np.float64) - x[row])
        # Plus the rounding to float32.
        assert np.all(error <= 0.50001 * unit + np.abs(x[row].astype(np.float64)) * 2.0**-23 + 2.0**-150)


def test_a_forward_product_comes_back_as_the_real_product() -> None:
    x = gaussian(6, 300) * np.array([[1], [1e30], [1e-38], [1e-3], [0], [7]], np.float32)
    generator = np.random.default_rng(2)
    weights = generator.integers(-127, 128, (40, 300))
    weight_scales = generator.uniform(1e-4, 1e-2, 40).astype(np.float32)
    integers, scales = quantize_rows(x, square_budget(Q31, int((weights**2).sum(axis=1).max())))
    y = (integers.astype(object) @ weights.T.astype(object)).astype(np.int32)
    result = dequantize_rows(y, scales, weight_scales).astype(np.float64)
    real = x.astype(np.float64) @ (weights * weight_scales[:, None].astype(np.float64)).T
    norms = np.linalg.norm(x.astype(np.float64), axis=1)[:, None] * np.linalg.norm(
        weights * weight_scales[:, None].astype(np.float64), axis=1
    )
    assert np.all(np.abs(result - real) <= norms * 2.0**-14 + 2.0**-149)
    assert not np.any(result[4])


def test_a_backward_product_of_stacked_layers_comes_back_with_one_scale() -> None:
    generator = np.random.default_rng(4)
    stacked = generator.integers(-127, 128, (90, 30))
    weight_scales = generator.uniform(1e-4, 1e-2, 90).astype(np.float32)
    gradients = gaussian(5, 90) * np.float32(1e-6)
    integers, scales = quantize_rows(
        gradients, square_budget(Q31, int((stacked**2).sum(axis=0).max())), weight_scales
    )
    y = (integers.astype(object) @ stacked.astype(object)).astype(np.int32)
    real = (gradients.astype(np.float64) * weight_scales) @ stacked
    error = np.linalg.norm(dequantize_rows(y, scales) - real) / np.linalg.norm(real)
    assert error < 2.0**-14


@pytest.mark.parametrize(
    "column_scale", [np.ones(21, np.float32), np.full(20, np.inf, np.float32)], ids=["too long", "infinite"]
)
def test_column_scales_that_do_not_fit_are_refused_as_such(column_scale: np.ndarray) -> None:
    with pytest.raises(ValueError, match="column"):
        quantize_rows(gaussian(2, 20), 10**12, column_scale)


@pytest.mark.parametrize(("scales", "columns"), [(3, 4), (2, 5)], ids=["rows", "columns"])
def test_scales_that_do_not_fit_a_product_are_refused(scales: int, columns: int) -> None:
    with pytest.raises(ValueError, match="scales"):
        dequantize_rows(np.ones((2, 4), np.int32), np.ones(scales), np.ones(columns, np.float32))
