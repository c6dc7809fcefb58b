"""Scores of attacks, with intervals that hold for all of an audit's tests at once.

An attack makes guesses of which some are right: k of n. Where operands are masked as they should be, each
guess is right with a known probability at most, the *chance level* c, whatever the attack. So

    p-value        P(Bin(n, c) >= k)
    above chance   p-value below alpha / m, for m tests (Bonferroni)
    interval       Clopper and Pearson's exact one, each bound at alpha / 2m

An audit in which all m null hypotheses hold reports anything at all with probability alpha at most. All m
intervals hold at once with probability 1 - alpha at least. Verdicts are one-sided and bounds are two to an
interval, so a score that is barely above chance may have an interval that just reaches it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import beta, binom

__all__ = ["FAMILY_ERROR", "Judged", "Score", "judge"]

FAMILY_ERROR = 1e-4
"""alpha: how often an audit of flawless masks raises a false alarm, at most."""


@dataclass(frozen=True)
class Score:
    """How often an attack was right.

    Attributes:
        attack: which one.
        counted: what a trial is.
        successes, trials: k and n.
        chance: c.
        pooled_p: the p-value of a second test, on all data at once, where an attack has one.
        exact_p: the p-value where trials depend on each other, in place of the binomial one.
    """

    attack: str
    counted: str
    successes: int
    trials: int
    chance: float
    pooled_p: float | None = None
    exact_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.successes <= self.trials or self.trials < 1 or not 0 < self.chance < 1:
            raise ValueError(
                f"{self.attack}: {self.successes} of {self.trials} at chance {self.chance} is no score"
            )

    @property
    def rate(self) -> float:
        """k / n."""
        return self.successes / self.trials

    @property
    def p_value(self) -> float:
        """How probable so many successes, or so extreme a second test, are at chance."""
        p = self.exact_p
        if p is None:
            p = float(binom.sf(self.successes - 1, self.trials, self.chance))
        return p if self.pooled_p is None else min(1.0, 2 * min(p, self.pooled_p))

    def interval(self, error: float) -> tuple[float, float]:
        """Bounds of the success probability, each of which is wrong with probability ``error`` at most."""
        k, n = self.successes, self.trials
        low = 0.0 if k == 0 else float(beta.ppf(error, k, n - k + 1))
        high = 1.0 if k == n else float(beta.ppf(1 - error, k + 1, n - k))
        return low, high


@dataclass(frozen=True)
class Judged:
    """A score among others."""

    score: Score
    low: float
    high: float
    above_chance: bool


def judge(scores: Sequence[Score], family_error: float = FAMILY_ERROR) -> list[Judged]:
    """Intervals, and verdicts, of which one is wrong with probability ``family_error`` at most.

    That holds for all intervals together, and for all verdicts together.
    """
    error = family_error / max(len(scores), 1)
    return [Judged(x, *x.interval(error / 2), x.p_value < error) for x in scores]
