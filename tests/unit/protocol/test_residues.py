"""Residue arithmetic against Python integers, and the refusal of words that are no residues."""

from dataclasses import replace
from math import isqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blindtune.errors import VerificationError
from blindtune.protocol.parameters import PARAMETER_SETS, Q31
from blindtune.protocol.residues import (
    add,
    centre,
    dot,
    dots_fit,
    from_centred,
    hide,
    hide_row,
    require_centred,
    require_residues,
    subtract,
    subtract_and_centre,
)

HALF = (Q31.modulus - 1) // 2
EXTREMES = [0, 1, 2, HALF - 1, HALF, HALF + 1, HALF + 2, Q31.modulus - 2, Q31.modulus - 1]
RESIDUE = st.one_of(st.sampled_from(EXTREMES), st.integers(0, Q31.modulus - 1))


def large(seed: int) -> np.ndarray:
    """Enough elements that kernels run in threads, with every extreme among them."""
    words = np.random.default_rng(seed).integers(0, Q31.modulus, (331, 1021), dtype=np.uint32)
    words.flat[:: words.size // 500] = np.resize(EXTREMES, words.flat[:: words.size // 500].size)
    return words


def test_the_modulus_is_the_31_bit_prime_of_the_design() -> None:
    assert Q31.modulus == 0x7FFE9001 == 2147389441
    assert Q31.modulus.bit_length() == 31 and Q31.modulus % 4096 == 1
    # Miller-Rabin with these bases is a proof below 3.2e9.
    odd, twos = Q31.modulus - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7):
        assert pow(base, odd, Q31.modulus) == 1 or any(
            pow(base, odd << i, Q31.modulus) == Q31.modulus - 1 for i in range(twos)
        )


def test_parameter_sets_refuse_what_the_kernels_cannot_hold() -> None:
    assert PARAMETER_SETS["q31"] is Q31 and Q31.half == HALF
    assert all(name == parameters.name for name, parameters in PARAMETER_SETS.items())
    with pytest.raises(ValueError, match="limbs"):
        replace(Q31, limbs=3)
    with pytest.raises(ValueError, match="limbs"):
        replace(Q31, lift=2139062144)
    with pytest.raises(ValueError, match="vectors"):
        replace(Q31, hint_vectors=0)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(pairs=st.lists(st.tuples(RESIDUE, RESIDUE), min_size=1, max_size=20))
def test_sums_and_differences_are_those_of_python_integers(pairs: list[tuple[int, int]]) -> None:
    a = np.array([[p[0] for p in pairs]], np.uint32)
    b = np.array([[p[1] for p in pairs]], np.uint32)
    assert add(a, b, Q31)[0].tolist() == [(x + y) % Q31.modulus for x, y in pairs]
    assert subtract(a, b, Q31)[0].tolist() == [(x - y) % Q31.modulus for x, y in pairs]


def test_every_pair_of_extremes_adds_and_subtracts_without_overflow() -> None:
    a = np.repeat(np.array(EXTREMES, np.uint32), len(EXTREMES))[None]
    b = np.tile(np.array(EXTREMES, np.uint32), len(EXTREMES))[None]
    assert add(a, b, Q31)[0].tolist() == [(x + y) % Q31.modulus for x in EXTREMES for y in EXTREMES]
    assert subtract(a, b, Q31)[0].tolist() == [(x - y) % Q31.modulus for x in EXTREMES for y in EXTREMES]


def test_matrices_large_enough_for_threads_add_and_subtract_alike() -> None:
    a, b = large(1), large(2)
    assert np.array_equal(add(a, b, Q31), (a.astype(np.int64) + b) % Q31.modulus)
    assert np.array_equal(subtract(a, b, Q31), (a.astype(np.int64) - b) % Q31.modulus)
    assert np.array_equal(subtract(add(a, b, Q31), b, Q31), a)


def test_centring_is_the_representative_of_smallest_magnitude() -> None:
    words = np.array([EXTREMES], np.uint32)
    expected = [min((x, x - Q31.modulus), key=abs) for x in EXTREMES]
    assert centre(words, Q31)[0].tolist() == expected
    assert centre(words, Q31).dtype == np.int32
    assert from_centred(np.array([expected], np.int32), Q31)[0].tolist() == EXTREMES


def test_centring_and_its_inverse_cancel_on_matrices_large_enough_for_threads() -> None:
    words = large(3)
    centred = centre(words, Q31)
    assert int(np.abs(centred.astype(np.int64)).max()) <= HALF
    assert np.array_equal(centred % np.int64(Q31.modulus), words)
    assert np.array_equal(from_centred(centred, Q31), words)


@pytest.mark.parametrize("word", [Q31.modulus, Q31.modulus + 1, 2 * Q31.modulus - 1, 1 << 31, (1 << 32) - 1])
@pytest.mark.parametrize("position", [(0, 0), (165, 500), (330, 1020)])
def test_one_word_of_q_or_more_anywhere_is_refused(word: int, position: tuple[int, int]) -> None:
    words = large(4)
    require_residues(words, Q31, "the operand")
    words[position] = word
    with pytest.raises(VerificationError, match="the operand"):
        require_residues(words, Q31, "the operand")


def test_the_largest_residue_and_an_empty_matrix_are_accepted() -> None:
    require_residues(np.full((3, 5), Q31.modulus - 1, np.uint32), Q31, "x")
    require_residues(np.empty((0, 5), np.uint32), Q31, "x")
    require_residues(np.empty((5, 0), np.uint32), Q31, "x")


