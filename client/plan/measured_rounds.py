"""How fast this machine masks and unmasks, multiplies as a worker, and moves bytes between the two.

Products of a small random model go three ways: with the worker's product in this process, where client and
worker are timed apart; the same under lattice masks; and both through worker processes on loopback, shares
through two and the lattice through one. What the last take longer than their parts is the transport.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from math import ceil
from typing import NamedTuple

import numpy as np
import torch

from blindtune.client.kit.kit import Kit
from blindtune.client.model.layer_group import LayerGroup
from blindtune.client.plan.costs import Matrix
from blindtune.client.plan.fitting import fit
from blindtune.client.plan.loopback import LAYER, NARROW, OPERATORS, WIDE, Loopback
from blindtune.client.rounds.certified import CertifiedProducts
from blindtune.client.rounds.multiplier import Decoded, PrivateMultiplier
from blindtune.protocol.expansion import KEY_BYTES
from blindtune.protocol.lattice.hint import hint_request, pack_rows, packed_shape
from blindtune.protocol.lattice.parameters import DEGREE
from blindtune.protocol.lattice.source import LatticeSource
from blindtune.protocol.masks import MaskedOperand, MaskSource
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Centred, Residues

__all__ = ["RoundRates", "measure_rounds"]

# One of them is narrow: with matrices of one shape, time for their elements looks like time for operations.
_GROUPS = (
    tuple(f"{LAYER}self_attn.{x}_proj.weight" for x in "qkv"),
    (NARROW,),
    WIDE,
    (f"{LAYER}mlp.down_proj.weight",),
)
_ROWS = (16, 64, 256)
# More than caches hold.
_BETWEEN_BYTES = 512 << 20


class RoundRates(NamedTuple):
    """Seconds for one unit each, as in `blindtune.client.plan.profiles`.

    Attributes:
        round: what the client takes for a product, however small, besides its requests.
        product: what a worker takes for one, besides the request.
        byte, request: of the transport, both ends together.
        turn: of a round, besides its requests.
    """

    round: float
    shares_up: float
    shares_down: float
    lattice_round: float
    lattice_up: float
    lattice_down: float
    lattice_block: float
    product: float
    operation: float
    weight: float
    operand: float
    expanded: float
    output: float
    byte: float
    request: float
    turn: float


class _InProcess(PrivateMultiplier):
    """Client and workers in this process, one after the other, and the workers' share of the time.

    Attributes:
        multiplying, expanding: seconds that the workers' products took, and the seeds before them.
    """

    def __init__(self, kit: Kit, multiplier: Multiplier, source: MaskSource) -> None:
        self.source = source
        if source.parameters.certified:
            self.certified = CertifiedProducts(kit)
        self.multiplying = self.expanding = 0.0
        self._multiplier = multiplier
        self._check_vectors = cache(partial(kit.check_vectors, parameters=self.source.parameters))

    def _vector(self, product: Product) -> Residues:
        return self._check_vectors(product).everyday

    def _ask(
        self, masked: MaskedOperand, product: Product, decode: Callable[[Sequence[Residues]], Decoded]
    ) -> Decoded:
        check = self._check_vectors(product)
        answers = []
        for share in masked.shares:
            started = time.perf_counter()
            received = share.residues if share.seed is None else share.seed.expand(*share.shape)
            expanded = time.perf_counter()
            answer = self._multiplier.multiply(product, received, self.source.parameters)
            self.multiplying += time.perf_counter() - expanded
            self.expanding += expanded - started
            if share.expected is None:
                check.verify(received, answer)
            else:
                check.verify_expected(share.expected, answer)
            answers.append(answer)
        return decode(answers)


class _Sample(NamedTuple):
    """Medians for a product: seconds of a round, of the workers' products and expansions in it."""

    matrix: Matrix
    total: float
    multiplying: float
    expanding: float

    @property
    def client(self) -> float:
        return self.total - self.multiplying - self.expanding


def measure_rounds(here: Loopback, repeats: int = 3) -> RoundRates:
    """Measures masks, products and loopback."""
    kit, remote = here.kit, here.remote
    shares = _samples(kit, _InProcess(kit, here.multiplier, remote.source), repeats)
    lattice_source = _lattice_source(here)
    lattice = _samples(kit, _InProcess(kit, here.multiplier, lattice_source), repeats)
    two = _samples(kit, remote, repeats)
    share_source, remote.source = remote.source, lattice_source
    try:
        one = _samples(kit, remote, repeats)
    finally:
        remote.source = share_source
    return _rates(shares, lattice, two, one, share_source.parameters)


def _lattice_source(here: Loopback) -> LatticeSource:
    """With hints of this process's products. Rows left over are not kept."""
    parameters, seed = here.lattice, os.urandom(KEY_BYTES)
    residues = parameters.residues

    @cache
    def hint(product: Product) -> Centred:
        packed = np.empty(packed_shape(parameters, here.kit.outputs(product)), np.int32)
        for first in range(0, parameters.dimension, DEGREE):
            asked = hint_request(residues, seed, product, first, DEGREE).residues
            pack_rows(here.multiplier.multiply(product, asked, residues), packed, first, residues)
        return packed

    return LatticeSource(parameters, seed, hint, kept_bytes=0)


