"""Attacks on a recording of one's own worker: without its client's data, and without a secret.

Nobody says what the client sent, so an attack is right when it takes a recorded operand, and not a random
one of the same shape, for the more plausible one. For uniform words that is a coin's throw, exactly.
"""

from collections import Counter
from collections.abc import Callable, Sequence

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
from blindtune.protocol.errors import DataError
from blindtune.protocol.parameters import MODULUS
from blindtune.protocol.products import Direction
from blindtune.protocol.residues import centre

__all__ = ["inspect_transcript"]

Float64 = NDArray[np.float64]
Random = np.random.Generator

_MOST_WORDS = 1 << 26
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
        DataError: the transcript holds no operand of a training or generation.
    """
    # Matrices are small, and threads that wait for each other take longer where the cores are shared.
    with threadpool_limits(limits=1):
        return judge(_scores(transcript, checkpoint, random))


def _scores(transcript: Transcript, checkpoint: Checkpoint, random: Random) -> list[Score]:
    training = Transcript.of_training(transcript).without_retries()
    if not training.operands:
        raise DataError("the transcript holds no operand: record a worker while a client uses it")
    words = np.cumsum([x.rows * x.columns for x in training.operands])
    chosen = training.between(0, max(1, int(np.searchsorted(words, _MOST_WORDS))))
    scores = [
        word_tests.uniformity(chosen),
        word_tests.correlation(chosen),
        word_tests.small_differences(chosen),
    ]
    scores += [_repeats(chosen), _ranks(chosen, random)]
    if all(x.seed is not None for x in training.operands):
        scores.append(_keys(training))
    first = chosen.operands[0].product
    if first.direction is Direction.FORWARD:
        scores += _lookups(chosen.of(first), PublicModel(checkpoint, first), random)
    backward = [x for x in chosen.operands if x.product.direction is Direction.BACKWARD]
    if backward:
        scores += _gradients(backward, random)
    return scores


def _repeats(transcript: Transcript) -> Score:
    """Rows, or keys of seeds, that came before in another operand."""
    seen: Counter[bytes] = Counter()
    for operand in transcript.operands:
        if operand.seed is not None:
            seen[operand.seed.key + operand.seed.row_offset.to_bytes(8, "little")] += 1
        else:
            seen.update(row.tobytes() for row in operand.words() if len(row) >= _LEAST_COLUMNS)
    total = max(seen.total(), 1)
    return Score("rows that came before", "rows", seen.total() - len(seen), total, _NEVER)


def _keys(transcript: Transcript) -> Score:
    """The bytes of seeds' keys."""
    keys = b"".join(x.seed.key for x in transcript.operands if x.seed is not None)
    counts = np.bincount(np.frombuffer(keys, np.uint8) >> 4, minlength=16)
    p = float(chisquare(counts).pvalue)
    return Score("uniformity of keys", "tests", int(p < word_tests.LEVEL), 1, word_tests.LEVEL, p)


def _ranks(transcript: Transcript, random: Random) -> Score:
    """Operands of one product whose rows, put together, are of lower rank over Z_q than random ones."""
    stacked: dict[object, list[NDArray[np.uint32]]] = {}
    for operand in transcript.operands:
        stacked.setdefault(operand.product, []).append(operand.words())
    low, trials = 0, 0
    for blocks in list(stacked.values())[:_RANK_OPERANDS]:
        rows = np.concatenate(blocks)[:_RANK_ROWS]
        # Narrower than the operand, so that full rank is what random rows have.
        rows = rows[: rows.shape[1] // 2]
        if len(rows) > 1 and rows.shape[1] >= _LEAST_COLUMNS:
            low += len(row_space(rows)[0]) < len(rows)
            trials += 1
    return Score("rank of the rows", "products", low, max(trials, 1), _NEVER)


def _lookups(operands: Sequence[Operand], public: PublicModel, random: Random) -> list[Score]:
    """Is a row nearer to some token's activation than a random row is? By angle, and by sorted values."""
    views: dict[str, Callable[[Float64], Float64]] = {
        "cosine": lambda x: x,
        "sorted values": lambda x: np.sort(x, axis=1),
    }
    # Of each view, how near rows and their random counterparts come to any token.
    nearest: dict[str, list[list[Float64]]] = {name: [[], []] for name in views}
    if not public.positional:
        by_position = [_some_rows(operands)]
    else:
        # A batch begins with a text, so an operand's first rows are at its first positions.
        shortest = min(len(x.words()) for x in operands)
        by_position = [
            centre(np.stack([x.words()[position] for x in operands][:_MOST_ROWS])).astype(np.float64)
            for position in range(min(_POSITIONS, public.positions, shortest))
        ]
    for position, rows in enumerate(by_position):
        vocabulary = public.vocabulary(position).astype(np.float64)
        for name, view in views.items():
            known = unit_rows(view(vocabulary)).T
            for found, x in zip(nearest[name], (rows, _random_rows(rows, random)), strict=True):
                found.append((unit_rows(view(x)) @ known).max(axis=1))
    return [
        _coin(f"token by {name}", np.concatenate(real), np.concatenate(fake), random)
        for name, (real, fake) in nearest.items()
    ]


def _gradients(operands: Sequence[Operand], random: Random) -> list[Score]:
    """Do gradients stand out by their largest entry, or by how alike those of one operand are?"""
    # The first backward product is that of the last layers, which stand next to the loss.
    rows = _some_rows([x for x in operands if x.product == operands[0].product])
    fakes = _random_rows(rows, random)

    def peak(x: Float64) -> Float64:
        unit = unit_rows(x)
        return np.abs(unit).max(axis=1)

    def alike(x: Float64) -> Float64:
        unit = unit_rows(x)
        return np.abs((unit[:-1:2] * unit[1::2][: len(unit[:-1:2])]).sum(axis=1))

    return [
        _coin("label by largest entry", peak(rows), peak(fakes), random),
        _coin("label by direction", alike(rows), alike(fakes), random),
    ]


def _coin(attack: str, real: Float64, fake: Float64, random: Random) -> Score:
    """How often the real one has the larger value; a coin decides between equal ones."""
    ties = (real == fake) & (random.random(len(real)) < 0.5)
    right = int(np.count_nonzero((real > fake) | ties))
    return Score(attack, "pairs with random rows", right, len(real), 0.5)


def _some_rows(operands: Sequence[Operand]) -> Float64:
    rows: list[NDArray[np.uint32]] = []
    for operand in operands:
        rows.append(operand.words())
        if sum(map(len, rows)) >= _MOST_ROWS:
            break
    return centre(np.ascontiguousarray(np.concatenate(rows)[:_MOST_ROWS])).astype(np.float64)


def _random_rows(like: Float64, random: Random) -> Float64:
    return centre(random.integers(0, MODULUS, like.shape, np.uint32)).astype(np.float64)