@pytest.mark.parametrize("operation", [add, subtract])
def test_matrices_of_different_shapes_are_refused(operation) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="shape"):
        operation(np.zeros((2, 2), np.uint32), np.zeros((2, 3), np.uint32), Q31)


@pytest.mark.parametrize("masks", [1, 2, 4])
@pytest.mark.parametrize("shape", [(1, 1), (1, 81), (9, 9), (331, 1021)])
def test_hiding_adds_all_masks_to_the_residues_of_the_integers(masks: int, shape: tuple[int, int]) -> None:
    operand = centre(large(1), Q31).reshape(-1)[: shape[0] * shape[1]].reshape(shape)
    added = [large(k + 2).reshape(-1)[: operand.size].reshape(shape) for k in range(masks)]
    out = np.empty(shape, np.uint32)
    assert hide(operand, added, Q31, out)
    assert np.array_equal(out, (operand + sum(x.astype(np.int64) for x in added)) % Q31.modulus)


def test_every_pair_of_extremes_is_hidden_and_comes_back() -> None:
    a = np.repeat(np.array(EXTREMES, np.uint32), len(EXTREMES))[None]
    mask = np.tile(np.array(EXTREMES, np.uint32), len(EXTREMES))[None]
    out = np.empty_like(a)
    assert hide(centre(a, Q31), [mask], Q31, out)
    assert out[0].tolist() == [(x + y) % Q31.modulus for x in EXTREMES for y in EXTREMES]
    assert np.array_equal(subtract_and_centre(out, mask, Q31), centre(a, Q31))


def test_differences_are_centred_like_python_integers_in_threads_too() -> None:
    a, b = large(1), large(2)
    expected = (a.astype(np.int64) - b) % Q31.modulus
    assert np.array_equal(
        subtract_and_centre(a, b, Q31), np.where(expected > HALF, expected - Q31.modulus, expected)
    )


@pytest.mark.parametrize("integer", [HALF + 1, -HALF - 1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("place", [(0, 0), (330, 1020), (100, 500)])
def test_one_integer_that_no_mask_hides_is_noticed_anywhere(integer: int, place: tuple[int, int]) -> None:
    operand = centre(large(1), Q31)
    require_centred(operand, Q31)
    operand[place] = integer
    assert not hide(operand, [large(2)], Q31, np.empty(operand.shape, np.uint32))
    with pytest.raises(ValueError, match="no centred residue"):
        require_centred(operand, Q31)


@pytest.mark.parametrize("dtype", [np.int64, np.uint32, np.float32])
def test_integers_of_another_type_are_refused_and_not_wrapped_around(dtype: type) -> None:
    with pytest.raises(ValueError, match="int32"):
        from_centred(np.full((2, 3), 5, dtype), Q31)


def exact(a: np.ndarray, b: np.ndarray) -> int:
    return sum(int(x) * int(y) for x, y in zip(a, b, strict=True)) % Q31.modulus


@pytest.mark.parametrize("columns", [0, 1, 15, 16, 31, 32, 33, 64, 1021, 40_000])
def test_dot_products_of_residues_are_exact(columns: int) -> None:
    generator = np.random.default_rng(columns)
    for fill in (None, Q31.modulus - 1, 0):
        row = generator.integers(0, Q31.modulus, columns, dtype=np.uint32)
        vector = generator.integers(0, Q31.modulus, columns, dtype=np.uint32)
        if fill is not None:
            row[:] = vector[:] = fill
        assert dot(row, vector, Q31.q) == exact(row, vector)


@pytest.mark.parametrize("columns", [1, 16, 31, 32, 33, 64, 1021])
def test_a_hidden_row_and_its_dot_products_are_exact(columns: int) -> None:
    generator = np.random.default_rng(columns)
    mask, v = generator.integers(0, Q31.modulus, (2, columns), dtype=np.uint32)
    mask.flat[:: max(1, columns // 9)] = np.resize(EXTREMES, mask.flat[:: max(1, columns // 9)].size)
    most = min(HALF, isqrt(((1 << 126) - 1) // (columns * (Q31.modulus - 1)) ** 2))
    assert dots_fit(columns * most**2, columns, Q31)
    largest = np.full(columns, most, np.int32)
    for x in (largest, -largest, generator.integers(-most, most + 1, columns).astype(np.int32)):
        for factors in (v, np.full_like(v, Q31.modulus - 1), np.zeros_like(v)):
            out = np.empty(columns, np.uint32)
            total = sum(int(a) * int(b) for a, b in zip(x, factors, strict=True))
            assert hide_row(x, mask, factors, Q31.q, out) == (exact(mask, factors), total)
            assert np.array_equal(out, (x.astype(np.int64) + mask) % Q31.modulus)


def test_a_row_beyond_what_its_dot_product_may_be_is_told() -> None:
    # Five integers along five words of q - 1 are the least that can exceed 2^63.
    most = ((1 << 63) - 1) // (5 * (Q31.modulus - 1))
    assert most < HALF
    v, mask = np.full(5, Q31.modulus - 1, np.uint32), np.zeros(5, np.uint32)
    for integer, fits in ((most, True), (-most, True), (most + 1, False)):
        assert dots_fit(5 * integer**2, 5, Q31) == fits
        _, dots = hide_row(np.full(5, integer, np.int32), mask, v, Q31.q, np.empty(5, np.uint32))
        assert (dots == 5 * integer * (Q31.modulus - 1)) == fits
    assert dots_fit(4 * HALF**2, 4, Q31)
