"""One pass from floating point to shares and back gives what one step after the other gives, bit for bit."""

import hashlib
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from blindtune.errors import UnsupportedError
from blindtune.protocol.fixed_point import dequantize_rows, quantize_rows
from blindtune.protocol.kernels import recycled
from blindtune.protocol.kernels.recycled import large_matrix
from blindtune.protocol.parameters import Q24, Q31
from blindtune.protocol.products import Product, forward_products
from blindtune.protocol.residues import dots_fit
from blindtune.protocol.shares.source import ShareSource

BUDGET = 1 << 58


def product(columns: int) -> Product:
    return forward_products(["layer"], columns)[0]


def known_bytes() -> Callable[[int], bytes]:
    """The same in each source, and different at each call."""
    calls = 0

    def draw(count: int) -> bytes:
        nonlocal calls
        calls += 1
        return hashlib.shake_256(str(calls).encode()).digest(count)

    return draw


def rows_of(rows: int, columns: int, seed: int = 0) -> NDArray[np.float32]:
    """Of all magnitudes, some of them zeros."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((rows, columns)) * 10.0 ** generator.integers(-38, 31, (rows, 1))
    x[generator.random(rows) < 0.2] = 0
    return x.astype(np.float32)


@given(
    rows=st.integers(1, 40),
    columns=st.one_of(st.integers(1, 70), st.integers(250, 520)),
    operators=st.integers(2, 4),
    scaled=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_one_pass_gives_the_integers_scales_masks_and_numbers_of_its_steps(
    rows: int, columns: int, operators: int, scaled: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    parameters = (Q31, Q24)[seed % 2]
    q, budget = parameters.modulus, min(BUDGET, parameters.half**2)
    x = rows_of(rows, columns, seed)
    column_scale = generator.uniform(1e-3, 2, columns).astype(np.float32) if scaled else None
    vectors = generator.integers(0, q, (parameters.vectors, columns), dtype=np.uint32)
    image, u = generator.integers(0, 1 << 32, (2, columns), dtype=np.uint32)
    integers, scales = quantize_rows(x, budget, column_scale)
    steps = ShareSource(operators, parameters, known_bytes()).hide_integers(integers, product(columns))
    hidden, found = ShareSource(operators, parameters, known_bytes()).hide_reals(
        x, product(columns), budget, column_scale, vectors, image
    )
    assert np.array_equal(found, scales)
    assert steps.expected_sums is None and hidden.expected_sums is not None
    assert np.array_equal(hidden.expected_sums, integers.astype(np.uint32) @ image)
    for share, expected in zip(hidden.shares, steps.shares, strict=True):
        assert share.seed == expected.seed
        assert share.shape == expected.residues.shape
        assert np.array_equal(share.residues, expected.residues)
        assert share.expected is not None
        exact = (vectors.astype(object) @ share.residues.T.astype(object)) % q
        assert share.expected.shape == (parameters.vectors, rows) and np.array_equal(share.expected, exact)
    answers = [generator.integers(0, q, (rows, columns), dtype=np.uint32) for _ in range(operators)]
    y = hidden.reveal_reals(answers, scales, column_scale)
    assert y.dtype == np.float32
    unmasked = steps.reveal_integers(answers)
    assert np.array_equal(y, dequantize_rows(unmasked, scales, column_scale))
    revealed = hidden.reveal_reals_with_sums(answers, scales, column_scale, u)
    assert np.array_equal(revealed.values, y)
    assert np.array_equal(revealed.sums, unmasked.astype(np.uint32) @ u)
    assert np.array_equal(revealed.peaks, np.abs(unmasked).max(axis=1))
    some = np.arange(rows)[::3]
    again = hidden.rows_again(answers, some)
    assert np.array_equal(again[0], integers[some]) and np.array_equal(again[1], unmasked[some])


@pytest.mark.parametrize("columns", [63, 64, 65, 500])
@pytest.mark.parametrize("operators", [2, 3])
def test_numbers_are_exact_on_both_sides_of_where_int64_holds_them(columns: int, operators: int) -> None:
    assert dots_fit(BUDGET, columns, Q31) == (columns <= 64)
    x = np.ones((4, columns), np.float32)
    x[1] *= -1
    x[2, ::3] = 0
    for v in (
        np.full(columns, Q31.modulus - 1, np.uint32),
        np.resize([0, Q31.modulus - 1], columns).astype(np.uint32),
    ):
        hidden, _ = ShareSource(operators, Q31).hide_reals(x, product(columns), BUDGET, v=v[None])
        for share in hidden.shares:
            assert share.expected is not None
            assert np.array_equal(
                share.expected[0], (share.residues.astype(object) @ v.astype(object)) % Q31.modulus
            )


def test_many_rows_in_threads_give_the_same() -> None:
    x = rows_of(700, 300)
    v = np.arange(300, dtype=np.uint32)
    integers, scales = quantize_rows(x, BUDGET)
    steps = ShareSource(2, Q31, known_bytes()).hide_integers(integers, product(300))
    hidden, found = ShareSource(2, Q31, known_bytes()).hide_reals(x, product(300), BUDGET, v=v[None])
    assert np.array_equal(found, scales)
    for share, expected in zip(hidden.shares, steps.shares, strict=True):
        assert np.array_equal(share.residues, expected.residues)
        assert np.array_equal(share.rows(650, 700).residues, expected.residues[650:])
        assert share.expected is not None
        assert np.array_equal(
            share.expected[0], (share.residues.astype(object) @ v.astype(object)) % Q31.modulus
        )


def test_arrays_that_are_not_contiguous_are_read_right() -> None:
    x, v = rows_of(20, 128)[:, ::2], np.arange(128, dtype=np.uint32)[::2]
    hidden, scales = ShareSource(2, Q31, known_bytes()).hide_reals(x, product(64), BUDGET, v=v[None])
    again, same = ShareSource(2, Q31, known_bytes()).hide_reals(
        x.copy(), product(64), BUDGET, v=v[None].copy()
    )
    assert np.array_equal(scales, same)
    for share, expected in zip(hidden.shares, again.shares, strict=True):
        assert np.array_equal(share.residues, expected.residues)
        assert np.array_equal(share.expected, expected.expected)  # type: ignore[arg-type]
    integers, alone = quantize_rows(x, BUDGET)
    assert np.array_equal(alone, scales)
    assert np.array_equal(integers, quantize_rows(x.copy(), BUDGET)[0])


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("place", [(0, 0), (3, 16), (4, 32)])
def test_a_value_that_is_not_finite_is_refused_with_the_same_words(
    value: float, place: tuple[int, int]
) -> None:
    x = np.ones((5, 33), np.float32)
    x[place] = value
    with pytest.raises(UnsupportedError) as steps:
        quantize_rows(x, BUDGET)
    with pytest.raises(UnsupportedError) as one_pass:
        ShareSource(2, Q31).hide_reals(x, product(33), BUDGET)
    assert str(one_pass.value) == str(steps.value)


def test_a_budget_beyond_what_a_mask_hides_is_refused() -> None:
    x = np.ones((1, 1), np.float32)
    ShareSource(2, Q31).hide_reals(x, product(1), Q31.half**2)
    with pytest.raises(ValueError, match="no centred residues"):
        ShareSource(2, Q31).hide_reals(x, product(1), (Q31.half + 1) ** 2)


def test_rows_of_another_width_or_type_than_the_product_takes_are_refused() -> None:
    for x in (np.ones((2, 3), np.float32), np.ones((2, 4), np.float64)):
        with pytest.raises(ValueError, match="columns|float32"):
            ShareSource(2, Q31).hide_reals(x, product(4), BUDGET)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_shares_of_constant_rows_look_uniform(value: float) -> None:
    hidden, _ = ShareSource(2, Q31).hide_reals(np.full((300, 500), value, np.float32), product(500), BUDGET)
    for share in hidden.shares:
        counts = np.bincount(share.residues.ravel() >> 23, minlength=256)
        assert np.abs(counts - 150_000 / 256).max() < 6 * (150_000 / 256) ** 0.5


def test_two_operands_never_share_a_mask() -> None:
    source = ShareSource(2, Q31)
    x = np.zeros((3, 8), np.float32)
    first, second = (source.hide_reals(x, product(8), BUDGET)[0] for _ in range(2))
    for one, other in zip(first.shares, second.shares, strict=True):
        assert not np.array_equal(one.residues, other.residues)


def test_what_is_expected_of_answers_is_not_printed() -> None:
    hidden, _ = ShareSource(2, Q31).hide_reals(
        np.ones((1, 4), np.float32), product(4), BUDGET, v=np.arange(1, 5, dtype=np.uint32)[None]
    )
    for share in hidden.shares:
        assert share.expected is not None
        assert str(share.expected[0]) not in repr(share)
        assert str(share.residues[0, 0]) not in repr(share)


def test_memory_is_not_used_again_while_any_part_of_a_matrix_is_referred_to() -> None:
    matrix = large_matrix(1024, 512, np.uint32)
    matrix[:] = 7
    part = matrix[1000:].view()
    del matrix
    others = [large_matrix(1024, 512, np.uint32) for _ in range(4)]
    for other in others:
        other[:] = 8
    assert (part == 7).all()
    assert not any(np.shares_memory(a, b) for a in others for b in (part, *others) if a is not b)


def test_memory_is_used_again_once_nobody_refers_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recycled, "_kept", SimpleQueue())  # without what other tests left
    matrix = large_matrix(1111, 333, np.float32)
    address = matrix.ctypes.data
    del matrix
    assert large_matrix(333, 1111, np.uint32).ctypes.data == address


@pytest.mark.parametrize("shape", [(1024, 256), (1023, 1111), (4000, 8192)])
def test_large_matrices_begin_with_a_cache_line(shape: tuple[int, int]) -> None:
    others = [large_matrix(*shape, np.uint32) for _ in range(3)]
    assert [matrix.ctypes.data % 64 for matrix in others] == [0] * 3
    assert [matrix.shape for matrix in others] == [shape] * 3


def test_of_the_largest_matrices_fewer_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recycled, "_kept", SimpleQueue())
    for rows, most in ((1 << 18, 8), (1 << 25, 3)):
        matrices = [large_matrix(rows, 1, np.uint32) for _ in range(10)]
        del matrices
        assert recycled._kept.qsize() == most


def test_what_is_kept_is_given_back_when_memory_runs_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recycled, "_kept", SimpleQueue())
    held = large_matrix(1111, 333, np.float32)
    held[:] = 7
    del held
    assert recycled._kept.qsize() == 1
    recycled.give_back()
    assert recycled._kept.qsize() == 0
