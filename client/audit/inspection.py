"""Attacks on a recording of one's own worker: without its client's data, and without a secret.

Nobody says what the client sent, so an attack is right when it takes a recorded operand, and not a random
one of the same shape, for the more plausible one. For uniform words that is a coin's throw, exactly.
"""

from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chisquare
from threadpoolctl import threadpool_limits

from blindtune.checkpoint import Checkpoint
from blindtune.client.audit import word_tests
from blindtune.client.audit.field import row_space
from blindtune.client.audit.knowledge import unit_rows
from blindtune.client.audit.public_model import PublicModel
from blindtune.client.audit.statistics import Judged, Score, judge
from blindtune.client.audit.transcript import Operand, Transcript
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.products import Direction
from blindtune.protocol.residues import centre, subtract

__all__ = ["inspect_transcript"]

Float64 = NDArray[np.float64]
Random = np.random.Generator

_MOST_WORDS = 1 << 26
_LEAST_ROWS, _STRETCH = 16, 64
_NEAR = 16
_MOST_ROWS = 1000
_POSITIONS = 6
_RANK_ROWS, _RANK_OPERANDS = 96, 20
# What uniform rows of so many columns do with a probability of about q^-4 at most does not happen.
_LEAST_COLUMNS, _NEVER = 8, 1e-30


def inspect_transcript(transcript: Transcript, checkpoint: Checkpoint, random: Random) -> list[Judged]:
    """Runs everything that a worker could run, and judges it together.

    Args:
        transcript: what the worker received.
        checkpoint: the model that it serves.
        random: draws the operands to compare with.

    Raises:
        DataError: the transcript holds no operand of a training or generation, or of several parameter sets.
    """
    # Matrices are small, and threads that wait for each other take longer where the cores are shared.
    with threadpool_limits(limits=1):
        return judge(_scores(transcript, checkpoint, random))


def _scores(transcript: Transcript, checkpoint: Checkpoint, random: Random) -> list[Score]:
    training = Transcript.of_training(transcript).without_retries()
    parameters = training.parameters
    chosen = _sample(training)
    scores = [
        word_tests.uniformity(chosen),
        word_tests.correlation(chosen),
        word_tests.small_differences(chosen),
    ]
    scores += [_repeats(training), _ranks(training, parameters.modulus)]
    seeds = [x for x in training.operands if x.seed is not None]
    if seeds:
        scores.append(
            _keys(training) if len(seeds) == len(training.operands) else _shares_that_meet(training)
        )
    forward = [x for x in training.operands if x.product.direction is Direction.FORWARD]
    if forward:
        # The first forward product is that of the first layers, which read what a token is.
        first = forward[0].product
        scores += _lookups(training.of(first), PublicModel(checkpoint, first), parameters, random)
    backward = [x for x in training.operands if x.product.direction is Direction.BACKWARD]
    if backward:
        scores += _gradients(backward, parameters, random)
    return scores


