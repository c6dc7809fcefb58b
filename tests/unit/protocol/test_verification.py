"""What a worker may answer and have accepted: the product alone."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blindtune.errors import VerificationError
from blindtune.protocol.expansion import derive_key
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Direction
from blindtune.protocol.residues import dot
from blindtune.protocol.verification import CheckVectors, check_vectors, secret_vectors

SECRET = derive_key(bytes(range(32)), "tests of verification")
HALF = (Q31.modulus - 1) // 2
BOTH_DIRECTIONS = pytest.mark.parametrize("direction", list(Direction), ids=lambda d: d.name.lower())


def product_mod_q(operand: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """operand . matrix mod q in Python integers."""
    return ((operand.astype(object) @ matrix.astype(object)) % Q31.modulus).astype(np.uint32)


def residues(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, Q31.modulus, (rows, columns), dtype=np.uint32)


@dataclass
class Case:
    """A group of three layers in one direction, with its check vectors and a right response."""

    matrix: np.ndarray
    check: CheckVectors
    operand: np.ndarray
    response: np.ndarray
    outputs: tuple[int, ...]

    def rejects(self, response: np.ndarray, vectors: int = 1) -> str:
        with pytest.raises(VerificationError) as caught:
            self.check.verify(self.operand, response, vectors)
        return str(caught.value)


def make_case(direction: Direction, weights: dict[str, np.ndarray], rows: int, seed: int = 5) -> Case:
    features = {name: w.shape[0 if direction is Direction.FORWARD else 1] for name, w in weights.items()}
    s = {name: secret_vectors(SECRET, name, direction, n, Q31) for name, n in features.items()}
    v = {name: check_vectors(torch.from_numpy(w), s[name], direction, Q31) for name, w in weights.items()}
    if direction is Direction.FORWARD:
        matrix = np.concatenate([w.T for w in weights.values()], axis=1)
        total = sum(part.astype(np.uint64) for part in v.values())
        check = CheckVectors(
            np.concatenate(list(s.values()), axis=1), (total % Q31.modulus).astype(np.uint32), Q31
        )
    else:
        matrix = np.concatenate(list(weights.values()))
        check = CheckVectors(next(iter(s.values())), np.concatenate(list(v.values()), axis=1), Q31)
    operand = residues(rows, matrix.shape[0], seed)
    widths = tuple(w.shape[0] for w in weights.values())
    return Case(matrix, check, operand, product_mod_q(operand, matrix), widths)


def layers(in_features: int = 24, prefix: str = "") -> dict[str, np.ndarray]:
    generator = np.random.default_rng(in_features + len(prefix))
    return {
        f"{prefix}{name}": generator.integers(-127, 128, (out, in_features), dtype=np.int8)
        for name, out in (("q", 20), ("k", 12), ("v", 12))
    }


@cache
def case(direction: Direction, rows: int = 7) -> Case:
    return make_case(direction, layers(), rows)


# v = M s.


@BOTH_DIRECTIONS
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (3, 7), (130, 257), (257, 130)])
def test_v_is_the_product_of_matrix_and_s_in_python_integers(
    direction: Direction, shape: tuple[int, int]
) -> None:
    weight = np.random.default_rng(1).integers(-127, 128, shape, dtype=np.int8)
    matrix = weight.T if direction is Direction.FORWARD else weight
    s = secret_vectors(SECRET, "layer", direction, matrix.shape[1], Q31)
    v = check_vectors(torch.from_numpy(weight), s, direction, Q31)
    assert v.dtype == np.uint32 and v.shape == (Q31.hint_vectors, matrix.shape[0])
    assert np.array_equal(v.T, product_mod_q(matrix, s.T))


@BOTH_DIRECTIONS
@pytest.mark.parametrize("weight", [127, -127])
@pytest.mark.parametrize("residue", [1, HALF, HALF + 1, Q31.modulus - 1])
def test_v_does_not_overflow_at_a_vocabulary_of_200_000(
    direction: Direction, weight: int, residue: int
) -> None:
    stored = torch.full((200_000, 40), weight, dtype=torch.int8)
    features, summed = (200_000, 40) if direction is Direction.BACKWARD else (40, 200_000)
    v = check_vectors(stored, np.full((Q31.hint_vectors, summed), residue, np.uint32), direction, Q31)
    assert v.shape == (Q31.hint_vectors, features)
    assert np.all(v == weight * residue * summed % Q31.modulus)


@BOTH_DIRECTIONS
def test_v_of_a_layer_read_in_several_slices_is_right(direction: Direction) -> None:
    weight = np.random.default_rng(2).integers(-127, 128, (3000, 3500), dtype=np.int8)
    assert weight.size > 2 * (1 << 22)
    matrix = weight.T if direction is Direction.FORWARD else weight
    s = secret_vectors(SECRET, "layer", direction, matrix.shape[1], Q31)
    v = check_vectors(torch.from_numpy(weight), s, direction, Q31)
    # Halves of s times float64 matrices: every partial sum is an integer below 2^53.
    low, high = (s & 0xFFFF).astype(np.float64), (s >> 16).astype(np.float64)
    wide = matrix.astype(np.float64)
    expected = ((high @ wide.T).astype(np.int64) * 65536 + (low @ wide.T).astype(np.int64)) % Q31.modulus
    assert np.array_equal(v, expected)


def test_forward_vectors_of_two_layers_differ_so_that_outputs_cannot_be_swapped() -> None:
    a = secret_vectors(SECRET, "q", Direction.FORWARD, 500, Q31)
    b = secret_vectors(SECRET, "k", Direction.FORWARD, 500, Q31)
    assert a.shape == (Q31.hint_vectors, 500) and int(a.max()) < Q31.modulus
    # 1000 words of 31 bits agree by chance at 5e-7 places.
    assert not np.any(a == b)


def test_backward_vectors_are_one_for_all_layers_so_that_input_gradients_add_up() -> None:
    a = secret_vectors(SECRET, "q", Direction.BACKWARD, 500, Q31)
    assert np.array_equal(a, secret_vectors(SECRET, "k", Direction.BACKWARD, 500, Q31))
    assert np.array_equal(a[:, :300], secret_vectors(SECRET, "k", Direction.BACKWARD, 300, Q31))


def test_the_vectors_of_a_layer_differ_from_each_other_by_direction_and_by_secret() -> None:
    forward = secret_vectors(SECRET, "q", Direction.FORWARD, 500, Q31)
    backward = secret_vectors(SECRET, "q", Direction.BACKWARD, 500, Q31)
    other = secret_vectors(bytes(32), "q", Direction.FORWARD, 500, Q31)
    vectors = [*forward, *backward, *other]
    assert not any(np.any(a == b) for i, a in enumerate(vectors) for b in vectors[:i])


# Right responses.


@BOTH_DIRECTIONS
@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.data())
def test_a_right_response_is_always_accepted(direction: Direction, data: st.DataObject) -> None:
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    in_features, rows = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 20))
    weights = {
        f"layer{i}": generator.integers(-127, 128, (out, in_features), dtype=np.int8)
        for i, out in enumerate(data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=4)))
    }
    made = make_case(direction, weights, rows, seed=data.draw(st.integers(0, 2**32)))
    for vectors in (1, 2):
        made.check.verify(made.operand, made.response, vectors)


@BOTH_DIRECTIONS
@pytest.mark.parametrize("residue", [0, 1, HALF, HALF + 1, Q31.modulus - 1])
@pytest.mark.parametrize("weight", [-127, 0, 127])
def test_a_right_response_of_extreme_values_is_accepted(
    direction: Direction, residue: int, weight: int
) -> None:
    made = make_case(direction, {name: np.full_like(w, weight) for name, w in layers().items()}, rows=3)
    operand = np.full_like(made.operand, residue)
    made.check.verify(operand, product_mod_q(operand, made.matrix), vectors=2)


@BOTH_DIRECTIONS
def test_a_right_response_of_4097_rows_is_accepted_and_of_none(direction: Direction) -> None:
    made = case(direction, rows=4097)
    made.check.verify(made.operand, made.response, vectors=2)
    made.check.verify(made.operand[:0], made.response[:0])


@BOTH_DIRECTIONS
def test_a_response_in_received_bytes_is_accepted_where_it_lies(direction: Direction) -> None:
    made = case(direction)
    received = np.frombuffer(made.response.tobytes(), np.uint32).reshape(made.response.shape)
    made.check.verify(made.operand, received)
    wrong = received.copy()
    wrong[-1, -1] ^= 1
    assert "row 6" in made.rejects(np.frombuffer(wrong.tobytes(), np.uint32).reshape(wrong.shape))


def test_a_zero_operand_has_a_zero_product() -> None:
    made = case(Direction.FORWARD)
    made.check.verify(np.zeros_like(made.operand), np.zeros_like(made.response), vectors=2)


# Wrong responses.


@BOTH_DIRECTIONS
@pytest.mark.parametrize("error", [1, -1, 1 << 30, -(1 << 30), 1 << 16, HALF])
@pytest.mark.parametrize("row", [0, 3, 6])
def test_an_error_in_a_single_residue_is_caught_with_its_row(
    direction: Direction, error: int, row: int
) -> None:
    made = case(direction)
    for column in range(made.response.shape[1]):
        wrong = made.response.copy()
        wrong[row, column] = (int(wrong[row, column]) + error) % Q31.modulus
        assert f"row {row} of 7" in made.rejects(wrong)


@BOTH_DIRECTIONS
def test_a_residue_plus_q_is_caught_though_it_is_congruent(direction: Direction) -> None:
    made = case(direction)
    for row, column in np.ndindex(made.response.shape):
        wrong = made.response.copy()
        wrong[row, column] += np.uint32(Q31.modulus)
        assert f"row {row} of 7" in made.rejects(wrong)


@BOTH_DIRECTIONS
def test_every_residue_plus_q_is_caught(direction: Direction) -> None:
    made = case(direction)
    made.rejects(made.response + np.uint32(Q31.modulus), vectors=2)


@BOTH_DIRECTIONS
@pytest.mark.parametrize("bit", [0, 15, 30, 31])
def test_a_flipped_bit_is_caught(direction: Direction, bit: int) -> None:
    made = case(direction)
    wrong = made.response.copy()
    wrong[2, 5] ^= np.uint32(1 << bit)
    assert "row 2" in made.rejects(wrong)


@BOTH_DIRECTIONS
def test_zeros_and_other_constants_are_caught(direction: Direction) -> None:
    made = case(direction)
    for value in (0, 1, Q31.modulus - 1, Q31.modulus, (1 << 32) - 1):
        made.rejects(np.full_like(made.response, value))


def test_swapped_outputs_of_two_members_of_a_group_are_caught() -> None:
    made = case(Direction.FORWARD)
    q, k, v = np.split(made.response, np.cumsum(made.outputs)[:-1], axis=1)
    assert k.shape == v.shape
    made.check.verify(made.operand, np.concatenate([q, k, v], axis=1))
    made.rejects(np.concatenate([q, v, k], axis=1))


def test_swapped_outputs_of_members_with_equal_sums_are_caught() -> None:
    # With one s for both layers these would pass: the sum over the group is the same.
    made = case(Direction.FORWARD)
    q, k, v = np.split(made.response.astype(np.int64), np.cumsum(made.outputs)[:-1], axis=1)
    shifted = np.concatenate([q, (k + 5) % Q31.modulus, (v - 5) % Q31.modulus], axis=1)
    made.rejects(shifted.astype(np.uint32))


def test_equal_vectors_for_two_outputs_would_let_errors_cancel() -> None:
    # Why every output of a product needs a vector of its own, and no layer may stand in it twice.
    made = case(Direction.FORWARD)
    s = made.check.s.copy()
    s[:, 1] = s[:, 0]
    v = ((s.astype(object) @ made.matrix.T.astype(object)) % Q31.modulus).astype(np.uint32)
    wrong = made.response.copy()
    wrong[0, 0] = (int(wrong[0, 0]) + 5) % Q31.modulus
    wrong[0, 1] = (int(wrong[0, 1]) - 5) % Q31.modulus
    CheckVectors(s, v, Q31).verify(made.operand, wrong, vectors=2)
    made.rejects(wrong)


@BOTH_DIRECTIONS
def test_the_right_response_to_another_operand_is_caught(direction: Direction) -> None:
    made = case(direction)
    other = residues(7, made.operand.shape[1], seed=99)
    replayed = product_mod_q(other, made.matrix)
    made.check.verify(other, replayed)
    made.rejects(replayed)


@BOTH_DIRECTIONS
def test_rows_in_another_order_are_caught(direction: Direction) -> None:
    made = case(direction)
    made.rejects(made.response[::-1].copy())
    swapped = made.response.copy()
    swapped[[5, 6]] = swapped[[6, 5]]
    assert "row 5" in made.rejects(swapped)


@BOTH_DIRECTIONS
def test_the_response_of_another_layer_group_is_caught(direction: Direction) -> None:
    made = case(direction)
    other = make_case(direction, layers(prefix="other "), rows=7)
    assert np.array_equal(other.operand, made.operand) and not np.array_equal(other.matrix, made.matrix)
    other.check.verify(made.operand, other.response)
    made.rejects(other.response)


@BOTH_DIRECTIONS
def test_the_response_of_a_layer_with_one_weight_off_by_one_is_caught(direction: Direction) -> None:
    made = case(direction)
    matrix = made.matrix.copy()
    matrix[3, 4] += 1 if matrix[3, 4] < 127 else -1
    made.rejects(product_mod_q(made.operand, matrix))


@BOTH_DIRECTIONS
def test_a_response_of_another_shape_is_caught(direction: Direction) -> None:
    made = case(direction)
    y = made.response
    for wrong in (
        y[:-1], y[:, :-1], y[:0], y[0], y[None], y.T.copy(), np.concatenate([y, y]),
        np.concatenate([y, y], axis=1), y.reshape(-1), y.reshape(1, -1),
    ):  # fmt: skip
        assert "shape" in made.rejects(wrong)


@BOTH_DIRECTIONS
@pytest.mark.parametrize("row", [0, 2047, 2048, 4096])
def test_one_wrong_row_among_4097_is_caught_and_named(direction: Direction, row: int) -> None:
    made = case(direction, rows=4097)
    wrong = made.response.copy()
    wrong[row, -1] = (int(wrong[row, -1]) + 1) % Q31.modulus
    assert f"row {row} of 4097" in made.rejects(wrong)


def test_the_first_of_several_wrong_rows_is_named() -> None:
    made = case(Direction.FORWARD, rows=4097)
    wrong = made.response.copy()
    for row in (4000, 2500, 77, 78):
        wrong[row, 0] ^= np.uint32(1)
    assert "row 77 of 4097" in made.rejects(wrong)


def test_q_in_place_of_zero_is_caught() -> None:
    made = case(Direction.FORWARD)
    operand, response = np.zeros_like(made.operand), np.zeros_like(made.response)
    response[6, 7] = Q31.modulus
    with pytest.raises(VerificationError, match="row 6 of 7"):
        made.check.verify(operand, response)


@pytest.mark.parametrize("blind", [0, 1])
def test_an_error_hidden_from_one_vector_is_caught_by_the_other(blind: int) -> None:
    # What a worker that knew a vector could do, and the reason that hints are checked with both.
    made = case(Direction.FORWARD)
    s = made.check.s[blind]
    wrong = made.response.astype(object)
    wrong[4, 0] += int(s[1])
    wrong[4, 1] -= int(s[0])
    wrong = (wrong % Q31.modulus).astype(np.uint32)
    assert "row 4" in made.rejects(wrong, vectors=2)
    if blind == 0:
        made.check.verify(made.operand, wrong, vectors=1)
    else:
        assert "row 4" in made.rejects(wrong, vectors=1)


@BOTH_DIRECTIONS
def test_no_random_error_passes(direction: Direction) -> None:
    # 6000 errors, each of which passes with probability 1/q: one that passes is a defect.
    made = case(direction)
    generator = np.random.default_rng(17)
    columns = made.response.shape[1]
    for trial in range(6000):
        row = int(generator.integers(7))
        if trial % 3 == 0:  # Anywhere.
            error = generator.integers(0, Q31.modulus, columns)
        elif trial % 3 == 1:  # Small, as from hardware that saturates or rounds.
            error = generator.integers(-3, 4, columns) * (generator.random(columns) < 0.2)
        else:  # Two residues.
            error = np.zeros(columns, np.int64)
            error[generator.choice(columns, 2, replace=False)] = generator.integers(1, Q31.modulus, 2)
        if not np.any(error % Q31.modulus):
            continue
        wrong = made.response.copy()
        wrong[row] = (wrong[row] + error) % Q31.modulus
        with pytest.raises(VerificationError):
            made.check.verify(made.operand, wrong)


def test_a_wrong_response_passes_for_one_s_in_q_as_the_theory_says() -> None:
    # Soundness for a modulus of 31 bits can't be measured; its cause can: an error e passes for exactly
    # those s with e . s = 0, so for every choice of the other words one value of the last passes.
    made = case(Direction.FORWARD)
    error = np.zeros(made.response.shape[1], object)
    error[:3] = 5, 1 << 30, 7
    wrong = made.response.copy()
    wrong[0] = (wrong[0] + error) % Q31.modulus
    s = made.check.s[:1].astype(object)
    blind = -(5 * s[0, 0] + (1 << 30) * s[0, 1]) * pow(7, -1, Q31.modulus) % Q31.modulus
    for word, passes in (
        (blind, True),
        ((blind + 1) % Q31.modulus, False),
        ((blind - 1) % Q31.modulus, False),
    ):
        guessed = s.copy()
        guessed[0, 2] = word
        v = (guessed @ made.matrix.T.astype(object)) % Q31.modulus
        check = CheckVectors(guessed.astype(np.uint32), v.astype(np.uint32), Q31)
        check.verify(made.operand, made.response)
        if passes:
            check.verify(made.operand, wrong)
        else:
            with pytest.raises(VerificationError, match="row 0"):
                check.verify(made.operand, wrong)


# Sums of products.


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 1000, 200_000])
@pytest.mark.parametrize("a", [0, 1, Q31.modulus - 1])
def test_sums_of_extreme_products_do_not_overflow(length: int, a: int) -> None:
    row = np.full(length, a, np.uint32)
    vector = np.full(length, Q31.modulus - 1, np.uint32)
    assert int(dot(row, vector, Q31.q)) == a * (Q31.modulus - 1) * length % Q31.modulus


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    pairs=st.lists(
        st.tuples(st.integers(0, Q31.modulus - 1), st.integers(0, Q31.modulus - 1)), min_size=0, max_size=60
    )
)
def test_sums_of_products_are_those_of_python_integers(pairs: list[tuple[int, int]]) -> None:
    a = np.array([p[0] for p in pairs], np.uint32)
    b = np.array([p[1] for p in pairs], np.uint32)
    assert int(dot(a, b, Q31.q)) == sum(x * y for x, y in pairs) % Q31.modulus


def test_rows_of_200_000_extreme_residues_are_verified() -> None:
    width = 200_000
    check = CheckVectors(
        np.full((Q31.hint_vectors, 3), Q31.modulus - 1, np.uint32),
        np.full((Q31.hint_vectors, width), Q31.modulus - 1, np.uint32),
        Q31,
    )
    operand = np.full((2, width), Q31.modulus - 1, np.uint32)
    # C . v = 200000 and Y . s = -(y_0 + y_1 + y_2) mod q.
    response = np.array([[Q31.modulus - width, 0, 0], [Q31.modulus - width - 2, 1, 1]], np.uint32)
    check.verify(operand, response, vectors=2)
    response[1, 2] += 1
    with pytest.raises(VerificationError, match="row 1 of 2"):
        check.verify(operand, response)


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 7, 33, 130])
@pytest.mark.parametrize("rows", [1, 900])
def test_products_of_any_width_are_accepted_and_each_wrong_column_is_caught(rows: int, columns: int) -> None:
    generator = np.random.default_rng(columns)
    s, matrix = residues(Q31.hint_vectors, columns, 1), generator.integers(-127, 128, (columns, columns))
    check = CheckVectors(s, product_mod_q(s, matrix.T), Q31)
    operand = residues(rows, columns, 2)
    response = product_mod_q(operand, matrix)
    check.verify(operand, response, vectors=Q31.hint_vectors)
    for column in range(columns):
        wrong = response.copy()
        wrong[rows // 2, column] = (int(wrong[rows // 2, column]) + 1) % Q31.modulus
        with pytest.raises(VerificationError, match=f"row {rows // 2} of {rows} "):
            check.verify(operand, wrong)


# Misuse.


@pytest.mark.parametrize("vectors", [0, -1, 3])
def test_a_check_with_no_vectors_or_more_than_there_are_is_refused(vectors: int) -> None:
    made = case(Direction.FORWARD)
    with pytest.raises(ValueError, match="vectors"):
        made.check.verify(made.operand, made.response, vectors)


def test_a_response_of_fractions_is_not_rounded_into_a_right_one() -> None:
    made = case(Direction.FORWARD)
    with pytest.raises((VerificationError, ValueError, TypeError)):
        made.check.verify(made.operand, made.response + np.float64(0.5))


def test_an_operand_that_does_not_fit_the_vectors_is_refused_as_such() -> None:
    # Zeros beyond the operand's width would be the right product of a padded operand.
    made = case(Direction.FORWARD)
    narrow = made.operand[:, :-1].copy()
    padded = np.concatenate([narrow, np.zeros((7, 1), np.uint32)], axis=1)
    with pytest.raises((VerificationError, ValueError), match="operand"):
        made.check.verify(narrow, product_mod_q(padded, made.matrix))


def test_vectors_of_another_width_than_the_layer_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        check_vectors(
            torch.ones((4, 6), dtype=torch.int8),
            np.ones((Q31.hint_vectors, 7), np.uint32),
            Direction.BACKWARD,
            Q31,
        )
