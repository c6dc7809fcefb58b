"""Intervals and verdicts that are wrong as rarely as they say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from blindtune.client.audit.field import combine, outside, row_space
from blindtune.client.audit.statistics import FAMILY_ERROR, Score, judge
from blindtune.client.audit.transcript import Operand, Transcript
from blindtune.client.audit.word_tests import correlation, small_differences, uniformity
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Direction, Product, Span


def _score(successes: int, trials: int, chance: float = 0.5, pooled: float | None = None) -> Score:
    return Score("an attack", "trials", successes, trials, chance, pooled)


def test_intervals_are_those_of_clopper_and_pearson() -> None:
    """At 95 %, from the tables: 0 of 10, 5 of 10, 10 of 10."""
    assert _score(0, 10).interval(0.025) == pytest.approx((0, 0.3085), abs=1e-4)
    assert _score(5, 10).interval(0.025) == pytest.approx((0.1871, 0.8129), abs=1e-4)
    assert _score(10, 10).interval(0.025) == pytest.approx((0.6915, 1), abs=1e-4)


@settings(deadline=None)
@given(st.integers(1, 300), st.floats(0.01, 0.99), st.floats(1e-8, 0.1))
def test_an_interval_misses_the_truth_as_rarely_as_it_says(trials: int, truth: float, error: float) -> None:
    bounds = [_score(k, trials).interval(error) for k in range(trials + 1)]
    probabilities = binom.pmf(range(trials + 1), trials, truth)
    low, high = (np.array(x) for x in zip(*bounds, strict=True))
    assert probabilities[low > truth].sum() <= error * (1 + 1e-6)
    assert probabilities[high < truth].sum() <= error * (1 + 1e-6)


@pytest.mark.parametrize("tests", [1, 14])
def test_all_verdicts_together_are_wrong_with_the_error_of_the_family_at_most(tests: int) -> None:
    trials = 200
    least = next(k for k in range(trials + 1) if judge([_score(k, trials)] * tests)[0].above_chance)
    assert tests * binom.sf(least - 1, trials, 0.5) < FAMILY_ERROR
    assert not any(x.above_chance for x in judge([_score(least - 1, trials)] * tests))


@pytest.mark.parametrize("tests", [1, 14])
def test_all_intervals_together_are_wrong_with_the_error_of_the_family_at_most(tests: int) -> None:
    """On both sides at once, for any truth; an error that is not small leaves no room for twice as much."""
    trials, error = 2000, 0.2
    judged = [judge([_score(k, trials)] * tests, error)[0] for k in range(trials + 1)]
    low, high = np.array([x.low for x in judged]), np.array([x.high for x in judged])
    missed = [
        float(binom.pmf(range(trials + 1), trials, truth)[(low > truth) | (high < truth)].sum())
        for truth in np.linspace(0.3, 0.7, 41)
    ]
    # Exact intervals are cautious, and long ones not by much.
    assert 0.7 * error < tests * max(missed) <= error


def test_a_verdict_is_one_sided_and_never_milder_than_the_interval() -> None:
    for k in range(101):
        score = _score(k, 100)
        (judged,) = judge([score])
        assert judged.above_chance == (score.interval(FAMILY_ERROR)[0] > 0.5)
        assert judged.above_chance or judged.low <= 0.5


def test_an_exact_p_value_takes_the_place_of_the_binomial_one() -> None:
    assert not judge([Score("an attack", "trials", 99, 100, 0.5, exact_p=0.3)])[0].above_chance
    assert judge([Score("an attack", "trials", 50, 100, 0.5, exact_p=1e-9)])[0].above_chance


def test_a_second_test_can_only_add_to_what_is_found() -> None:
    assert judge([_score(50, 100, pooled=1e-9)])[0].above_chance
    assert not judge([_score(50, 100, pooled=0.3)])[0].above_chance
    assert judge([_score(99, 100, pooled=1.0)])[0].above_chance


@pytest.mark.parametrize("values", [(-1, 5, 0.5), (6, 5, 0.5), (0, 0, 0.5), (1, 5, 0.0), (1, 5, 1.0)])
def test_what_is_no_score_is_refused(values: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match="is no score"):
        _score(*values)


def _residues(random: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return random.integers(0, Q31.modulus, (rows, columns), np.uint32)


@pytest.mark.parametrize("rank", [0, 1, 5, 8])
def test_the_rank_of_a_span_is_found_and_its_rows_are_told_from_others(rank: int) -> None:
    random = np.random.default_rng(rank)
    basis = _residues(random, rank, 12)
    rows = combine(_residues(random, 8, rank), basis, Q31.modulus)
    # By big integers, which cannot overflow.
    coefficients = _residues(random, 3, rank)
    exact = (
        coefficients.astype(object) @ basis.astype(object) % Q31.modulus
        if rank
        else np.zeros((3, 12), object)
    )
    members = combine(coefficients, basis, Q31.modulus)
    assert (members == exact).all()
    echelon, pivots = row_space(rows, Q31.modulus)
    assert len(echelon) == len(pivots) == rank
    assert not outside(members.astype(np.int64), echelon, pivots, Q31.modulus).any()
    assert outside(_residues(random, 3, 12).astype(np.int64), echelon, pivots, Q31.modulus).any(axis=1).all()


PRODUCT = Product(Direction.FORWARD, (Span("layer", 0, 32),))


def _transcript(words: list[np.ndarray]) -> Transcript:
    return Transcript([Operand(PRODUCT, len(x), 32, Q31, x) for x in words])


@pytest.mark.parametrize("test", [uniformity, correlation, small_differences])
def test_tests_of_words_are_seldom_wrong_about_uniform_ones(test: object) -> None:
    """Their limit distributions are good enough for tails as thin as the verdicts need."""
    random = np.random.default_rng(5)
    p = []
    for _ in range(40):
        score = test(_transcript([_residues(random, 40, 32) for _ in range(40)]))  # type: ignore[operator]
        p.append(score.p_value)
    assert min(p) > 1e-5
    # They are p-values: not far fewer are small than ought to be.
    assert np.mean(np.array(p) < 0.5) > 0.02


def test_flaws_that_are_hard_to_see_are_found() -> None:
    random = np.random.default_rng(6)
    words = [_residues(random, 64, 32) for _ in range(40)]
    biased = [np.where(random.random(x.shape) < 0.02, x & ~np.uint32(1), x) for x in words]
    assert not judge([uniformity(_transcript(words))])[0].above_chance
    assert judge([uniformity(_transcript([x // 2 for x in words]))])[0].above_chance
    assert judge([uniformity(_transcript([x & ~np.uint32(1) for x in biased]))])[0].above_chance
    repeated = [words[0]] * 40
    assert judge([correlation(_transcript(repeated))])[0].above_chance
    shifted = [np.where(np.arange(32) % 2, x, np.roll(x, -1, axis=1)) for x in words]
    assert judge([correlation(_transcript(shifted))])[0].above_chance
