"""The transform is the one of its definition, for every residue, and comes back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lattice_reference import EXTREMES, HALF, by_fft, evaluate, interpolate, schoolbook
from numba import njit

from blindtune.protocol.kernels.vectors import load_halves, store
from blindtune.protocol.lattice.parameters import DEGREE, MAX_RANK
from blindtune.protocol.lattice.transform import (
    LANES,
    forward,
    inverse,
    primitive_root,
    reduce_sums,
    reversed_bits,
    transform_of,
    transformed,
)
from blindtune.protocol.parameters import Q31


@njit
def reduced(totals, transform, out):  # type: ignore[no-untyped-def]
    for i in range(0, totals.shape[0], LANES):
        low, high = load_halves(totals, i), load_halves(totals, i + LANES // 2)
        store(out, i, reduce_sums(low, high, transform.inverse, transform.q))


def tiles(seed: int) -> dict[str, np.ndarray]:
    """Random residues, and those where a sum, a difference or a comparison could go wrong."""
    generator = np.random.default_rng(seed)
    shape = (DEGREE, LANES)
    mixed = generator.choice(np.array(EXTREMES), shape)
    sparse = np.where(generator.random(shape) < 0.05, mixed, 0)
    spread = generator.integers(0, Q31.modulus, shape)
    near_half = HALF + generator.integers(-3, 4, shape)
    constant = {f"all {value}": np.full(shape, value) for value in EXTREMES}
    named = {"random": spread, "mixed": mixed, "sparse": sparse, "near q/2": near_half, **constant}
    return {name: tile.astype(np.uint32) for name, tile in named.items()}


NAMES = list(tiles(0))


def test_psi_is_a_primitive_512th_root_of_unity() -> None:
    assert pow(primitive_root(Q31), DEGREE, Q31.modulus) == Q31.modulus - 1
    assert sorted(reversed_bits(j) for j in range(DEGREE)) == list(range(DEGREE))
    assert reversed_bits(1) == 128 and reversed_bits(6) == 96


@pytest.mark.parametrize("name", NAMES)
def test_forward_evaluates_at_the_odd_powers_of_psi(name: str) -> None:
    tile = tiles(1)[name]
    expected = evaluate(tile)
    forward(tile, transform_of(Q31))
    assert np.array_equal(tile, expected)


@pytest.mark.parametrize("name", NAMES)
def test_inverse_interpolates_and_leaves_a_factor_of_256(name: str) -> None:
    tile = tiles(2)[name]
    expected = interpolate(tile) * DEGREE % Q31.modulus
    inverse(tile, 0, transform_of(Q31))
    assert np.array_equal(tile, expected)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_every_tile_comes_back_times_256(seed: int) -> None:
    for name, tile in tiles(seed).items():
        expected = tile.astype(np.int64) * DEGREE % Q31.modulus
        forward(tile, transform_of(Q31))
        assert tile.max() < Q31.modulus, name
        inverse(tile, 0, transform_of(Q31))
        assert np.array_equal(tile, expected), name


def test_lanes_do_not_touch_each_other() -> None:
    tile = tiles(3)["random"]
    together = tile.copy()
    forward(together, transform_of(Q31))
    for lane in range(LANES):
        alone = np.zeros_like(tile)
        alone[:, lane] = tile[:, lane]
        forward(alone, transform_of(Q31))
        assert np.array_equal(alone[:, lane], together[:, lane])
        assert np.count_nonzero(np.delete(alone, lane, axis=1)) == 0


def test_the_references_agree_with_each_other() -> None:
    generator = np.random.default_rng(4)
    for a, b in (
        (generator.integers(0, Q31.modulus, DEGREE), generator.integers(0, Q31.modulus, DEGREE)),
        (generator.choice(np.array(EXTREMES), DEGREE), generator.integers(-21, 22, DEGREE)),
        (np.full(DEGREE, Q31.modulus - 1), np.full(DEGREE, HALF)),
    ):
        assert np.array_equal(schoolbook(a, b), by_fft(a, b))
        pointwise = evaluate(a[:, None]) * evaluate(b[:, None]) % Q31.modulus
        assert np.array_equal(interpolate(pointwise)[:, 0], schoolbook(a, b))
    x = np.zeros(DEGREE, np.int64)
    x[1] = 1
    last = np.zeros(DEGREE, np.int64)
    last[-1] = 5
    wrapped = schoolbook(x, last)
    assert wrapped[0] == Q31.modulus - 5 and not wrapped[1:].any()


def test_transformed_is_the_transform_scaled_and_centred() -> None:
    generator = np.random.default_rng(5)
    scale = 2**32 * pow(DEGREE, -1, Q31.modulus)
    for count in (1, 5, 6, LANES):
        s = generator.integers(-32, 33, (count, DEGREE)).astype(np.int8)
        result = transformed(s, Q31)
        assert result.dtype == np.int32 and result.shape == s.shape
        assert np.array_equal(result % np.int64(Q31.modulus), evaluate(s.T).T * scale % Q31.modulus)
        assert np.abs(result).max() <= HALF


LIMIT = 2**32 * Q31.modulus - 1
WORST = MAX_RANK * HALF**2


@settings(derandomize=True, deadline=None, max_examples=300)
@given(total=st.integers(-LIMIT, LIMIT) | st.integers(-WORST, WORST))
def test_a_sum_is_reduced_exactly(total: int) -> None:
    check_reduction([total])


def test_sums_at_the_limits_are_reduced_exactly() -> None:
    edges = [0, 2**31, 2**32, Q31.modulus, HALF, HALF**2, WORST, LIMIT, 5 * HALF**2, 6 * HALF**2]
    edges += [Q31.modulus * 2**32 // 2, Q31.modulus * HALF, (2**31) * Q31.modulus]
    check_reduction([sign * (edge + step) for edge in edges for step in (-1, 0, 1) for sign in (-1, 1)])


def check_reduction(totals: list[int]) -> None:
    totals = [total for total in totals if abs(total) <= LIMIT]
    padded = np.zeros(-(-len(totals) // LANES) * LANES, np.int64)
    padded[: len(totals)] = totals
    out = np.empty(padded.size, np.uint32)
    reduced(padded, transform_of(Q31), out)
    # Of every sixteen sums, the first eight are those of the words of even number.
    ordered = padded.reshape(-1, 2, LANES // 2).transpose(0, 2, 1).ravel().tolist()
    factor = pow(2**32, -1, Q31.modulus)
    assert out.tolist() == [total * factor % Q31.modulus for total in ordered]
