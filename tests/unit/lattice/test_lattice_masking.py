"""Masking and unmasking agree with big integers and with an FFT, also where sums are largest."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lattice_reference import HALF, by_fft, centred, evaluate, interpolate, schoolbook

from blindtune.protocol.kernels.recycled import large_matrix
from blindtune.protocol.lattice.hint import pack_rows
from blindtune.protocol.lattice.masking import add_operand, mask_rows, unmask_rows, unmask_with
from blindtune.protocol.lattice.parameters import DEGREE, MAX_RANK
from blindtune.protocol.lattice.transform import LANES, transformed
from blindtune.protocol.parameters import Q31

NOTHING = np.empty((0, 0), np.uint32)


def packed_of(rows: np.ndarray, rank: int) -> np.ndarray:
    packed = np.empty((-(-rows.shape[1] // LANES), rank, DEGREE, LANES), np.int32)
    pack_rows(rows.astype(np.uint32), packed, 0, Q31)
    return packed


def whole_block(packed: np.ndarray, factors: np.ndarray, columns: int) -> np.ndarray:
    """A S of all rows."""
    out = np.empty((DEGREE, columns), np.uint32)
    mask_rows(packed, factors[None], np.array([[0, 0, DEGREE]]), Q31, out, NOTHING)
    return out


def ring_rows(packed: np.ndarray, factors: np.ndarray, columns: int) -> np.ndarray:
    """The same from the definition, for factors of any kind: sum, factor 2^-32, n times interpolation."""
    values = (packed.astype(object) * factors.astype(object)[None, :, :, None]).sum(1)
    values = np.concatenate(list(values), axis=1)[:, :columns]
    return interpolate(values * pow(2**32, -1, Q31.modulus)) * DEGREE % Q31.modulus


@pytest.mark.parametrize("rank", [1, 5, 6, MAX_RANK])
def test_products_are_those_of_the_ring(rank: int) -> None:
    generator = np.random.default_rng(rank)
    columns = 20
    a = generator.integers(0, Q31.modulus, (rank, DEGREE, columns))
    a[:, :, 3], a[:, :, 4] = Q31.modulus - 1, HALF
    s = generator.integers(-21, 22, (rank, DEGREE)).astype(np.int8)
    s[0, :9] = [21, -21, 0, 1, -1, 21, 21, -21, -21]
    values = np.concatenate([evaluate(x) for x in a])
    result = whole_block(packed_of(values, rank), transformed(s, Q31), columns)
    for i in range(columns):
        fft = sum(by_fft(a[k, :, i], s[k]) for k in range(rank)) % Q31.modulus
        assert np.array_equal(result[:, i], fft)
    for i in (0, 3, 4, columns - 1):
        exact = sum(schoolbook(a[k, :, i], s[k]) for k in range(rank)) % Q31.modulus
        assert np.array_equal(result[:, i], exact)


@pytest.mark.parametrize("rank", [5, 6, MAX_RANK])
@pytest.mark.parametrize("signs", ["equal", "opposite", "random"])
def test_the_largest_possible_sums_do_not_overflow(rank: int, signs: str) -> None:
    generator = np.random.default_rng(rank)
    packed = np.full((2, rank, DEGREE, LANES), HALF, np.int32)
    factors = np.full((rank, DEGREE), HALF, np.int32)
    if signs == "opposite":
        factors *= -1
    if signs == "random":
        packed *= generator.choice(np.array([-1, 1], np.int32), packed.shape)
        factors *= generator.choice(np.array([-1, 1], np.int32), factors.shape)
        # A fifth of the lanes has all signs equal, in every coefficient.
        packed[:, :, :, ::5] = HALF * np.sign(factors)[None, :, :, None]
    result = whole_block(packed, factors, 2 * LANES)
    assert np.array_equal(result, ring_rows(packed, factors, 2 * LANES))


@settings(derandomize=True, deadline=None, max_examples=8)
@given(
    seed=st.integers(0, 2**32),
    rank=st.sampled_from([1, 5, 6, MAX_RANK]),
    columns=st.integers(1, 40),
)
def test_random_and_extreme_factors_meet_right(seed: int, rank: int, columns: int) -> None:
    generator = np.random.default_rng(seed)
    edges = np.array([0, 1, -1, HALF, -HALF, HALF - 1, 1 - HALF])
    rows = generator.integers(0, Q31.modulus, (rank * DEGREE, columns))
    rows = np.where(
        generator.random(rows.shape) < 0.3, generator.choice(edges, rows.shape) % Q31.modulus, rows
    )
    factors = generator.integers(-HALF, HALF + 1, (rank, DEGREE))
    factors = np.where(generator.random(factors.shape) < 0.3, generator.choice(edges, factors.shape), factors)
    packed = packed_of(rows, rank)
    result = whole_block(packed, factors.astype(np.int32), columns)
    assert np.array_equal(result, ring_rows(packed, factors, columns))


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 255, 256, 257, 600, 1700])
def test_rows_of_several_blocks_go_where_the_runs_say(columns: int) -> None:
    generator = np.random.default_rng(columns)
    rank = 5
    packed = packed_of(generator.integers(0, Q31.modulus, (rank * DEGREE, columns)), rank)
    factors = generator.integers(-HALF, HALF + 1, (3, rank, DEGREE)).astype(np.int32)
    masks = [whole_block(packed, x, columns).astype(np.int64) for x in factors]
    runs = np.array([[1, 250, 6], [7, 0, 256], [263, 0, 40]])
    chosen = np.concatenate([masks[0][250:], masks[1], masks[2][:40]])
    inner = slice(1, 303)

    out, rest = np.full((305, columns), 99, np.uint32), np.full((216, columns), 99, np.uint32)
    mask_rows(packed, factors, runs, Q31, out, rest)
    assert np.array_equal(out[inner], chosen)
    assert np.array_equal(rest, masks[2][40:])
    assert np.all(out[[0, -2, -1]] == 99)  # rows that no run names

    y = generator.integers(0, Q31.modulus, out.shape).astype(np.uint32)
    result, rest = np.full(y.shape, 99, np.int32), np.full((10, columns), 99, np.uint32)
    unmask_rows(packed, factors, runs, Q31, y, result, rest)
    assert np.array_equal(result[inner], centred(y[inner] - chosen))
    assert np.array_equal(rest, masks[2][246:])
    assert np.all(result[[0, -2, -1]] == 99)


@pytest.mark.parametrize("columns", [40, 300, 530])
@pytest.mark.parametrize("blocks", [2, 4, 5, 9])
def test_blocks_computed_together_keep_to_their_own_rows(blocks: int, columns: int) -> None:
    generator = np.random.default_rng(blocks)
    rank = 5
    packed = packed_of(generator.integers(0, Q31.modulus, (rank * DEGREE, columns)), rank)
    factors = generator.integers(-HALF, HALF + 1, (blocks, rank, DEGREE)).astype(np.int32)
    masks = np.concatenate([whole_block(packed, x, columns).astype(np.int64) for x in factors])[:-16]
    runs = np.array([[b * DEGREE, 0, DEGREE - 16 * (b == blocks - 1)] for b in range(blocks)])
    out, rest = np.empty(masks.shape, np.uint32), np.empty((16, columns), np.uint32)
    mask_rows(packed, factors, runs, Q31, out, rest)
    assert np.array_equal(out, masks)
    assert np.array_equal(rest, whole_block(packed, factors[-1], columns)[-16:])
    x = generator.integers(-HALF, HALF + 1, masks.shape).astype(np.int32)
    result = np.empty(x.shape, np.int32)
    unmask_rows(packed, factors, runs, Q31, ((masks + x) % Q31.modulus).astype(np.uint32), result, NOTHING)
    assert np.array_equal(result, x)


@pytest.mark.parametrize("columns", [1700, 2048])  # rows of whole lines of the cache, and others
def test_a_result_larger_than_caches_is_the_same_as_its_rows_alone(columns: int) -> None:
    generator = np.random.default_rng(columns)
    packed = packed_of(generator.integers(0, Q31.modulus, (DEGREE, columns)), 1)
    factors = generator.integers(-HALF, HALF + 1, (3, 1, DEGREE)).astype(np.int32)
    runs = np.array([[b * DEGREE, 0, DEGREE] for b in range(3)])
    y = generator.integers(0, Q31.modulus, (3 * DEGREE, columns)).astype(np.uint32)
    scales = generator.uniform(1, 2, len(y)), generator.uniform(1, 2, columns).astype(np.float32)
    out = large_matrix(*y.shape, np.float32)
    assert out.nbytes > 1 << 22
    unmask_rows(packed, factors, runs, Q31, y, out, NOTHING, scales)
    for b in range(3):
        rows = slice(b * DEGREE, (b + 1) * DEGREE)
        alone = np.empty((DEGREE, columns), np.float32)
        unmask_rows(
            packed, factors[b : b + 1], runs[:1], Q31, y[rows], alone, NOTHING, (scales[0][rows], scales[1])
        )
        assert np.array_equal(out[rows], alone)


def test_a_matrix_packed_for_wider_operands_serves_narrow_ones() -> None:
    generator = np.random.default_rng(0)
    rows = generator.integers(0, Q31.modulus, (5 * DEGREE, 100))
    factors = generator.integers(-HALF, HALF + 1, (5, DEGREE)).astype(np.int32)
    wide = whole_block(packed_of(rows, 5), factors, 100)
    for columns in (1, 16, 37, 99):
        assert np.array_equal(whole_block(packed_of(rows, 5), factors, columns), wide[:, :columns])


def test_operands_and_responses_of_any_memory_layout_give_the_same() -> None:
    generator = np.random.default_rng(1)
    packed = packed_of(generator.integers(0, Q31.modulus, (DEGREE, 30)), 1)
    factors = generator.integers(-HALF, HALF + 1, (1, 1, DEGREE)).astype(np.int32)
    runs = np.array([[0, 5, 20]])
    x = generator.integers(-HALF, HALF + 1, (20, 30)).astype(np.int32)
    e = np.zeros((20, 30), np.int8)
    frozen = np.frombuffer(x.tobytes(), np.int32).reshape(x.shape)
    strided = np.zeros((40, 60), np.int32)
    strided[::2, ::2] = x
    results = []
    for operand in (x, frozen, strided[::2, ::2], np.asfortranarray(x)):
        out = np.empty(x.shape, np.uint32)
        mask_rows(packed, factors, runs, Q31, out, NOTHING)
        assert add_operand(operand, e, Q31, out)
        back = np.empty(x.shape, np.int32)
        unmask_rows(packed, factors, runs, Q31, np.asfortranarray(out), back, NOTHING)
        assert np.array_equal(back, x)
        results.append(out)
    assert all(np.array_equal(results[0], other) for other in results)


def grid() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every combination of extreme operands, noise and masks, side by side."""
    x = [-HALF, 1 - HALF, -33, -32, -21, -1, 0, 1, 21, 32, 33, HALF - 1, HALF]
    e = range(-32, 33)
    mask = [
        0,
        1,
        21,
        32,
        HALF - 1,
        HALF,
        HALF + 1,
        Q31.modulus - 33,
        Q31.modulus - 32,
        Q31.modulus - 21,
        Q31.modulus - 1,
    ]
    x, e, mask = (a.reshape(1, -1) for a in np.meshgrid(x, list(e), mask))
    return x.astype(np.int32), e.astype(np.int8), mask.astype(np.uint32)


