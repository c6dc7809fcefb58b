"""A game that a constant guess wins exactly half of the time, and that nothing but the coins decides."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import hypergeom

from blindtune.client.audit import game, lab
from blindtune.client.audit.game import EXTREMES, GAME_ROWS, Round, game_rounds, play
from blindtune.client.audit.statistics import Score
from blindtune.client.audit.transcript import Operand, Transcript
from blindtune.client.audit.workloads import Sizes
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Direction, Product, Span

WIDTH = 32
PRODUCT = Product(Direction.FORWARD, (Span("layer", 0, WIDTH),))
Words = np.ndarray


def _played(rounds: list[Round], extreme: str, words: Callable[[int, Round], Words]) -> Score:
    """The score where a round's operand has these words."""
    operands = [Operand(PRODUCT, GAME_ROWS, WIDTH, Q31, words(i, x)) for i, x in enumerate(rounds)]
    return play(Transcript(operands), rounds, extreme)


def _uniform(random: np.random.Generator) -> Words:
    return random.integers(0, Q31.modulus, (GAME_ROWS, WIDTH), np.uint32)


@pytest.mark.parametrize("count", [6, 30, 75, 600])
def test_both_parts_of_each_game_hold_as_many_chosen_operands_as_ordinary_ones(count: int) -> None:
    rounds = game_rounds(WIDTH, count, np.random.default_rng(0))
    for extreme in EXTREMES:
        coins = [x.chosen for x in rounds if x.extreme == extreme]
        assert len(coins) == count + count % 2
        cut = 2 * (len(coins) // 6)
        for part in (coins[:cut], coins[cut:]):
            assert part.count(True) == part.count(False) > 0


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="5 rounds are too few"):
        game_rounds(WIDTH, 5, np.random.default_rng(0))


def test_the_order_is_the_generators_and_no_two_games_share_it() -> None:
    rounds = [[x.chosen for x in game_rounds(WIDTH, 60, np.random.default_rng(seed))] for seed in (1, 1, 2)]
    assert rounds[0] == rounds[1] != rounds[2]
    assert rounds[0][:60] != rounds[0][60:120]


def test_the_lab_draws_its_coins_afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    """From the operating system's entropy: a known seed would give the held-out answers away."""
    seen: list[list[bool]] = []

    class EnoughError(Exception):
        pass

    def stop(workload: object, sizes: object, folder: object, rounds: list[Round], *rest: object) -> None:
        seen.append([x.chosen for x in rounds])
        raise EnoughError

    monkeypatch.setattr(lab, "observations", stop)
    for name in ("one", "two"):
        with pytest.raises(EnoughError):
            lab.run_lab(tmp_path / name, Sizes(steps=6, texts=2, length=8), rounds=60)  # type: ignore[operator]
    assert seen[0] != seen[1]


@pytest.mark.parametrize("extreme", EXTREMES)
def test_operands_that_are_all_alike_leave_exactly_half(extreme: str) -> None:
    """No statistic varies, and whichever guess is made is constant."""
    rounds = game_rounds(WIDTH, 75, np.random.default_rng(1))
    score = _played(rounds, extreme, lambda i, x: np.zeros((GAME_ROWS, WIDTH), np.uint32))
    assert score.rate == 0.5
    assert score.p_value == 1


def test_a_statistic_that_never_varied_in_training_is_not_selected() -> None:
    """Even where in the other rounds it would tell everything, and its complement too."""
    random = np.random.default_rng(2)
    rounds = game_rounds(WIDTH, 60, random)
    fixed, small = _uniform(random), np.zeros((GAME_ROWS, WIDTH), np.uint32)
    score = _played(rounds, "all zeros", lambda i, x: small if i >= 20 and x.chosen else fixed)
    assert score.rate == 0.5
    for coins in ([True] * 4 + [False] * 4, [False, True] * 4):
        rule = game._best_rule(np.full(8, 3.0), np.array(coins))
        assert rule.right == 0.5
        assert not rule.guesses(np.array([-1e300, 3, 1e300])).any()


def test_a_rule_of_the_other_sign_is_the_exact_complement() -> None:
    values = np.array([-1.0, 0.0, 2.0, 2.0, np.nextafter(2, 3), 5.0])
    for threshold in (-2.0, 0.0, 2.0, 9.0):
        above, below = (game._Rule(0.5, threshold, sign).guesses(values) for sign in (1, -1))
        assert (above == (values > threshold)).all()
        assert (above != below).all()


def test_values_at_the_threshold_are_guessed_as_in_training() -> None:
    """Where the mean of two neighbouring numbers is one of them, a rule is right as often as was counted."""
    values = np.array([1.0, np.nextafter(1, 2)] * 4)
    for chosen in (values > 1, values == 1):
        rule = game._best_rule(values, chosen)
        assert rule.right == np.mean(rule.guesses(values) == chosen)
        assert rule.right == 1


def test_operands_that_tell_are_found_and_uniform_ones_are_not() -> None:
    random = np.random.default_rng(3)
    rounds = game_rounds(WIDTH, 90, random)
    told = _played(rounds, "one outlier", lambda i, x: _uniform(random) // (2 if x.chosen else 1))
    assert told.rate == 1
    assert told.p_value == pytest.approx(hypergeom.pmf(30, 60, 30, 30))
    hidden = _played(rounds, "one outlier", lambda i, x: _uniform(random))
    assert 0.2 < hidden.rate < 0.8
    assert hidden.p_value > 1e-4
