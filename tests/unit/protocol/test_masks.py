"""Mask sources: exact, fresh for every operand, and telling nothing to any operators short of all."""

import copy
import itertools
import os
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.forked import in_a_child

from blindtune.errors import VerificationError
from blindtune.protocol.expansion import KEY_BYTES, Seed, derive_key, expand
from blindtune.protocol.fixed_point import quantize_rows, square_budget
from blindtune.protocol.masks import MaskedOperand, Share
from blindtune.protocol.multiplication.methods import FloatProduct
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.operands import SeededRows
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Direction, Product, backward_products, forward_products
from blindtune.protocol.shares.source import ShareSource
from blindtune.protocol.shares.unmasked import UnmaskedSource
from blindtune.protocol.verification import CheckVectors, check_vectors, secret_vectors

HALF = (Q31.modulus - 1) // 2
OPERATORS = pytest.mark.parametrize("operators", [2, 3, 5])


class KnownRandomness:
    """The same bytes in every test that starts with the same seed, and a record of what was drawn."""

    def __init__(self, seed: bytes = b"tests of masks") -> None:
        self._secret = derive_key(seed.ljust(KEY_BYTES, b"\0"), "randomness for tests")
        self.drawn: list[bytes] = []

    def __call__(self, size: int) -> bytes:
        key = derive_key(self._secret, str(len(self.drawn)))
        self.drawn.append(expand(key, 0, 1, size // 4 + 1, Q31).tobytes()[:size])
        return self.drawn[-1]


def product(contraction: int, name: str = "layer") -> Product:
    return forward_products([name], contraction)[0]


def random_operand(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    return quantize_rows(x, square_budget(Q31, columns * 127 * 127))[0]


def product_mod_q(operand: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return ((operand.astype(object) @ matrix.astype(object)) % Q31.modulus).astype(np.uint32)


def keys(masked: MaskedOperand) -> list[bytes]:
    return [share.seed.key for share in masked.shares if share.seed is not None]


# Right results.


@OPERATORS
@settings(derandomize=True, deadline=None, max_examples=25)
@given(data=st.data())
def test_unmasking_the_products_of_all_shares_gives_the_product_in_python_integers(
    operators: int, data: st.DataObject
) -> None:
    rows, columns, outputs = (data.draw(st.integers(1, 20)) for _ in range(3))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    matrix = generator.integers(-127, 128, (columns, outputs))
    operand = random_operand(rows, columns, seed=data.draw(st.integers(0, 2**32)))
    masked = ShareSource(operators, Q31).hide_integers(operand, product(columns))
    result = masked.reveal_integers([product_mod_q(share.residues, matrix) for share in masked.shares])
    assert result.dtype == np.int32
    assert np.array_equal(result, operand.astype(object) @ matrix.astype(object))


@OPERATORS
@pytest.mark.parametrize("rows", [1, 4097])
def test_shares_multiplied_by_a_worker_from_seeds_equal_the_unmasked_product(
    operators: int, rows: int
) -> None:
    generator = np.random.default_rng(1)
    stored = {"a": generator.integers(-127, 128, (9, 30), dtype=np.int8)}
    held = Multiplier({"a": torch.from_numpy(stored["a"])}, FloatProduct(Q31, torch.device("cpu")))
    for which, columns in ((forward_products(["a"], 30)[0], 30), (backward_products([("a", 9)])[0], 9)):
        operand = random_operand(rows, columns)
        masked = ShareSource(operators, Q31).hide_integers(operand, which)
        responses = []
        for share in masked.shares:
            received = share.residues if share.seed is None else share.seed.expand(rows, columns)
            responses.append(held.multiply(which, received, Q31))
        plain = UnmaskedSource(Q31).hide_integers(operand, which)
        reference = plain.reveal_integers([held.multiply(which, plain.shares[0].residues, Q31)])
        assert np.array_equal(masked.reveal_integers(responses), reference)


@OPERATORS
def test_extreme_operands_come_back_exactly(operators: int) -> None:
    operand = np.array([[HALF, -HALF, 0, 1, -1, HALF - 1, 1 - HALF]], np.int32)
    masked = ShareSource(operators, Q31).hide_integers(operand, product(7))
    assert np.array_equal(masked.reveal_integers([share.residues for share in masked.shares]), operand)


def test_the_reference_sends_the_operand_itself() -> None:
    operand = random_operand(3, 10)
    source = UnmaskedSource(Q31)
    masked = source.hide_integers(operand, product(10))
    assert source.operators == 0 and len(masked.shares) == 1 and masked.shares[0].seed is None
    assert np.array_equal(masked.shares[0].residues, operand % np.int64(Q31.modulus))


def test_masks_leave_the_operand_as_it_was() -> None:
    operand = random_operand(3, 10)
    before = operand.copy()
    ShareSource(3, Q31).hide_integers(operand, product(10))
    assert np.array_equal(operand, before)


@OPERATORS
def test_exact_sources_add_no_noise(operators: int) -> None:
    assert ShareSource(operators, Q31).noise(10**9) == 0
    assert UnmaskedSource(Q31).noise(10**9) == 0


# Who gets what.


@OPERATORS
def test_every_operator_gets_one_share_and_only_the_last_one_without_a_seed(operators: int) -> None:
    source = ShareSource(operators, Q31)
    masked = source.hide_integers(random_operand(4, 6), product(6))
    assert source.operators == operators and source.parameters is Q31
    assert [share.recipient for share in masked.shares] == list(range(operators))
    assert [share.seed is None for share in masked.shares] == [False] * (operators - 1) + [True]


@OPERATORS
def test_a_shares_residues_are_what_its_seed_expands_to_whole_or_in_blocks_of_rows(operators: int) -> None:
    masked = ShareSource(operators, Q31).hide_integers(random_operand(40, 6), product(6))
    for share in masked.shares[:-1]:
        assert share.seed is not None and share.seed.row_offset == 0
        assert np.array_equal(share.residues, share.seed.expand(40, 6))
        block = Seed(share.seed.key, Q31, 17).expand(5, 6)
        assert np.array_equal(share.residues[17:22], block)


@OPERATORS
def test_a_block_of_a_shares_rows_goes_to_the_same_operator_and_expands_to_the_same_residues(
    operators: int,
) -> None:
    masked = ShareSource(operators, Q31).hide_integers(random_operand(40, 6), product(6))
    for share in masked.shares:
        whole = np.concatenate([share.rows(start, start + 13).residues for start in range(0, 40, 13)])
        assert np.array_equal(whole, share.residues)
        for block, offset in ((share.rows(13, 26), 13), (share.rows(13, 26).rows(4, 13), 17)):
            assert block.recipient == share.recipient
            assert np.array_equal(block.residues, share.residues[offset:26])
            assert (block.seed is None) == (share.seed is None)
            if block.seed is not None:
                assert np.array_equal(block.seed.expand(26 - offset, 6), block.residues)


@pytest.mark.parametrize("operators", [-1, 0, 1])
def test_sharing_with_fewer_than_two_operators_is_refused(operators: int) -> None:
    with pytest.raises(ValueError, match="two or more"):
        ShareSource(operators, Q31)


@pytest.mark.parametrize("responses", [0, 1, 2, 4])
def test_any_other_number_of_responses_than_shares_is_refused(responses: int) -> None:
    masked = ShareSource(3, Q31).hide_integers(random_operand(4, 6), product(6))
    with pytest.raises(ValueError):
        masked.reveal_integers([np.zeros((4, 2), np.uint32)] * responses)


def test_the_answer_to_one_share_is_not_accepted_for_another() -> None:
    stored = torch.from_numpy(np.random.default_rng(0).integers(-127, 128, (6, 8), dtype=np.int8))
    s = secret_vectors(bytes(KEY_BYTES), "layer", Direction.FORWARD, 6, Q31)
    check = CheckVectors(s, check_vectors(stored, s, Direction.FORWARD, Q31), Q31)
    shares = ShareSource(3, Q31).hide_integers(random_operand(4, 8), product(8)).shares
    answers = [product_mod_q(share.residues, stored.numpy().T) for share in shares]
    for i, j in itertools.product(range(3), repeat=2):
        if i == j:
            check.verify(shares[i].residues, answers[j], vectors=2)
        else:
            with pytest.raises(VerificationError, match="row 0 of 4"):
                check.verify(shares[i].residues, answers[j])


# What shares tell.


@OPERATORS
def test_seeds_do_not_depend_on_the_operand_and_the_last_share_is_operand_plus_masks(operators: int) -> None:
    masks = None
    for operand in (random_operand(5, 8, seed=1), random_operand(5, 8, seed=2), np.zeros((5, 8), np.int32)):
        masked = ShareSource(operators, Q31, KnownRandomness()).hide_integers(operand, product(8))
        *seeded, last = masked.shares
        total = sum(share.residues.astype(object) for share in seeded)
        assert np.array_equal((last.residues - total) % Q31.modulus, operand % np.int64(Q31.modulus))
        drawn = ([share.seed for share in seeded], [share.residues.tobytes() for share in seeded])
        assert masks is None or drawn == masks
        masks = drawn


def chi_square(words: np.ndarray, bins: np.ndarray) -> float:
    """How far 256 counts lie from equal, in standard deviations of the statistic."""
    counts = np.bincount(bins.ravel(), minlength=256)
    expected = words.size / 256
    statistic = float((((counts - expected) ** 2) / expected).sum())
    return (statistic - 255) / (2 * 255) ** 0.5


def assert_uniform(words: np.ndarray) -> None:
    assert words.size >= 256 * 100
    assert abs(chi_square(words, words.astype(np.int64) * 256 // Q31.modulus)) < 4.5
    assert abs(chi_square(words, words & 0xFF)) < 4.5
    # Neighbours are independent: their differences are uniform too.
    differences = (words.astype(np.int64)[:, 1:] - words[:, :-1]) % Q31.modulus
    assert abs(chi_square(differences, differences * 256 // Q31.modulus)) < 4.5


def test_the_measure_of_uniformity_notices_constants_small_values_and_single_digits() -> None:
    uniform = expand(bytes(range(32)), 0, 400, 500, Q31)
    assert_uniform(uniform)
    for flawed in (
        np.zeros_like(uniform),
        uniform // 2,
        uniform & ~np.uint32(1),
        uniform | np.uint32(3 << 28),
    ):
        with pytest.raises(AssertionError):
            assert_uniform(flawed)
    repeated = np.repeat(uniform[:, :250], 2, axis=1)
    with pytest.raises(AssertionError):
        assert_uniform(repeated)


@OPERATORS
@pytest.mark.parametrize("value", [0, 1, -HALF, HALF])
def test_every_share_of_a_constant_operand_looks_uniform(operators: int, value: int) -> None:
    operand = np.full((300, 400), value, np.int32)
    masked = ShareSource(operators, Q31, KnownRandomness()).hide_integers(operand, product(400))
    for share in masked.shares:
        assert_uniform(share.residues)


@OPERATORS
def test_whatever_all_operators_but_one_add_up_stays_uniform(operators: int) -> None:
    # With all shares the operand comes out; with one missing, the missing mask hides it.
    operand = np.full((200, 300), 12345, np.int32)
    masked = ShareSource(operators, Q31, KnownRandomness()).hide_integers(operand, product(300))
    signed = [*(-share.residues.astype(np.int64) for share in masked.shares[:-1])]
    signed.append(masked.shares[-1].residues.astype(np.int64))
    assert np.all(sum(signed) % Q31.modulus == 12345)
    for missing in range(operators):
        known = [part for i, part in enumerate(signed) if i != missing]
        for size in range(1, operators):
            for subset in itertools.combinations(known, size):
                assert_uniform((sum(subset) % Q31.modulus).astype(np.uint32))


# One mask for one operand.


def test_a_share_of_some_of_a_seeds_columns_is_refused() -> None:
    rows = SeededRows(Seed(bytes(32), Q31), 3, 8)
    assert not Share(0, rows).residues.flags.writeable
    with pytest.raises(ValueError, match="all columns"):
        Share(0, rows[:, 2:])


@OPERATORS
def test_equal_operands_of_equal_products_never_share_a_mask(operators: int) -> None:
    source, operand = ShareSource(operators, Q31), np.ones((2, 8), np.int32)
    drawn: list[bytes] = []
    for _ in range(400):
        masked = source.hide_integers(operand, product(8))
        drawn += keys(masked)
        drawn += [share.residues.tobytes() for share in masked.shares]
        # No row of one operand has the mask of another row.
        drawn += [row.tobytes() for share in masked.shares for row in share.residues]
    assert len(drawn) == 400 * (operators - 1 + 3 * operators)
    assert len(set(drawn)) == len(drawn)


@OPERATORS
def test_every_operand_draws_32_fresh_bytes_once(operators: int) -> None:
    randomness = KnownRandomness()
    source = ShareSource(operators, Q31, randomness)
    for count in range(1, 6):
        source.hide_integers(np.zeros((2, 8), np.int32), product(8))
        assert len(randomness.drawn) == count
        assert len(randomness.drawn[-1]) == 32


@OPERATORS
def test_one_secret_gives_every_operator_product_and_row_count_its_own_key(operators: int) -> None:
    # The labels separate sub-streams even under randomness that repeats.
    def stuck(size: int) -> bytes:
        return bytes(range(size))

    source, drawn = ShareSource(operators, Q31, stuck), []
    products = [product(8), product(8, "other"), forward_products(["layer", "other"], 8)[0]]
    products += backward_products([("layer", 8)])
    for which in products:
        for rows in (1, 2, 11):
            drawn += keys(source.hide_integers(np.zeros((rows, 8), np.int32), which))
    assert len(set(drawn)) == len(drawn) == 4 * 3 * (operators - 1)
    assert bytes(range(32)) not in drawn


def test_two_sources_draw_different_masks() -> None:
    operand = np.zeros((2, 8), np.int32)
    a, b = (ShareSource(2, Q31).hide_integers(operand, product(8)) for _ in range(2))
    assert set(keys(a)).isdisjoint(keys(b))


SOURCES: list[Callable[[], ShareSource | UnmaskedSource]] = [
    lambda: ShareSource(2, Q31),
    lambda: UnmaskedSource(Q31),
]


@pytest.mark.parametrize("make", SOURCES, ids=["shares", "reference"])
@pytest.mark.parametrize("version", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_source_is_not_pickled_alone_or_inside_something(make, version: int) -> None:  # type: ignore[no-untyped-def]
    source = make()
    for holder in (source, [source], {"model": (source,)}):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(holder, version)


@pytest.mark.parametrize("make", SOURCES, ids=["shares", "reference"])
def test_a_copy_of_a_source_is_the_source(make) -> None:  # type: ignore[no-untyped-def]
    source = make()
    assert copy.copy(source) is source
    assert copy.deepcopy(source) is source
    assert copy.deepcopy({"model": [source]})["model"][0] is source


def test_a_masked_operand_is_not_pickled() -> None:
    masked = ShareSource(2, Q31).hide_integers(random_operand(1, 3), product(3))
    for holder in (masked, [masked]):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(holder)


@OPERATORS
def test_the_residues_held_for_a_retry_cannot_be_changed(operators: int) -> None:
    masked = ShareSource(operators, Q31).hide_integers(random_operand(4, 3), product(3))
    for share in masked.shares:
        for held in (share.residues, share.rows(1, 3).residues):
            with pytest.raises(ValueError, match="read-only"):
                held[0, 0] = 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("rows", [2, 400], ids=["small", "large enough for threads"])
def test_a_forked_child_and_its_parent_draw_different_masks(rows: int) -> None:
    source, operand = ShareSource(3, Q31), np.zeros((rows, 400), np.int32)
    # Starts the threads of the parent, which the child doesn't have.
    source.hide_integers(operand, product(400))

    def draw() -> bytes:
        drawn = [source.hide_integers(operand, product(400)) for _ in range(2)]
        return b"".join(keys(drawn[0]) + keys(drawn[1]))

    answers = [in_a_child(draw) for _ in range(3)] + [draw()]
    assert [len(answer) for answer in answers] == [4 * KEY_BYTES] * 4
    drawn = {answer[i : i + KEY_BYTES] for answer in answers for i in range(0, 4 * KEY_BYTES, KEY_BYTES)}
    assert len(drawn) == 16


# What is printed.


def test_nothing_that_is_printed_shows_a_secret() -> None:
    randomness = KnownRandomness()
    source = ShareSource(2, Q31, randomness)
    operand = np.full((2, 3), 987_654_321, np.int32)
    masked = source.hide_integers(operand, product(3))
    residues = np.concatenate([share.residues.ravel() for share in masked.shares])
    check = CheckVectors(residues[None], residues[None], Q31)
    secrets = {str(operand[0, 0])}
    secrets |= {str(int(word)) for word in residues} | {hex(int(word)) for word in residues}
    for secret in (*keys(masked), *randomness.drawn):
        secrets |= {repr(secret)[2:-1], secret.hex(), str(list(secret))[1:-1]}
    seed = masked.shares[0].seed
    assert isinstance(seed, Seed)
    for thing in (*masked.shares, masked, masked.shares, seed, check, source, [source, seed], {"x": masked}):
        printed = f"{thing!r} {thing!s} {thing}"
        assert printed.strip()
        for secret in secrets:
            assert secret not in printed
    # The recipient and the offset are no secrets, and help in a message.
    assert "recipient=1" in repr(masked.shares[1]) and "row_offset=0" in repr(seed)


def test_a_seed_of_the_wrong_length_is_refused_without_showing_it() -> None:
    key = bytes(range(65, 90))
    with pytest.raises(ValueError, match="not 25") as caught:
        Seed(key, Q31)
    assert key.decode() not in str(caught.value) and key.hex() not in str(caught.value)


# Misuse.


@pytest.mark.parametrize("length", [0, 16, 31])
def test_a_random_source_that_returns_too_little_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="32"):
        ShareSource(2, Q31, lambda size: bytes(length)).hide_integers(np.zeros((2, 3), np.int32), product(3))


def test_an_operand_that_does_not_fit_its_product_is_not_masked() -> None:
    with pytest.raises(ValueError, match="columns|contraction"):
        ShareSource(2, Q31).hide_integers(np.zeros((2, 7), np.int32), product(3))


def test_responses_of_different_shapes_are_not_unmasked() -> None:
    masked = ShareSource(2, Q31).hide_integers(np.zeros((2, 3), np.int32), product(3))
    with pytest.raises(ValueError, match="shape"):
        masked.reveal_integers([np.zeros((2, 3), np.uint32), np.zeros((2, 2), np.uint32)])
