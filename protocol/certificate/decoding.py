"""From a syndrome to the wraps: a bounded search for the w of y = y^ + q w with sum_j w_j u_j = D.

Tried are, in this order,

    one output that wrapped once or twice, either way                                    any output
    up to six that wrapped once, beyond the end that they are near to                    the 64 largest |y^|
    two that wrapped once, either way                                                    any outputs
    up to three as in the second line, and one that wrapped once                         any output

A result little beyond (q-1)/2 comes back near -(q-1)/2: wraps are likely where |y^| is large, and go that
way. What is found counts if it satisfies both words, those mod 2^64 that it was found by and those mod 2^32,
and if each |y_j| is at most |Z| |M_j|, as Cauchy and Schwarz say of every true result. Of 2^17 outputs,
fewer than 2^36 candidates are tried, and a wrong one satisfies both words with a probability of 2^-96 if w
is odd somewhere.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from blindtune.protocol.certificate.words import CertificateWords, LongWords
from blindtune.protocol.residues import Centred

__all__ = ["Wraps", "decode"]

_CANDIDATES = 64
_HALF = 3  # of the candidates that may wrap together

Wraps = dict[int, int]
"""w, by the outputs where it is not 0."""


def decode(
    syndrome: int, long_syndrome: int, y: Centred, square: int, words: CertificateWords, modulus: int
) -> Wraps | None:
    """The wraps of one row, or None if they are not among those that are tried.

    Args:
        syndrome, long_syndrome: D mod 2^32 and mod 2^64; see `syndromes`.
        y: int32 [outputs], centred.
        square: |Z|^2 of the row that was multiplied.
        words: of the product.
        modulus: q.
    """
    for wraps in _candidates(long_syndrome, y, words.long_u):
        if _fits(wraps, syndrome, long_syndrome, words) and _is_possible(wraps, y, square, words, modulus):
            return wraps
    return None


def _fits(wraps: Wraps, syndrome: int, long_syndrome: int, words: CertificateWords) -> bool:
    """Whether these wraps have this D, by both words."""
    short = sum(w * int(words.u[j]) for j, w in wraps.items())
    long = sum(w * int(words.long_u[j]) for j, w in wraps.items())
    return (short - syndrome) % (1 << 32) == 0 and (long - long_syndrome) % (1 << 64) == 0


def _is_possible(wraps: Wraps, y: Centred, square: int, words: CertificateWords, modulus: int) -> bool:
    """Whether no result is larger than its row and column allow."""
    return all(
        (int(y[j]) + modulus * w) ** 2 <= square * int(words.column_squares[j]) for j, w in wraps.items()
    )


def _candidates(d: int, y: Centred, u: LongWords) -> Iterator[Wraps]:
    zero = np.uint64(0)
    if d == 0:
        yield {}
    for times in (1, 2):
        for sign in (1, -1):
            for j in np.flatnonzero(u * np.uint64(times) == np.uint64(sign * d % (1 << 64))):
                yield {int(j): sign * times}
    near = np.argsort(-np.abs(y.astype(np.int64)), kind="stable")[:_CANDIDATES]
    ways = np.where(y[near] > 0, -1, 1)
    some = _subsets(len(near))
    steps = np.append(np.where(ways > 0, u[near], zero - u[near]), zero)
    sums = steps[some].sum(axis=1, dtype=np.uint64)

    def chosen(subset: int) -> Wraps:
        return {int(near[k]): int(ways[k]) for k in some[subset] if k < len(near)}

    for first, second in _pairs(sums, sums, d):
        one, other = chosen(first), chosen(second)
        if not one.keys() & other.keys():
            yield one | other
    once = np.concatenate([u, zero - u])

    def single(place: int) -> Wraps:
        return {place % len(u): 1 if place < len(u) else -1}

    for first, second in _pairs(once, once, d):
        one, other = single(first), single(second)
        if not one.keys() & other.keys():
            yield one | other
    for first, second in _pairs(sums, once, d):
        one, other = chosen(first), single(second)
        if not one.keys() & other.keys():
            yield one | other


def _pairs(a: LongWords, b: LongWords, d: int) -> Iterator[tuple[int, int]]:
    """All places i and k with a[i] + b[k] = d."""
    order = np.argsort(b, kind="stable")
    ordered, wanted = b[order], np.uint64(d) - a
    first = np.searchsorted(ordered, wanted, "left")
    last = np.searchsorted(ordered, wanted, "right")
    for i in np.flatnonzero(last > first):
        for place in range(first[i], last[i]):
            yield int(i), int(order[place])


@lru_cache(maxsize=8)
def _subsets(count: int) -> NDArray[np.int64]:
    """All subsets of up to three of ``count`` numbers, a row each, filled up with ``count``."""
    rows = [row for size in range(_HALF + 1) for row in combinations(range(count), size)]
    return np.array([(*row, *[count] * (_HALF - len(row))) for row in rows], np.int64)
