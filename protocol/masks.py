"""Mask sources: how an operand is hidden, and how its product is recovered.

A source draws a mask R for the integer operand X, and later supplies R M:

    send     C = X + R  mod q
    get      C M
    result   C M - R M  =  X M    (plus a small noise, for lattice masks)

What goes to whom is fixed when the mask is drawn: each `Share` names its recipient, an operator's index.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn, Self

import numpy as np

from blindtune.protocol.expansion import KEY_BYTES, RandomBytes, Seed, derive_key, expand_into
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.products import Product
from blindtune.protocol.residues import (
    Centred,
    Residues,
    centre,
    from_centred,
    hide,
    require_centred,
    subtract,
    subtract_and_centre,
)
from blindtune.protocol.row_blocks import for_row_blocks

__all__ = ["LOCAL", "MaskSource", "MaskedOperand", "Share", "ShareSource", "UnmaskedSource"]

_ELEMENTS_AT_ONCE = 1 << 15  # of a mask, which are still in the cache when they are added

LOCAL = -1
"""Recipient of an operand in the clear: this process. It is the index of no operator."""


@dataclass(frozen=True, eq=False)
class Share:
    """What one operator is asked to multiply.

    Attributes:
        recipient: index of the only operator that may see this share.
        residues: uint32 [rows, contraction], the operand.
        seed: sent instead of the residues, when they are its expansion.
    """

    recipient: int
    residues: Residues = field(repr=False)
    seed: Seed | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        # Every attempt sends the same bytes, and the check reads them again.
        self.residues.flags.writeable = False

    def rows(self, start: int, stop: int) -> "Share":
        """The share's rows ``start ... stop - 1``, for the same recipient."""
        seed = self.seed and Seed(self.seed.key, self.seed.row_offset + start)
        return Share(self.recipient, self.residues[start:stop], seed)


class MaskedOperand(ABC):
    """An operand under its mask, good for one multiplication."""

    shares: tuple[Share, ...]

    def __reduce__(self) -> NoReturn:
        raise TypeError("a masked operand cannot be pickled: it holds a mask")

    @abstractmethod
    def unmask(self, responses: Sequence[Residues]) -> Centred:
        """X M from the verified responses, one for each share in order.

        Args:
            responses: uint32 [rows, outputs] each. They must have been verified: a wrong one that
                is decoded tells its sender about the mask by what the client does next.

        Returns:
            int32 [rows, outputs].
        """


class MaskSource(ABC):
    """Draws masks. Guarantees that no mask is ever used for two operands.

    A source can't be pickled, a copy of it is itself, and it keeps nothing that a forked child could
    use a second time.

    Attributes:
        operators: how many operators it needs.
        parameters: the modulus and what goes with it.
    """

    operators: int
    parameters: ParameterSet

    @abstractmethod
    def noise(self, column_absolute_sum: int) -> int:
        """Largest magnitude of what unmasking adds to a result.

        Args:
            column_absolute_sum: the largest sum of magnitudes of a column of M.
        """

    @abstractmethod
    def mask(self, operand: Centred, product: Product) -> MaskedOperand:
        """Hides an operand under a mask that has never been used and never will be again.

        Args:
            operand: int32 [rows, contraction], within the budget of the fixed point.
            product: what it will be multiplied by.
        """

    def __reduce__(self) -> NoReturn:
        raise TypeError("a mask source cannot be pickled: a copy of it could use a mask twice")

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self


@dataclass(frozen=True, eq=False)
class _Shared(MaskedOperand):
    shares: tuple[Share, ...]

    def unmask(self, responses: Sequence[Residues]) -> Centred:
        if len(responses) != len(self.shares):
            raise ValueError(f"{len(self.shares)} responses are needed, not {len(responses)}")
        *masks, result = responses
        if not masks:
            return centre(result)
        for mask in masks[:-1]:
            result = subtract(result, mask)
        return subtract_and_centre(result, masks[-1])


class ShareSource(MaskSource):
    """Additive secret sharing mod q over two or more operators: exact, and nearly free.

    Operators 0 ... k - 2 get a fresh seed each and return R_i M for its expansion R_i; the last gets
    X + sum R_i. Any k - 1 operators together see uniform residues or seeds that do not depend on X, as
    long as ChaCha20 and HKDF-SHA256 are pseudorandom. Confidentiality is lost if all k
    operators collude.
    """

    def __init__(
        self, operators: int, parameters: ParameterSet, random_bytes: RandomBytes = os.urandom
    ) -> None:
        if operators < 2:
            raise ValueError("shares need two or more operators")
        self.operators = operators
        self.parameters = parameters
        self._random_bytes = random_bytes

    def noise(self, column_absolute_sum: int) -> int:
        return 0

    def mask(self, operand: Centred, product: Product) -> MaskedOperand:
        rows, columns = operand.shape
        if columns != product.contraction:
            raise ValueError(f"the operand has {columns} columns, the product takes {product.contraction}")
        if operand.dtype != np.int32:
            raise ValueError(f"an operand has elements of type int32, not {operand.dtype}")
        secret = self._random_bytes(KEY_BYTES)
        seeds = [
            Seed(derive_key(secret, "share", str(recipient), product.label, str(rows)))
            for recipient in range(self.operators - 1)
        ]
        masks = [np.empty((rows, columns), np.uint32) for _ in seeds]
        masked = np.empty((rows, columns), np.uint32)
        exposed: list[int] = []
        step = max(1, _ELEMENTS_AT_ONCE // max(columns, 1))

        def block(start: int, stop: int) -> None:
            for first in range(start, stop, step):
                some = slice(first, min(first + step, stop))
                parts = [mask[some] for mask in masks]
                for seed, part in zip(seeds, parts, strict=True):
                    expand_into(part, seed.key, first)
                if not hide(operand[some], parts, masked[some]):
                    exposed.append(first)

        for_row_blocks(rows, columns, block)
        if exposed:
            require_centred(operand)
        shares = [Share(i, mask, seed) for i, (seed, mask) in enumerate(zip(seeds, masks, strict=True))]
        return _Shared((*shares, Share(self.operators - 1, masked)))


class UnmaskedSource(MaskSource):
    """No mask at all: the operand in the clear, for one multiplier inside the client's own process.

    It computes the same integers as `ShareSource`, which is what makes it the reference. It must never
    be connected to a worker.
    """

    operators = 0

    def __init__(self, parameters: ParameterSet) -> None:
        self.parameters = parameters

    def noise(self, column_absolute_sum: int) -> int:
        return 0

    def mask(self, operand: Centred, product: Product) -> MaskedOperand:
        return _Shared((Share(LOCAL, from_centred(operand)),))
