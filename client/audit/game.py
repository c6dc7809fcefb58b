"""Real or random? A worker that chooses two inputs, gets one of them masked, and says which.

In each round one of two operands of the same shape is sent: an ordinary one, or one that the attacker chose
to stand out. For each of many statistics the best threshold is found on the first third of the rounds, the
statistic that does best there is kept, and what counts is how often it is right on the rest. Under a mask
that hides its operand, that is half of the time, on average.

Each part holds as many rounds of one kind as of the other, in a random order, so a guess that is always the
same is right exactly half of the time. Given what was guessed, the number of chosen operands among the rounds
that were taken for them is hypergeometric, which gives the p-value: Fisher's exact test.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import hypergeom, kurtosis

from blindtune.client.audit.field import row_space
from blindtune.client.audit.statistics import Score
from blindtune.client.audit.transcript import Operand, Transcript
from blindtune.protocol.residues import subtract

__all__ = ["EXTREMES", "GAME_ROWS", "Round", "game_rounds", "play"]

Float32 = NDArray[np.float32]
Random = np.random.Generator

GAME_ROWS = 24
_RANK_ROWS = 16
_FEWEST_ROUNDS = 6


@dataclass(frozen=True, eq=False)
class Round:
    """One round.

    Attributes:
        extreme: which of the attacker's choices is played.
        chosen: whether that is what is sent.
        x: float32 [GAME_ROWS, features], what the client multiplies.
    """

    extreme: str
    chosen: bool
    x: Float32


def _ordinary(width: int, random: Random) -> Float32:
    return random.normal(size=(GAME_ROWS, width)).astype(np.float32)


def _zeros(width: int, random: Random, before: Float32) -> Float32:
    return np.zeros((GAME_ROWS, width), np.float32)


def _outlier(width: int, random: Random, before: Float32) -> Float32:
    x = _ordinary(width, random)
    x[:, 0] = 1e6
    return x


def _repeated(width: int, random: Random, before: Float32) -> Float32:
    return before


EXTREMES: dict[str, Callable[[int, Random, Float32], Float32]] = {
    "all zeros": _zeros,
    "one outlier": _outlier,
    "a repeated batch": _repeated,
}


def game_rounds(width: int, rounds: int, random: Random) -> list[Round]:
    """Rounds of each extreme, in order.

    Args:
        width: features of the operands.
        rounds: of each extreme, at least 6; one more is played if that is odd.
        random: draws the order of the rounds and what is ordinary.

    Raises:
        ValueError: there are too few rounds to learn a rule and to try it.
    """
    if rounds < _FEWEST_ROUNDS:
        raise ValueError(f"{rounds} rounds are too few: play {_FEWEST_ROUNDS} at least")
    rounds += rounds % 2
    known = _training_rounds(rounds)
    played = []
    before = _ordinary(width, random)
    for extreme, make in EXTREMES.items():
        for chosen in (*_balanced(known, random), *_balanced(rounds - known, random)):
            before = make(width, random, before) if chosen else _ordinary(width, random)
            played.append(Round(extreme, chosen, before))
    return played


def _training_rounds(rounds: int) -> int:
    """About a third, and even."""
    return 2 * (rounds // 6)


def _balanced(rounds: int, random: Random) -> list[bool]:
    """Coins of which exactly half fall for the attacker's choice."""
    coins: list[bool] = random.permutation(np.arange(rounds) < rounds // 2).tolist()
    return coins


def play(transcript: Transcript, rounds: Sequence[Round], extreme: str) -> Score:
    """The score of the best distinguisher.

    Args:
        transcript: what the worker got in these rounds.
        rounds: from `game_rounds`; the coins of the first third are known to it.
        extreme: which rounds count.

    Raises:
        ValueError: the transcript has another number of operands than rounds.
    """
    if len(transcript.operands) != len(rounds):
        raise ValueError(f"{len(transcript.operands)} operands of {len(rounds)} rounds")
    here = [i for i, x in enumerate(rounds) if x.extreme == extreme]
    operands = transcript.operands
    features = np.array([_statistics(operands[i], operands[i - 1] if i else operands[i]) for i in here])
    chosen = np.array([rounds[i].chosen for i in here])
    cut = _training_rounds(len(here))
    rules = [_best_rule(features[:cut, j], chosen[:cut]) for j in range(features.shape[1])]
    best = max(range(len(rules)), key=lambda j: rules[j].right)
    guesses, chosen = rules[best].guesses(features[cut:, best]), chosen[cut:]
    right = int(np.count_nonzero(guesses == chosen))
    positive, taken = int(np.count_nonzero(guesses & chosen)), int(np.count_nonzero(guesses))
    p = float(hypergeom.sf(positive - 1, len(chosen), np.count_nonzero(chosen), taken))
    return Score(f"game: {extreme}", "rounds", right, len(chosen), 0.5, exact_p=p)


class _Rule(NamedTuple):
    """Takes an operand for the chosen one by a statistic's threshold; ``right`` is how often, in training."""

    right: float
    threshold: float
    sign: int

    def guesses(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        above: NDArray[np.bool_] = values > self.threshold
        return above if self.sign > 0 else ~above


# What a statistic teaches that never varied: nothing, whatever it does later.
_NO_RULE = _Rule(0.5, np.inf, 1)


def _best_rule(values: NDArray[np.float64], chosen: NDArray[np.bool_]) -> _Rule:
    """The best threshold, and on which side of it the chosen ones are."""
    order = np.unique(values)
    best = _NO_RULE
    for threshold in (order[1:] + order[:-1]) / 2:
        right = float(np.mean((values > threshold) == chosen))
        best = max(best, _Rule(right, float(threshold), 1), _Rule(1 - right, float(threshold), -1))
    return best


def _statistics(operand: Operand, before: Operand) -> list[float]:
    words, earlier = operand.words(), before.words()
    x, y = operand.centred().ravel(), before.centred().ravel()
    q, pair = operand.parameters.modulus, (np.ascontiguousarray(words), np.ascontiguousarray(earlier))
    difference = subtract(*pair, operand.parameters).astype(np.int64)
    magnitude = np.abs(x)
    spread = x.std() or 1.0
    columns = np.abs(operand.centred()).mean(axis=0)
    return [
        float(x.mean() / spread),
        float(spread),
        float(magnitude.max()),
        float(np.median(magnitude)),
        float(np.mean(magnitude < q // 8)),
        float(np.mean(x == 0)),
        float(np.nan_to_num(kurtosis(x))),
        float(columns.max() / (columns.mean() or 1.0)),
        float(np.mean(words & 1)),
        float(np.mean(words & 255)),
        _correlated(x[:-1], x[1:]),
        _correlated(x, y),
        float(np.mean(words == earlier)),
        float(
            np.mean(
                np.minimum(difference, operand.parameters.modulus - difference)
                < operand.parameters.modulus // 8
            )
        ),
        float(len(row_space(words[:_RANK_ROWS], q)[0])),
    ]


def _correlated(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return 0.0 if size == 0 else float(a @ b) / size
