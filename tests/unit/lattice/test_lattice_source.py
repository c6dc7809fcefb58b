"""Lattice masks come off again but for their noise, hide the operand, and say nothing about themselves."""

import copy
import gc
import math
import pickle
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lattice_reference import (
    HALF,
    PUBLIC_SEED,
    TOY,
    KnownRandomness,
    Worker,
    backward,
    block_of_masks,
    product,
    secrets_of,
)
from scipy.stats import chi2

from blindtune.errors import UnsupportedError, VerificationError
from blindtune.protocol.fixed_point import dequantize_rows, quantize_rows, square_budget
from blindtune.protocol.lattice.fused import largest_budget, noisy_dots_fit
from blindtune.protocol.lattice.hint import PublicMatrix
from blindtune.protocol.lattice.masking import add_operand, mask_rows, unmask_rows
from blindtune.protocol.lattice.parameters import DEGREE, MLWE1280, MLWE1536, LatticeParameters
from blindtune.protocol.lattice.source import LatticeSource
from blindtune.protocol.masks import MaskedOperand, MaskSource, Share
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import DIFFUSED_CONTRACTION, Direction, Product, Span
from blindtune.protocol.verification import CheckVectors

SETS = pytest.mark.parametrize("parameters", [MLWE1280, MLWE1536, TOY], ids=lambda x: x.name)


def matrix_of(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-127, 128, (rows, columns))


def operand_of(rows: int, columns: int, seed: int = 0, size: int = 1000) -> np.ndarray:
    return np.random.default_rng(seed).integers(-size, size + 1, (rows, columns)).astype(np.int32)


def source_for(
    parameters: LatticeParameters, worker: Worker, *products: Product, **options: object
) -> tuple[LatticeSource, KnownRandomness]:
    randomness = KnownRandomness()
    hints = {which: worker.hint(parameters, which) for which in products}
    return LatticeSource(parameters, PUBLIC_SEED, hints.__getitem__, randomness, **options), randomness


def noise_of(parameters: LatticeParameters, which: Product, secrets: list[bytes], rows: int) -> np.ndarray:
    """E of the first rows of some blocks."""
    e = [secrets_of(parameters, which, secret, which.contraction)[1] for secret in secrets]
    return np.concatenate(e)[:rows]


# Right results.


@SETS
@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 255, 256, 257, 600])
def test_the_result_is_the_product_and_the_product_of_the_noise(
    parameters: LatticeParameters, forward: bool, rows: int
) -> None:
    integers = matrix_of(23, 40)
    worker, which = Worker(integers), product(40) if forward else backward(23)
    source, randomness = source_for(parameters, worker, which)
    matrix = integers.T if forward else integers
    x = operand_of(rows, matrix.shape[0])
    masked = source.hide_integers(x, which)
    assert len(randomness.drawn) == math.ceil(rows / DEGREE)
    result = masked.reveal_integers([worker.multiply(which, masked.shares[0].residues)])
    noise = noise_of(parameters, which, randomness.drawn, rows)
    assert result.dtype == np.int32
    assert np.array_equal(result, (x + noise) @ matrix)


@SETS
def test_the_masked_operand_is_the_operand_and_a_s_and_e(parameters: LatticeParameters) -> None:
    which = product(18)
    source, randomness = source_for(parameters, Worker(matrix_of(3, 18)), which)
    x = operand_of(300, 18, size=HALF)
    share = source.hide_integers(x, which).shares[0]
    masks = np.concatenate([block_of_masks(parameters, which, secret) for secret in randomness.drawn])
    assert np.array_equal(share.residues, (x + masks[:300].astype(np.int64)) % Q31.modulus)


@pytest.mark.parametrize("outputs", [1, 16, 23, 300])
@pytest.mark.parametrize("kept_bytes", [0, 1 << 28])
@pytest.mark.parametrize("scaled", [False, True])
def test_real_values_are_those_of_the_unmasked_integers_bit_for_bit(
    outputs: int, kept_bytes: int, scaled: bool
) -> None:
    generator = np.random.default_rng(outputs)
    worker, which = Worker(matrix_of(outputs, 20)), product(20)
    one, other = (source_for(TOY, worker, which, kept_bytes=kept_bytes)[0] for _ in range(2))
    column_scale = generator.uniform(1e-3, 2, outputs).astype(np.float32) if scaled else None
    for rows in (3, 100, 300, 5):  # of one block, of two, and kept ones
        x = operand_of(rows, 20, seed=rows)
        scales = 10.0 ** generator.integers(-30, 30, rows)
        scales[::4] = np.inf
        masked, same = one.hide_integers(x, which), other.hide_integers(x, which)
        answer = worker.multiply(which, masked.shares[0].residues)
        values = masked.reveal_reals([answer], scales, column_scale)
        assert values.dtype == np.float32
        assert np.array_equal(values, dequantize_rows(same.reveal_integers([answer]), scales, column_scale))
        with pytest.raises(ValueError, match="before"):
            masked.reveal_reals([answer], scales, column_scale)