def _samples(kit: Kit, multiplier: PrivateMultiplier, repeats: int) -> list[_Sample]:
    """Medians for all products, one after the other.

    In a step, the client computes in between, and so much is read that no product finds its matrix or its
    hint in a cache.
    """
    between = torch.zeros(_BETWEEN_BYTES, dtype=torch.uint8)
    asked: list[tuple[Matrix, Callable[[], object]]] = []
    generator = np.random.default_rng(0)
    for names in _GROUPS:
        group = LayerGroup(names, kit, multiplier)
        outputs = sum(group.out_features)
        for rows in _ROWS:
            x = generator.standard_normal((rows, group.in_features), dtype=np.float32)
            y = [generator.standard_normal((rows, n), dtype=np.float32) for n in group.out_features]
            asked.append((Matrix(rows, group.in_features, outputs), partial(group.forward, x)))
            asked.append((Matrix(rows, outputs, group.in_features), partial(group.backward, y)))
    figures: list[list[tuple[float, float, float]]] = [[] for _ in asked]
    for _ in range(repeats + 1):
        for (_, ask), taken in zip(asked, figures, strict=True):
            between.add_(1)
            taken.append(_timed(ask, multiplier))
    # The first compiles what is not compiled yet, and fills what is kept.
    medians = [[statistics.median(x) for x in zip(*taken[1:], strict=True)] for taken in figures]
    return [_Sample(matrix, *times) for (matrix, _), times in zip(asked, medians, strict=True)]


def _timed(ask: Callable[[], object], multiplier: PrivateMultiplier) -> tuple[float, float, float]:
    """Seconds of a round, and of it those of products and expansions where they are known."""
    apart = multiplier if isinstance(multiplier, _InProcess) else None
    before = (apart.multiplying, apart.expanding) if apart else (0.0, 0.0)
    started = time.perf_counter()
    ask()
    total = time.perf_counter() - started
    after = (apart.multiplying, apart.expanding) if apart else (0.0, 0.0)
    return total, after[0] - before[0], after[1] - before[1]


def _rates(
    shares: Sequence[_Sample],
    lattice: Sequence[_Sample],
    two: Sequence[_Sample],
    one: Sequence[_Sample],
    residues: ParameterSet,
) -> RoundRates:
    """Constants from samples of the same products in the same order.

    Args:
        shares, lattice: in this process.
        two, one: the same through two workers, and through one.
        residues: what was measured with.
    """
    seeds = OPERATORS - 1
    shares_round, up, down = _fit(
        [x.client for x in shares],
        [(1, seeds * x.matrix.operand, OPERATORS * x.matrix.answer) for x in shares],
    )
    lattice_round, lattice_up, lattice_down, block = _fit(
        [x.client for x in lattice],
        [(1, x.matrix.operand, x.matrix.answer, _block_elements(x.matrix)) for x in lattice],
    )
    # Under lattice masks there is one worker, whose product is timed alone.
    product, operation, weight, operand, output = _fit(
        [x.multiplying for x in lattice],
        [
            (
                1,
                2 * residues.limbs * x.matrix.operand * x.matrix.outputs,
                x.matrix.contraction * x.matrix.outputs,
                x.matrix.operand,
                x.matrix.answer,
            )
            for x in lattice
        ],
    )
    (expanded,) = _fit([x.expanding for x in shares], [(seeds * x.matrix.operand,) for x in shares])
    # What a round through processes takes besides its parts; never nothing, which could not be fitted.
    byte, request, turn = _fit(
        [
            max(x.total - parts.total, 0.01 * x.total)
            for x, parts in zip((*two, *one), (*shares, *lattice), strict=True)
        ],
        [
            (residues.word_bytes * (x.matrix.operand + operators * x.matrix.answer), operators, 1)
            for samples, operators in ((two, OPERATORS), (one, 1))
            for x in samples
        ],
    )
    return RoundRates(
        round=shares_round,
        shares_up=up,
        shares_down=down,
        lattice_round=lattice_round,
        lattice_up=lattice_up,
        lattice_down=lattice_down,
        lattice_block=block,
        product=product,
        operation=operation,
        weight=weight,
        operand=operand,
        expanded=expanded,
        output=output,
        byte=byte,
        request=request,
        turn=turn,
    )


def _block_elements(matrix: Matrix) -> int:
    """Of A S and H S, for whole blocks."""
    return ceil(matrix.rows / DEGREE) * DEGREE * (matrix.contraction + matrix.outputs)


def _fit(seconds: Sequence[float], amounts: Sequence[tuple[float, ...]]) -> list[float]:
    found = fit(np.array(amounts, np.float64), np.array(seconds))
    return [float(x) for x in found]
