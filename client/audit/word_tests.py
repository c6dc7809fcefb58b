"""Are the words what random words would be? Tests that need no knowledge at all.

A trial is an operand or a few of them, and it succeeds when the least p-value of several tests of uniform
and independent words is below 1 % divided by their number. So 1 % of the trials at most do for uniform
words. A second test takes all words together.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2, chisquare, norm

from blindtune.client.audit.statistics import Score
from blindtune.client.audit.transcript import Operand, Transcript
from blindtune.protocol.products import Direction, Product
from blindtune.protocol.residues import subtract

__all__ = ["correlation", "size_p_value", "small_differences", "uniformity"]

Float64 = NDArray[np.float64]

LEVEL = 0.01
# A limit distribution's tail is a little off where there are few words.
_CHANCE = 0.0125
_BINS = 64
_LEAST_WORDS = 1024
_BITS = 8
_OPERANDS = 4
_TRIAL = f"groups of {_OPERANDS} operands"


def uniformity(transcript: Transcript) -> Score:
    """Sizes in 64 bins, the two lowest bytes, and single bits of each operand."""
    rejected, trials = 0, 0
    size, low, q = np.zeros(_BINS, np.int64), np.zeros(256, np.int64), transcript.parameters.modulus
    sizes, lowest, second = np.ones(_BINS), _residues_by_byte(q, 0), _residues_by_byte(q, 8)
    for operand in transcript.operands:
        words = operand.words().ravel()
        bins, bytes_ = _sizes(words, q), _bytes(words, 0)
        size += bins
        low += bytes_
        if len(words) < _LEAST_WORDS:
            continue
        ones = [np.count_nonzero(words >> bit & 1) for bit in range(_BITS)]
        z = max(abs(2 * x - len(words)) for x in ones) / len(words) ** 0.5
        bits = _BITS * 2 * float(norm.sf(z))
        tests = (
            _p_value(bins, sizes),
            _p_value(_folded(bytes_), _folded(lowest)),
            _p_value(_folded(_bytes(words, 8)), _folded(second)),
            bits,
        )
        rejected += len(tests) * min(tests) < LEVEL
        trials += 1
    if not trials:
        return Score("uniformity of words", "operands", 0, 1, _CHANCE)
    pooled = min(1.0, 2 * min(_p_value(size, sizes), _p_value(low, lowest)))
    return Score("uniformity of words", "operands", rejected, trials, _CHANCE, pooled)


def correlation(transcript: Transcript) -> Score:
    """Within rows, between rows, with the operand before, the same product's last one, and the way there.

    A trial is a few successive operands, since some of them, such as the gradients behind a normalization,
    are nearly free of correlation even in the clear.
    """
    found: list[list[float]] = []
    for operand, others in _before(transcript.operands):
        if operand.rows * operand.columns < _LEAST_WORDS:
            continue
        words = operand.centred()
        z = [_z(words[:, :-1], words[:, 1:]), _z(words[:-1], words[1:])]
        for other in others:
            there = other.centred()
            rows, columns = np.minimum(words.shape, there.shape)
            if rows * columns >= _LEAST_WORDS:
                z.append(_z(words[:rows, :columns], there[:rows, :columns]))
        found.append(z)
    trials = len(found) // _OPERANDS
    if not trials:
        return Score("correlation of words", _TRIAL, 0, 1, _CHANCE)
    rejected = 0
    for trial in range(trials):
        tests = np.concatenate(found[trial * _OPERANDS : (trial + 1) * _OPERANDS])
        rejected += len(tests) * 2 * float(norm.sf(np.abs(tests).max())) < LEVEL
    every = np.concatenate(found)
    pooled = float(chi2.sf(np.square(every).sum(), len(every)))
    return Score("correlation of words", _TRIAL, rejected, trials, _CHANCE, pooled)


def small_differences(transcript: Transcript) -> Score:
    """How many differences of successive operands of one product lie within a quarter of the residues.

    Under one and the same mask a difference of operands is that of two plain ones, and small.
    """
    small, words, q = 0, 0, transcript.parameters.modulus
    for one, other in _same_product(transcript.operands):
        rows = min(len(one.words()), len(other.words()))
        a, b = (np.ascontiguousarray(x.words()[:rows]) for x in (one, other))
        difference = subtract(a, b, one.parameters).astype(np.int64)
        small += int(np.count_nonzero(np.minimum(difference, q - difference) < q // 8))
        words += difference.size
    # The residues of magnitude below q/8 are a quarter, but for rounding.
    chance = (2 * (q // 8) - 1) / q
    return Score("small differences", "words", small, max(words, 1), chance)


def size_p_value(words: NDArray[np.uint32], q: int) -> float:
    """How likely uniform words are of such sizes, or of less likely ones."""
    return _p_value(_sizes(words.ravel(), q), np.ones(_BINS))


def _sizes(words: NDArray[np.uint32], q: int) -> NDArray[np.int64]:
    bins = words.astype(np.uint64) * np.uint64(_BINS) // np.uint64(q)
    return np.bincount(bins.astype(np.int64), minlength=_BINS)


def _bytes(words: NDArray[np.uint32], shift: int) -> NDArray[np.int64]:
    """How many words have each value of the byte above so many bits."""
    return np.bincount(words >> shift & 255, minlength=256)


def _residues_by_byte(q: int, shift: int) -> NDArray[np.int64]:
    """The same of all residues: moduli are no powers of two."""
    whole, rest = divmod(q, 256 << shift)
    return (whole << shift) + np.clip(rest - (np.arange(256) << shift), 0, 1 << shift)


def _folded(counts: NDArray[np.generic]) -> NDArray[np.int64]:
    """In 64 bins, so that operands of few words fill them."""
    return counts.reshape(_BINS, -1).sum(axis=1)


def _p_value(counts: NDArray[np.int64], expected: NDArray[Any]) -> float:
    """How likely such counts are, or less likely ones, where they should be in this proportion."""
    return float(chisquare(counts, expected * (counts.sum() / expected.sum())).pvalue)


def _z(a: Float64, b: Float64) -> float:
    """The correlation coefficient of all elements as a standard normal variable."""
    a, b = a.ravel() - a.mean(), b.ravel() - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return 0.0 if size == 0 else float(a @ b) / size * len(a) ** 0.5


def _same_product(operands: Sequence[Operand]) -> Iterator[tuple[Operand, Operand]]:
    last: dict[Product, Operand] = {}
    for operand in operands:
        if operand.product in last:
            yield last[operand.product], operand
        last[operand.product] = operand


def _before(operands: Sequence[Operand]) -> Iterator[tuple[Operand, list[Operand]]]:
    """Each operand, and those before it that it could have to do with, each once."""
    before: Operand | None = None
    last: dict[Product, Operand] = {}
    forward: dict[tuple[str, ...], Operand] = {}
    for operand in operands:
        layers = tuple(dict.fromkeys(span.layer for span in operand.product.spans))
        there = None if operand.product.direction is Direction.FORWARD else forward.get(layers)
        related = (before, last.get(operand.product), there)
        yield operand, list({id(x): x for x in related if x is not None}.values())
        before = last[operand.product] = operand
        if operand.product.direction is Direction.FORWARD:
            forward[layers] = operand