def test_scales_that_do_not_fit_are_refused_and_the_operand_stays_masked() -> None:
    worker, which = Worker(matrix_of(7, 20)), product(20)
    source, _ = source_for(TOY, worker, which)
    masked = source.hide_integers(operand_of(4, 20), which)
    answer = worker.multiply(which, masked.shares[0].residues)
    for scales, column_scale in ((np.ones(3), np.ones(7, np.float32)), (np.ones(4), np.ones(6, np.float32))):
        with pytest.raises(ValueError, match="scales"):
            masked.reveal_reals([answer], scales, column_scale)
    masked.reveal_reals([answer], np.ones(4))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(data=st.data())
def test_any_sequence_of_operands_comes_back_right(data: st.DataObject) -> None:
    columns, outputs = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    integers = matrix_of(outputs, columns)
    worker, which = Worker(integers), product(columns)
    kept = data.draw(st.sampled_from([0, 20_000, 1 << 28]))
    source, _ = source_for(TOY, worker, which, kept_bytes=kept)
    waiting = []
    bound = source.noise(int(np.abs(integers.T).sum(0).max()))
    for rows in data.draw(st.lists(st.integers(0, 400), min_size=1, max_size=8)):
        x = operand_of(rows, columns, seed=rows)
        masked = source.hide_integers(x, which)
        waiting.append((x, masked))
        # Operands come back in any order, some only after others were masked.
        while waiting and data.draw(st.booleans()):
            finish(*waiting.pop(data.draw(st.integers(0, len(waiting) - 1))), worker, which, bound)
    for x, masked in waiting:
        finish(x, masked, worker, which, bound)


def finish(x: np.ndarray, masked: MaskedOperand, worker: Worker, which: Product, bound: int) -> None:
    result = masked.reveal_integers([worker.multiply(which, masked.shares[0].residues)])
    error = result - x.astype(np.int64) @ worker.integers.T
    assert np.abs(error).max(initial=0) <= bound


@pytest.mark.parametrize("parameters", [MLWE1280, MLWE1536], ids=lambda x: x.name)
def test_an_operand_as_large_as_the_budget_allows_never_wraps(parameters: LatticeParameters) -> None:
    # The worst matrix and operands that point along its columns use all of the range.
    columns = 64
    integers = np.where(np.random.default_rng(0).integers(0, 2, (30, columns)) == 1, 127, -127)
    worker, which = Worker(integers), product(columns)
    source, _ = source_for(parameters, worker, which)
    largest = int(np.abs(integers).sum(1).max())
    bound = source.noise(largest)
    assert bound == parameters.eta * 127 * columns
    budget = square_budget(Q31, int((integers**2).sum(1).max()), bound)
    x = np.concatenate([integers, -integers]).astype(np.float32)
    operand, _ = quantize_rows(x, budget)
    exact = operand.astype(np.int64) @ integers.T
    assert np.abs(exact).max() > 0.999 * (HALF - bound)
    masked = source.hide_integers(operand, which)
    result = masked.reveal_integers([worker.multiply(which, masked.shares[0].residues)])
    error = result - exact
    assert np.abs(error).max() <= bound
    assert error.std() == pytest.approx((parameters.eta / 2 * columns) ** 0.5 * 127, rel=0.1)