def test_every_extreme_operand_noise_and_mask_add_up_to_a_residue() -> None:
    x, e, mask = grid()
    out = mask.copy()
    assert add_operand(x, e, Q31, out)
    assert np.array_equal(out, (x.astype(np.int64) + e + mask) % Q31.modulus)


def test_every_extreme_response_and_mask_give_a_centred_difference() -> None:
    edges = [0, 1, 2, HALF - 1, HALF, HALF + 1, HALF + 2, Q31.modulus - 2, Q31.modulus - 1]
    y, mask = (a.reshape(1, -1).astype(np.uint32) for a in np.meshgrid(edges, edges))
    out = np.empty(y.shape, np.int32)
    unmask_with(mask, y, Q31, out)
    assert np.array_equal(out, centred(y.astype(np.int64) - mask))


@settings(derandomize=True, deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), rows=st.integers(0, 5), columns=st.integers(1, 70))
def test_rows_of_masks_hide_and_unmask_operands(seed: int, rows: int, columns: int) -> None:
    generator = np.random.default_rng(seed)
    x = generator.integers(-HALF, HALF + 1, (rows, columns)).astype(np.int32)
    e = generator.integers(-32, 33, x.shape).astype(np.int8)
    mask = generator.integers(0, Q31.modulus, x.shape).astype(np.uint32)
    out, back = mask.copy(), np.empty(x.shape, np.int32)
    assert add_operand(x, e, Q31, out)
    assert np.array_equal(out, (x.astype(np.int64) + e + mask) % Q31.modulus)
    unmask_with(mask, out, Q31, back)
    assert np.array_equal(back, centred(x.astype(np.int64) + e))


def test_an_integer_that_no_mask_hides_is_found_in_every_block_of_rows() -> None:
    x, e = np.zeros((64, 1 << 14), np.int32), np.zeros((64, 1 << 14), np.int8)
    for row in (0, 31, 40, 63):  # of those that threads take one after another
        for integer in (HALF + 1, -HALF - 1):
            x[row, -1] = integer
            assert not add_operand(x, e, Q31, np.zeros(x.shape, np.uint32))
        x[row, -1] = 0
    assert add_operand(x, e, Q31, np.zeros(x.shape, np.uint32))
