"""BROKEN masks, for the attack lab alone. None of them protects anything, and no configuration selects one.

Each hides an operand as schemes in the literature do, carried over to residues mod q: what a worker would
get in their place. They are applied to operands that a training run without workers recorded, and
nothing is ever sent.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from blindtune.client.audit.field import combine
from blindtune.client.audit.transcript import Transcript
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Centred, Residues, add, centre, from_centred

__all__ = ["WEAK_MASKS", "BrokenMask", "hide"]

BASIS_VECTORS = 8


class BrokenMask(ABC):
    """Hides operands, badly. Its secrets are drawn once and serve a whole run, unless it says otherwise."""

    def __init__(self, random: np.random.Generator) -> None:
        self._random = random

    @abstractmethod
    def hide(self, operand: Centred, product: Product) -> Residues:
        """What a worker gets.

        Args:
            operand: int32 [rows, columns].
            product: what it is multiplied by.
        """


class NoMask(BrokenMask):
    """The integers in the clear."""

    def hide(self, operand: Centred, product: Product) -> Residues:
        return from_centred(operand, Q31)


class Permutation(BrokenMask):
    """A secret order of the columns for each product, the same for a run."""

    def __init__(self, random: np.random.Generator) -> None:
        super().__init__(random)
        self._orders: dict[Product, np.ndarray] = {}

    def hide(self, operand: Centred, product: Product) -> Residues:
        if product not in self._orders:
            self._orders[product] = self._random.permutation(operand.shape[1])
        return from_centred(np.ascontiguousarray(operand[:, self._orders[product]]), Q31)


class Rotation(BrokenMask):
    """A secret orthogonal matrix for each product, the same for a run; results are rounded."""

    def __init__(self, random: np.random.Generator) -> None:
        super().__init__(random)
        self._matrices: dict[Product, np.ndarray] = {}

    def hide(self, operand: Centred, product: Product) -> Residues:
        if product not in self._matrices:
            width = operand.shape[1]
            self._matrices[product] = np.linalg.qr(self._random.normal(size=(width, width)))[0]
        return from_centred(np.rint(operand @ self._matrices[product]).astype(np.int32), Q31)


class GaussianNoise(BrokenMask):
    """Fresh noise, half as large as the operand (root mean square)."""

    def hide(self, operand: Centred, product: Product) -> Residues:
        size = np.sqrt(np.mean(np.square(operand, dtype=np.float64)))
        noise = self._random.normal(scale=max(size, 1.0) / 2, size=operand.shape)
        return from_centred(np.rint(operand + noise).astype(np.int32), Q31)


class ReusedMask(BrokenMask):
    """A uniform mask for each product that is drawn once and serves every operand."""

    def __init__(self, random: np.random.Generator) -> None:
        super().__init__(random)
        self._masks: dict[Product, Residues] = {}

    def hide(self, operand: Centred, product: Product) -> Residues:
        rows, columns = operand.shape
        mask = self._masks.get(product, np.empty((0, columns), np.uint32))
        if len(mask) < rows:
            more = self._random.integers(0, Q31.modulus, (rows - len(mask), columns), np.uint32)
            mask = self._masks[product] = np.concatenate([mask, more])
        return add(from_centred(operand, Q31), np.ascontiguousarray(mask[:rows]), Q31)


class SmallBasis(BrokenMask):
    """Masks of fresh uniform coefficients, combined out of a few uniform vectors that stay the same.

    Every single word of such a mask is uniform.
    """

    def __init__(self, random: np.random.Generator) -> None:
        super().__init__(random)
        self._bases: dict[Product, Residues] = {}

    def hide(self, operand: Centred, product: Product) -> Residues:
        rows, columns = operand.shape
        if product not in self._bases:
            self._bases[product] = self._random.integers(0, Q31.modulus, (BASIS_VECTORS, columns), np.uint32)
        coefficients = self._random.integers(0, Q31.modulus, (rows, BASIS_VECTORS), np.uint32)
        return add(from_centred(operand, Q31), combine(coefficients, self._bases[product], Q31.modulus), Q31)


WEAK_MASKS: dict[str, Callable[[np.random.Generator], BrokenMask]] = {
    "none": NoMask,
    "permutation": Permutation,
    "rotation": Rotation,
    "noise": GaussianNoise,
    "reused mask": ReusedMask,
    "small basis": SmallBasis,
}


def hide(plain: Transcript, mask: BrokenMask) -> Transcript:
    """A transcript of operands in the clear as it would be under a broken mask."""
    return Transcript(
        [
            replace(x, residues=mask.hide(centre(x.words(), Q31), x.product), seed=None)
            for x in plain.operands
        ],
        plain.fingerprint,
    )