def test_the_noise_bound_is_reached_by_the_worst_noise_and_no_more() -> None:
    # E = +-eta along the signs of a column: nothing that the sampler can draw does worse.
    rng = np.random.default_rng(2)
    integers = matrix_of(16, 48, seed=5)
    worker, which = Worker(integers), product(48)
    sums = np.abs(integers).sum(1)
    worst = int(np.argmax(sums))
    bound = MLWE1280.noise(int(sums.max()))
    x = operand_of(2, 48)
    e = (21 * np.sign(integers[worst]) * np.array([[1], [-1]])).astype(np.int8)
    factors = rng.integers(-HALF, HALF + 1, (1, 5, DEGREE)).astype(np.int32)
    runs, nothing = np.array([[0, 7, 2]]), np.empty((0, 0), np.uint32)
    sent, out = np.empty((2, 48), np.uint32), np.empty((2, 16), np.int32)
    mask_rows(PublicMatrix(MLWE1280, PUBLIC_SEED).packed(48), factors, runs, Q31, sent, nothing)
    add_operand(x, e, Q31, sent)
    hint = worker.hint(MLWE1280, which)
    unmask_rows(hint, factors, runs, Q31, worker.multiply(which, sent), out, nothing)
    error = out - x.astype(np.int64) @ integers.T
    assert error[0, worst] == bound and error[1, worst] == -bound
    assert np.abs(error).max() == bound


@pytest.mark.parametrize(("columns", "expected"), [(384, 14), (2048, 12)])
def test_the_relative_error_of_a_product_is_the_predicted_one(columns: int, expected: float) -> None:
    generator = np.random.default_rng(columns)
    weights = generator.standard_normal((96, columns)).astype(np.float32)
    scale = np.abs(weights).max(1, keepdims=True) / 127
    integers = np.rint(weights / scale).astype(int)
    worker, which = Worker(integers), product(columns)
    source, _ = source_for(MLWE1280, worker, which)
    squares = (integers**2).sum(1)
    noise = source.noise(int(np.abs(integers).sum(1).max()))
    x = generator.standard_normal((256, columns)).astype(np.float32)
    operand, scales = quantize_rows(x, square_budget(Q31, int(squares.max()), noise))
    masked = source.hide_integers(operand, which)
    result = masked.reveal_integers([worker.multiply(which, masked.shares[0].residues)])
    exact = x.astype(np.float64) @ integers.T
    error = result / scales[:, None] - exact
    relative = np.linalg.norm(error) / np.linalg.norm(exact)
    # E has variance eta/2, rounding 1/12; the operand has the norm (q/2 - noise) / max ||M_j||.
    operand_norm = (HALF - noise) / squares.max() ** 0.5
    predicted = (21 / 2 + 1 / 12) ** 0.5 * columns**0.5 / operand_norm
    assert relative == pytest.approx(predicted, rel=0.03)
    assert -math.log2(relative) == pytest.approx(expected, abs=0.25)


def test_the_bound_of_the_noise_costs_little_of_the_range() -> None:
    # Gaussian weights of 2048 columns, as the design has it: 0.14 %.
    weights = np.random.default_rng(0).standard_normal((64, 2048))
    integers = np.rint(weights / np.abs(weights).max(1, keepdims=True) * 127)
    share = MLWE1280.noise(int(np.abs(integers).sum(1).max())) / HALF
    assert 0.001 < share < 0.0018


# What is sent.


def test_one_operator_gets_one_share_without_a_seed() -> None:
    which = product(20)
    source, _ = source_for(TOY, Worker(matrix_of(3, 20)), which)
    assert isinstance(source, MaskSource) and source.operators == 1
    assert source.parameters is Q31 and source.lattice is TOY
    masked = source.hide_integers(operand_of(7, 20), which)
    (share,) = masked.shares
    assert isinstance(share, Share) and share.recipient == 0 and share.seed is None
    assert share.residues.shape == (7, 20) and share.residues.dtype == np.uint32
    assert share.residues.flags.c_contiguous and share.residues.max() < Q31.modulus


def test_masking_leaves_the_operand_as_it_was_and_needs_no_write_access() -> None:
    which = product(20)
    source, _ = source_for(TOY, Worker(matrix_of(3, 20)), which)
    x = operand_of(300, 20)
    before = x.copy()
    x.flags.writeable = False
    source.hide_integers(x, which)
    assert np.array_equal(x, before)


def assert_uniform(residues: np.ndarray) -> None:
    """Chi-square of the high byte, of the lowest byte, and of differences of neighbours."""
    wide = residues.astype(np.int64)
    high = wide * 256 // Q31.modulus
    across = (wide[:, 1:] - wide[:, :-1]) % Q31.modulus * 256 // Q31.modulus
    down = (wide[1:] - wide[:-1]) % Q31.modulus * 256 // Q31.modulus
    for part in (high, wide & 255, across, down):
        counts = np.bincount(part.ravel(), minlength=256)
        statistic = ((counts - part.size / 256) ** 2).sum() * 256 / part.size
        assert 1e-5 < chi2.sf(statistic, 255) < 1 - 1e-5