def _sample(transcript: Transcript) -> Transcript:
    """What words are tested of: all operands, or their first rows, or those of stretches of the recording."""
    operands = list(transcript.operands)
    if sum(x.rows * x.columns for x in operands) > _MOST_WORDS:
        rows = max(_LEAST_ROWS, _MOST_WORDS // sum(x.columns for x in operands))
        operands = [x.first(rows) for x in operands]
    words = sum(x.rows * x.columns for x in operands)
    if words > _MOST_WORDS:
        # Stretches, since an operand is also compared with those before it.
        stretch = _STRETCH * words // _MOST_WORDS
        operands = [x for i, x in enumerate(operands) if i % stretch < _STRETCH]
    return Transcript(operands, transcript.fingerprint)


def _repeats(transcript: Transcript) -> Score:
    """Rows that came before in another operand, or rows of one seed that stand for two."""
    seen: set[bytes] = set()
    ranges: dict[bytes, list[Operand]] = {}
    repeated, total = 0, 0
    for operand in transcript.operands:
        if operand.seed is not None:
            before = ranges.setdefault(operand.seed.key, [])
            repeated += any(_overlap(x, operand) for x in before)
            before.append(operand)
            total += 1
        elif operand.columns >= _LEAST_COLUMNS:
            rows = [blake2b(row.tobytes(), digest_size=16).digest() for row in operand.words()]
            repeated += len(rows) - len(set(rows) - seen)
            seen.update(rows)
            total += len(rows)
    return Score("rows that came before", "rows and seeds", repeated, max(total, 1), _NEVER)


def _overlap(one: Operand, other: Operand) -> bool:
    """Whether two operands of one seed have rows in common, or are multiplied by different matrices."""
    first, second = one.seed, other.seed
    if first is None or second is None:
        return False
    apart = (
        first.row_offset + one.rows <= second.row_offset or second.row_offset + other.rows <= first.row_offset
    )
    return one.product != other.product or not apart


def _shares_that_meet(transcript: Transcript) -> Score:
    """Rows less what a seed of about the same time stands for: the operand, if both are shares of it."""
    met, trials = 0, 0
    for place, rows in enumerate(transcript.operands):
        near = transcript.operands[max(0, place - _NEAR) : place + _NEAR]
        for seed in near if rows.residues is not None else ():
            if seed.seed is None or (seed.product, seed.rows) != (rows.product, rows.rows):
                continue
            count = min(rows.arrived, _MOST_WORDS // (_NEAR * rows.columns) + 1)
            masks = seed.seed.expand(count, rows.columns)
            difference = subtract(np.ascontiguousarray(rows.words()[:count]), masks, rows.parameters)
            met += word_tests.size_p_value(difference, rows.parameters.modulus) < _NEVER
            trials += 1
    return Score("shares that meet", "pairs of rows and seed", met, max(trials, 1), _NEVER)


def _keys(transcript: Transcript) -> Score:
    """The bytes of seeds' keys."""
    keys = b"".join(x.seed.key for x in transcript.operands if x.seed is not None)
    content = np.frombuffer(keys, np.uint8)
    halves = (content >> 4, content & 15)
    p = min(1.0, 2 * min(float(chisquare(np.bincount(x, minlength=16)).pvalue) for x in halves))
    return Score("uniformity of keys", "tests", int(p < word_tests.LEVEL), 1, word_tests.LEVEL, p)


def _ranks(transcript: Transcript, q: int) -> Score:
    """Operands of one product whose rows, put together, are of lower rank over Z_q than random ones."""
    stacked: dict[object, list[NDArray[np.uint32]]] = {}
    for operand in transcript.operands:
        blocks = stacked.setdefault(operand.product, [])
        if sum(map(len, blocks)) < _RANK_ROWS:
            blocks.append(operand.first(_RANK_ROWS).words())
    low, trials = 0, 0
    for blocks in list(stacked.values())[:_RANK_OPERANDS]:
        rows = np.concatenate(blocks)[:_RANK_ROWS]
        # Narrower than the operand, so that full rank is what random rows have.
        rows = rows[: rows.shape[1] // 2]
        if len(rows) > 1 and rows.shape[1] >= _LEAST_COLUMNS:
            low += len(row_space(rows, q)[0]) < len(rows)
            trials += 1
    return Score("rank of the rows", "products", low, max(trials, 1), _NEVER)


def _lookups(
    operands: Sequence[Operand], public: PublicModel, parameters: ParameterSet, random: Random
) -> list[Score]:
    """Is a row nearer to some token's activation than a random row is? By angle, and by sorted values."""
    views: dict[str, Callable[[Float64], Float64]] = {
        "cosine": lambda x: x,
        "sorted values": lambda x: np.sort(x, axis=1),
    }
    # Of each view, how near rows and their random counterparts come to any token.
    nearest: dict[str, list[list[Float64]]] = {name: [[], []] for name in views}
    if not public.positional:
        by_position = [_some_rows(operands, parameters)]
    else:
        # A batch begins with a text, so an operand's first rows are at its first positions.
        some = [x.first(_POSITIONS) for x in operands[:_MOST_ROWS]]
        shortest = min(x.arrived for x in some)
        by_position = [
            centre(np.stack([x.words()[position] for x in some]), parameters).astype(np.float64)
            for position in range(min(public.positions, shortest))
        ]
    for position, rows in enumerate(by_position):
        vocabulary = public.vocabulary(position).astype(np.float64)
        for name, view in views.items():
            known = unit_rows(view(vocabulary)).T
            for found, x in zip(nearest[name], (rows, _random_rows(rows, parameters, random)), strict=True):
                found.append((unit_rows(view(x)) @ known).max(axis=1))
    return [
        _coin(f"token by {name}", np.concatenate(real), np.concatenate(fake), random)
        for name, (real, fake) in nearest.items()
    ]


def _gradients(operands: Sequence[Operand], parameters: ParameterSet, random: Random) -> list[Score]:
    """Do gradients stand out by their largest entry, or by how alike those of one operand are?"""
    # The first backward product is that of the last layers, which stand next to the loss.
    rows = _some_rows([x for x in operands if x.product == operands[0].product], parameters)
    fakes = _random_rows(rows, parameters, random)

    def peak(x: Float64) -> Float64:
        unit = unit_rows(x)
        return np.abs(unit).max(axis=1)

    def alike(x: Float64) -> Float64:
        unit = unit_rows(x)
        return np.abs((unit[:-1:2] * unit[1::2][: len(unit[:-1:2])]).sum(axis=1))

    scores = [_coin("label by largest entry", peak(rows), peak(fakes), random)]
    if len(rows) > 1:
        scores.append(_coin("label by direction", alike(rows), alike(fakes), random))
    return scores


def _coin(attack: str, real: Float64, fake: Float64, random: Random) -> Score:
    """How often the real one has the larger value; a coin decides between equal ones."""
    ties = (real == fake) & (random.random(len(real)) < 0.5)
    right = int(np.count_nonzero((real > fake) | ties))
    return Score(attack, "pairs with random rows", right, len(real), 0.5)


def _some_rows(operands: Sequence[Operand], parameters: ParameterSet) -> Float64:
    rows: list[NDArray[np.uint32]] = []
    for operand in operands:
        rows.append(operand.first(_MOST_ROWS).words())
        if sum(map(len, rows)) >= _MOST_ROWS:
            break
    return centre(np.ascontiguousarray(np.concatenate(rows)[:_MOST_ROWS]), parameters).astype(np.float64)


def _random_rows(like: Float64, parameters: ParameterSet, random: Random) -> Float64:
    words = random.integers(0, parameters.modulus, like.shape, np.uint32)
    return centre(words, parameters).astype(np.float64)
