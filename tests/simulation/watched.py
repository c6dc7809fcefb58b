"""What the client draws, verifies and reads, as the ledger sees it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from blindtune.client.kit.kit import Kit, KitDescription
from blindtune.protocol.fixed_point import quantize_rows
from blindtune.protocol.masks import MaskedOperand, MaskSource, Share
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Centred, Residues
from blindtune.protocol.verification import CheckVectors
from simulation.ledger import Ledger

__all__ = ["WatchedKit", "WatchedSource"]


class WatchedSource(MaskSource):
    """A mask source whose every mask is entered into the ledger."""

    def __init__(self, source: MaskSource, ledger: Ledger) -> None:
        self.operators, self.parameters = source.operators, source.parameters
        self._source, self._ledger = source, ledger

    def noise(self, column_absolute_sum: int) -> int:
        return self._source.noise(column_absolute_sum)

    def hide_integers(self, operand: Centred, product: Product) -> MaskedOperand:
        masked = self._source.hide_integers(operand, product)
        self._ledger.drew(operand, product, masked)
        return _WatchedOperand(masked, product, self._ledger)

    def hide_reals(
        self,
        x: NDArray[np.float32],
        product: Product,
        budget: int,
        column_scale: NDArray[np.float32] | None = None,
        v: Residues | None = None,
    ) -> tuple[MaskedOperand, NDArray[np.float64]]:
        masked, scales = self._source.hide_reals(x, product, budget, column_scale, v)
        self._ledger.drew(quantize_rows(x, budget, column_scale, product.diffused)[0], product, masked)
        return _WatchedOperand(masked, product, self._ledger), scales

    def draw_ahead(self, product: Product, rows: int, v: Residues) -> tuple[Share, ...]:
        shares = self._source.draw_ahead(product, rows, v)
        self._ledger.drew_ahead(product, shares)
        return shares


class _WatchedOperand(MaskedOperand):
    """Enters each answer into the ledger as it is read."""

    def __init__(self, masked: MaskedOperand, product: Product, ledger: Ledger) -> None:
        self.shares = masked.shares
        self._masked, self._product, self._ledger = masked, product, ledger

    def reveal_integers(self, responses: Sequence[Residues]) -> Centred:
        self._ledger.reads(self._product, responses)
        return self._masked.reveal_integers(responses)

    def reveal_reals(
        self,
        responses: Sequence[Residues],
        scales: NDArray[np.float64],
        column_scale: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        self._ledger.reads(self._product, responses)
        return self._masked.reveal_reals(responses, scales, column_scale)


class WatchedKit:
    """What a multiplier needs of a kit, with vectors whose every check is entered into the ledger."""

    def __init__(self, kit: Kit, ledger: Ledger) -> None:
        self._kit, self._ledger = kit, ledger

    @property
    def description(self) -> KitDescription:
        return self._kit.description

    def check_vectors(self, product: Product, parameters: ParameterSet) -> CheckVectors:
        check = self._kit.check_vectors(product, parameters)
        return _WatchedCheck(check.s, check.v, parameters, product, self._ledger)


@dataclass(frozen=True, eq=False)
class _WatchedCheck(CheckVectors):
    product: Product = field(repr=False)
    ledger: Ledger = field(repr=False)

    def verify(self, operand: Residues, response: NDArray[np.uint32], vectors: int | None = None) -> None:
        super().verify(operand, response, vectors)
        self.ledger.verified(self.product, response)

    def verify_expected(self, expected: Residues, response: NDArray[np.uint32]) -> None:
        super().verify_expected(expected, response)
        self.ledger.verified(self.product, response)