@pytest.mark.parametrize("parameters", [MLWE1280, MLWE1536], ids=lambda x: x.name)
@pytest.mark.parametrize("value", [0, 1, HALF, -HALF])
def test_constant_operands_look_uniform(parameters: LatticeParameters, value: int) -> None:
    which = product(300)
    hint = np.zeros((1, parameters.rank, DEGREE, 16), np.int32)
    source = LatticeSource(parameters, PUBLIC_SEED, lambda _: hint, KnownRandomness())
    masked = source.hide_integers(np.full((700, 300), value, np.int32), which)
    assert_uniform(masked.shares[0].residues)


def test_whoever_knows_a_still_sees_two_blocks_differ_uniformly() -> None:
    which = product(300)
    hint = np.zeros((1, 5, DEGREE, 16), np.int32)
    source = LatticeSource(MLWE1280, PUBLIC_SEED, lambda _: hint, KnownRandomness())
    zero = np.zeros((2 * DEGREE, 300), np.int32)
    sent = source.hide_integers(zero, which).shares[0].residues.astype(np.int64)
    assert_uniform((sent[:DEGREE] - sent[DEGREE:]) % Q31.modulus)


# Secrets.


@pytest.mark.parametrize("version", range(pickle.HIGHEST_PROTOCOL + 1))
def test_neither_source_nor_masked_operand_is_pickled(version: int) -> None:
    which = product(20)
    source, _ = source_for(TOY, Worker(matrix_of(3, 20)), which)
    masked = source.hide_integers(operand_of(7, 20), which)
    for holder in (source, masked, [source], {"model": (masked,)}):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(holder, version)


def test_a_masked_operand_is_not_copied_and_a_source_is_its_copy() -> None:
    which = product(20)
    source, _ = source_for(TOY, Worker(matrix_of(3, 20)), which)
    masked = source.hide_integers(operand_of(7, 20), which)
    for make in (copy.copy, copy.deepcopy):
        assert make(source) is source
        with pytest.raises(TypeError, match="cannot be pickled"):
            make(masked)
    assert copy.deepcopy({"model": [source]})["model"][0] is source


def test_an_operand_is_unmasked_once_and_its_secrets_go_with_it() -> None:
    which, worker = product(20), Worker(matrix_of(3, 20))
    source, _ = source_for(TOY, worker, which)
    masked = source.hide_integers(operand_of(DEGREE, 20), which)
    block = weakref.ref(masked._runs[0].block)  # type: ignore[attr-defined]
    answer = worker.multiply(which, masked.shares[0].residues)
    gc.collect()
    assert block() is not None
    masked.reveal_integers([answer])
    gc.collect()
    assert block() is None
    with pytest.raises(ValueError, match="unmasked before"):
        masked.reveal_integers([answer])


def test_a_block_that_is_used_up_goes_when_its_operands_go() -> None:
    which = product(20)
    source, _ = source_for(TOY, Worker(matrix_of(3, 20)), which)
    first = source.hide_integers(operand_of(200, 20), which)
    second = source.hide_integers(operand_of(56, 20), which)
    block = weakref.ref(second._runs[0].block)  # type: ignore[attr-defined]
    del first
    gc.collect()
    assert block() is not None
    del second
    gc.collect()
    assert block() is None


def test_nothing_that_is_printed_shows_a_secret() -> None:
    which, worker = product(4), Worker(matrix_of(3, 4))
    source, randomness = source_for(MLWE1280, worker, which)
    x = np.full((2, 4), 987_654, np.int32)
    masked = source.hide_integers(x, which)
    runs = masked._runs  # type: ignore[attr-defined]
    block = runs[0].block
    secrets = {"987654"}
    for secret in (*randomness.drawn, block.noise_key):
        secrets |= {repr(secret)[2:-1], secret.hex(), str(list(secret))[1:-1]}
    words = np.concatenate([masked.shares[0].residues.ravel(), np.abs(block.factors).ravel().view(np.uint32)])
    secrets |= {str(int(word)) for word in words if word > 10**6}
    for thing in (source, masked, masked.shares, runs, block, source._stock, [source], {"x": masked}):
        printed = f"{thing!r} {thing!s}"
        for secret in secrets:
            assert secret not in printed


