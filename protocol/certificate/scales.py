"""K, the part of a proven bound that results are expected to take, and what follows from it.

By Cauchy-Schwarz |(Z M)_j| <= |Z| nu, nu being the largest norm of a column of M. Results take a part of
that,

    c = max_j |(Z M)_j| / (|Z| nu),     about 1 / sqrt d,

so rows are scaled until |Z| = h / (K nu), h = (q - 1) / 2, with K a margin above the c of recent steps: the
delayed scaling of FP8 training, here with a certificate for each row. K is
2^(-level/4) for a level of 0 ... 32, so that budgets are integers.
"""

from math import isqrt, sqrt

from blindtune.protocol.parameters import ParameterSet

__all__ = [
    "FINEST",
    "certified_budget",
    "first_level",
    "level_above",
    "part_of",
    "precision",
    "proven_noise",
]

FINEST = 32
"""The level of the smallest K, 2^-8."""

MARGIN = 2.0
"""Between the largest c of recent steps and K."""

_FIRST = 16


def part_of(level: int) -> float:
    """K of a level."""
    return float(2.0 ** (-level / 4))


def first_level(contraction: int) -> int:
    """The level of the least K that is at least min(1, 16 / sqrt d), before there are any results."""
    # 4 log2(sqrt d / 16) = log2(d^2) - 16
    return min(FINEST, max(0, (contraction**2).bit_length() - 1 - 4 * (_FIRST.bit_length() - 1)))


def level_above(largest: float) -> int:
    """The level of the least K that is at least the margin times the largest c of recent steps."""
    wanted = (MARGIN * largest) ** 2
    wanted *= wanted
    level = 0
    while level < FINEST and wanted * 2.0 ** (level + 1) <= 1.0:
        level += 1
    return level


def certified_budget(parameters: ParameterSet, column_square_sum: int, level: int, noise: int = 0) -> int:
    """The largest sum of squares of a row of integers: of |Z| = min(h / (K nu), h - noise).

    Args:
        parameters: gives q.
        column_square_sum: nu^2; 0 for an all-zero M.
        level: of K.
        noise: largest magnitude that a mask adds to an element of the row, which stays a centred residue.
    """
    half = parameters.half
    # (h / K)^2 = h^2 2^(level / 2)
    return min(isqrt(half**4 << level) // max(column_square_sum, 1), (half - noise) ** 2)


def proven_noise(column_square_sum: int, variance: float) -> int:
    """What a mask's noise adds to a result at most, but for one in 2^80: 10.5 standard deviations.

    Args:
        column_square_sum: nu^2.
        variance: of the noise that a mask adds to each element.
    """
    return isqrt(int(10.5**2 * variance * column_square_sum)) + 1


def precision(budget: int, contraction: int, diffused: bool, variance: float = 0.0) -> float:
    """The relative error to be expected of a product: that of a row's integers, if M spreads it evenly.

    Args:
        budget: of the row's squares.
        contraction: d.
        diffused: whether rounding diffuses its errors, each then the difference of two.
        variance: of the noise that a mask adds to each element.
    """
    return sqrt(contraction * ((1 / 6 if diffused else 1 / 12) + variance) / budget)