# Misuse.


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_random_source_that_returns_the_wrong_number_of_bytes_is_refused(length: int) -> None:
    which = product(4)
    hint = np.zeros((1, 1, DEGREE, 16), np.int32)
    source = LatticeSource(TOY, PUBLIC_SEED, lambda _: hint, lambda size: bytes(length))
    with pytest.raises(ValueError, match=f"32 bytes, not {length}"):
        source.hide_integers(operand_of(2, 4), which)


@pytest.mark.parametrize(
    "operand",
    [np.zeros((2, 5), np.int32), np.zeros((2, 3), np.int32), np.zeros((2, 4)), np.zeros((2, 4), np.int64)],
)
def test_an_operand_that_does_not_fit_its_product_is_not_masked(operand: np.ndarray) -> None:
    which = product(4)
    source, randomness = source_for(TOY, Worker(matrix_of(3, 4)), which)
    with pytest.raises(ValueError, match="int32 operands of 4 columns"):
        source.hide_integers(operand, which)
    assert randomness.drawn == []


@pytest.mark.parametrize("shape", [(1, 5, 256, 16), (1, 1, 256, 8), (1, 1, 128, 16)])
def test_a_hint_of_another_parameter_set_is_refused_before_anything_is_drawn(shape: tuple) -> None:
    randomness = KnownRandomness()
    source = LatticeSource(TOY, PUBLIC_SEED, lambda _: np.zeros(shape, np.int32), randomness)
    with pytest.raises(ValueError, match="parameter set toy"):
        source.hide_integers(operand_of(2, 4), product(4))
    assert randomness.drawn == []


def test_without_a_hint_nothing_is_drawn_or_sent() -> None:
    randomness = KnownRandomness()
    source = LatticeSource(TOY, PUBLIC_SEED, {}.__getitem__, randomness)
    with pytest.raises(KeyError):
        source.hide_integers(operand_of(2, 4), product(4))
    assert randomness.drawn == []


def test_responses_that_do_not_fit_are_refused_and_do_not_use_up_the_operand() -> None:
    which, worker = product(20), Worker(matrix_of(35, 20))
    source, _ = source_for(TOY, worker, which)
    x = operand_of(7, 20)
    masked = source.hide_integers(x, which)
    answer = worker.multiply(which, masked.shares[0].residues)
    for wrong in ([], [answer, answer], [answer[:6]], [answer[:, :32]], [answer.astype(np.int64)]):
        with pytest.raises(ValueError, match="response"):
            masked.reveal_integers(wrong)
    error = masked.reveal_integers([answer]) - x @ worker.integers.T
    assert np.abs(error).max() <= source.noise(int(np.abs(worker.integers).sum(1).max()))


def test_a_wrong_hint_is_not_close_to_right() -> None:
    # Why hints are verified: nothing else would notice.
    which, worker = product(20), Worker(matrix_of(16, 20))
    hint = worker.hint(TOY, which)
    hint[0, 0, 100, 3] ^= 1
    source = LatticeSource(TOY, PUBLIC_SEED, lambda _: hint)
    x = operand_of(DEGREE, 20)
    masked = source.hide_integers(x, which)
    error = (
        masked.reveal_integers([worker.multiply(which, masked.shares[0].residues)]) - x @ worker.integers.T
    )
    wrong = np.abs(error.astype(np.int64)) > source.noise(int(np.abs(worker.integers).sum(1).max()))
    assert wrong[:, 3].mean() > 0.9 and not np.delete(wrong, 3, axis=1).any()


@SETS
@pytest.mark.parametrize("columns", [1, 18, 200, 450])
@pytest.mark.parametrize("kept_bytes", [0, 1 << 28])
def test_real_numbers_are_hidden_like_the_integers_they_are_rounded_to(
    parameters: LatticeParameters, columns: int, kept_bytes: int
) -> None:
    generator = np.random.default_rng(columns)
    worker, which = Worker(matrix_of(3, columns)), product(columns)
    one, other = (source_for(parameters, worker, which, kept_bytes=kept_bytes)[0] for _ in range(2))
    column_scale = generator.uniform(1e-3, 2, columns).astype(np.float32)
    for rows in (3, 100, 600, 0, 5):  # of one block, of several, none, and kept ones
        x = generator.standard_normal((rows, columns)).astype(np.float32)
        x[1::7] = 0
        hidden, scales = one.hide_reals(x, which, 1 << 40, column_scale)
        integers, same = quantize_rows(x, 1 << 40, column_scale)
        expected = other.hide_integers(integers, which)
        assert np.array_equal(hidden.shares[0].residues, expected.shares[0].residues)
        assert np.array_equal(scales, same)


def test_long_gradients_are_hidden_as_they_are_rounded_with_the_error_diffused() -> None:
    which = Product(Direction.BACKWARD, (Span("layer", 0, DIFFUSED_CONTRACTION),))
    worker = Worker(matrix_of(which.contraction, 3))
    one, other = (source_for(TOY, worker, which)[0] for _ in range(2))
    # Far below a row's step, but for one.
    x = np.full((3, which.contraction), 0.01, np.float32)
    x[:, 0] = 1e4
    hidden, scales = one.hide_reals(x, which, 1 << 30)
    integers, same = quantize_rows(x, 1 << 30, diffused=True)
    expected = other.hide_integers(integers, which)
    assert np.array_equal(hidden.shares[0].residues, expected.shares[0].residues)
    assert np.array_equal(scales, same)
    assert not np.array_equal(integers, quantize_rows(x, 1 << 30)[0])


def test_a_budget_that_leaves_no_room_for_noise_hides_nothing_else() -> None:
    worker, which = Worker(matrix_of(3, 1)), product(1)
    one, other = (source_for(TOY, worker, which)[0] for _ in range(2))
    x = np.linspace(-1, 1, 300, dtype=np.float32)[:, np.newaxis]
    for budget in ((HALF - TOY.eta) ** 2, (HALF - TOY.eta) ** 2 + 1, HALF**2):
        hidden, _ = one.hide_reals(x, which, budget)
        expected = other.hide_integers(quantize_rows(x, budget)[0], which)
        assert np.array_equal(hidden.shares[0].residues, expected.shares[0].residues)


def test_rows_of_an_operand_that_is_not_finite_are_not_drawn_again() -> None:
    worker, which = Worker(matrix_of(3, 5)), product(5)
    one, other = (source_for(TOY, worker, which)[0] for _ in range(2))
    x = np.ones((40, 5), np.float32)
    bad = x.copy()
    bad[17, 2] = np.inf
    with pytest.raises(UnsupportedError, match="row 17 of 40"):
        one.hide_reals(bad, which, 1 << 40)
    hidden, _ = one.hide_reals(x, which, 1 << 40)
    other.hide_integers(np.zeros((40, 5), np.int32), which)
    expected = other.hide_integers(quantize_rows(x, 1 << 40)[0], which)
    assert np.array_equal(hidden.shares[0].residues, expected.shares[0].residues)


# What is expected of answers.


def vectors_of(columns: int, seed: int = 0) -> np.ndarray:
    """A verification vector with every extreme among its words."""
    v = np.random.default_rng(seed).integers(0, Q31.modulus, columns, dtype=np.uint32)
    v[:: max(1, columns // 7)] = np.resize(
        [Q31.modulus - 1, 0, HALF, HALF + 1], len(v[:: max(1, columns // 7)])
    )
    return v


def assert_expected(masked: MaskedOperand, v: np.ndarray) -> None:
    (share,) = masked.shares
    assert share.expected is not None and not share.expected.flags.writeable
    assert share.expected[0].tolist() == [
        sum(int(a) * int(b) for a, b in zip(row, v, strict=True)) % Q31.modulus for row in share.residues
    ]


@SETS
@pytest.mark.parametrize("columns", [1, 15, 33, 450])
@pytest.mark.parametrize("kept_bytes", [0, 1 << 28])
def test_what_is_expected_is_the_dot_product_of_what_is_sent(
    parameters: LatticeParameters, columns: int, kept_bytes: int
) -> None:
    generator = np.random.default_rng(columns)
    which = product(columns)
    source, _ = source_for(parameters, Worker(matrix_of(3, columns)), which, kept_bytes=kept_bytes)
    column_scale = generator.uniform(1e-3, 2, columns).astype(np.float32)
    v = vectors_of(columns)
    for rows in (256, 3, 300, 1100, 257):  # a block, leftovers of one, several
        x = generator.standard_normal((rows, columns)).astype(np.float32)
        x[1::7] = 0
        masked, _ = source.hide_reals(x, which, 1 << 40, column_scale, v[None])
        if rows < DEGREE:
            assert masked.shares[0].expected is None
        else:
            assert_expected(masked, v)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("columns", [64, 450])
def test_what_is_expected_is_exact_up_to_the_largest_budget_for_it(columns: int, sign: int) -> None:
    which = product(columns)
    source, _ = source_for(MLWE1280, Worker(matrix_of(3, columns)), which)
    low, high = 1, largest_budget(21, Q31)
    assert noisy_dots_fit(low, 21, columns, Q31) and not noisy_dots_fit(high, 21, columns, Q31)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if noisy_dots_fit(middle, 21, columns, Q31) else (low, middle)
    x = np.full((DEGREE, columns), sign, np.float32)
    v = np.full(columns, Q31.modulus - 1, np.uint32)
    integers, _ = quantize_rows(x, low)
    # The vector points along the rows, so that there is hardly a larger product.
    assert abs(int(integers[0].astype(object) @ v.astype(object))) > 0.999 * 2**63
    assert_expected(source.hide_reals(x, which, low, None, v[None])[0], v)
    assert source.hide_reals(x, which, high, None, v[None])[0].shares[0].expected is None


def test_another_vector_gives_other_numbers_even_in_the_same_memory() -> None:
    worker, which = Worker(matrix_of(3, 33)), product(33)
    source, _ = source_for(TOY, worker, which)
    x = np.random.default_rng(0).standard_normal((DEGREE, 33)).astype(np.float32)
    v = vectors_of(33)
    for seed in (1, 1, 2):
        v[:] = vectors_of(33, seed)
        assert_expected(source.hide_reals(x, which, 1 << 40, None, v[None])[0], v)
    strided = np.zeros((33, 2), np.uint32)
    strided[:, 0] = vectors_of(33, 3)
    assert_expected(source.hide_reals(x, which, 1 << 40, None, strided[None, :, 0])[0], strided[:, 0])


def test_a_wrong_row_of_an_answer_is_caught_by_what_was_expected() -> None:
    integers, which = matrix_of(20, 33), product(33)
    worker = Worker(integers)
    source, _ = source_for(MLWE1280, worker, which)
    s = np.random.default_rng(0).integers(0, Q31.modulus, (Q31.hint_vectors, 20), dtype=np.uint32)
    v = (s.astype(object) @ integers.astype(object)) % Q31.modulus
    check = CheckVectors(s, np.ascontiguousarray(v.astype(np.uint32)), Q31)
    x = np.random.default_rng(1).standard_normal((600, 33)).astype(np.float32)
    (share,) = source.hide_reals(x, which, 1 << 40, None, check.everyday)[0].shares
    answer = worker.multiply(which, share.residues)
    assert share.expected is not None
    check.verify_expected(share.expected, answer)
    for row in (0, 255, 256, 511, 599):
        wrong = answer.copy()
        wrong[row, row % 20] = (int(wrong[row, row % 20]) + 1) % Q31.modulus
        with pytest.raises(VerificationError, match=f"row {row} of 600"):
            check.verify_expected(share.expected, wrong)


def test_a_vector_that_does_not_fit_is_refused_and_integers_have_none() -> None:
    which = product(20)
    source, _ = source_for(TOY, Worker(matrix_of(3, 20)), which)
    x = np.ones((DEGREE, 20), np.float32)
    for v in (np.zeros(19, np.uint32), np.zeros(20, np.int64), np.zeros((1, 20), np.uint32)):
        with pytest.raises(ValueError, match="vector"):
            source.hide_reals(x, which, 1 << 40, None, v[None])
    assert source.hide_integers(operand_of(DEGREE, 20), which).shares[0].expected is None


def test_what_is_expected_is_not_printed() -> None:
    which = product(20)
    source, _ = source_for(TOY, Worker(matrix_of(3, 20)), which)
    v = vectors_of(20, 5)
    masked, _ = source.hide_reals(np.ones((DEGREE, 20), np.float32), which, 1 << 40, None, v[None])
    expected = masked.shares[0].expected
    assert expected is not None
    for thing in (source, masked, masked.shares, masked.shares[0]):
        for secret in (*v[v > 10**6].tolist(), *expected[0].tolist()):
            assert str(secret) not in f"{thing!r} {thing!s}"
