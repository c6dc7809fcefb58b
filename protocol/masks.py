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
from dataclasses import dataclass
from typing import NoReturn, Self, cast

import numpy as np

from blindtune.protocol.ahead import MasksAhead
from blindtune.protocol.expansion import (
    KEY_BYTES,
    RandomBytes,
    Seed,
    derive_key,
    expand_into,
    expanded_dots,
)
from blindtune.protocol.fixed_point import Float32, Float64, dequantize_rows, quantize_rows
from blindtune.protocol.one_pass import hide_reals, reveal_reals
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
from blindtune.protocol.row_blocks import DRAWN, for_row_blocks
from blindtune.protocol.shared_rows import rows_at_once

__all__ = ["LOCAL", "MaskSource", "MaskedOperand", "Share", "ShareSource", "UnmaskedSource"]

LOCAL = -1
"""Recipient of an operand in the clear: this process. It is the index of no operator."""


class Share:
    """What one operator is asked to multiply.

    Args:
        recipient: index of the only operator that may see this share.
        residues: uint32 [rows, contraction], the operand. It may be left out with a seed.
        seed: sent instead of the residues, when they are its expansion.
        shape: of the residues, if those are left out.
        expected: C_t . v for each row C_t, uint32 [rows], if it is known; see `verification`. It is a
            secret as v is, and stays here.
    """

    def __init__(
        self,
        recipient: int,
        residues: Residues | None,
        seed: Seed | None = None,
        *,
        shape: tuple[int, int] | None = None,
        expected: Residues | None = None,
    ) -> None:
        if residues is not None:
            shape = residues.shape
        # Every attempt sends the same bytes, and the check reads them again.
        for array in (residues, expected):
            if array is not None:
                array.flags.writeable = False
        if shape is None or (residues is None and seed is None):
            raise ValueError("a share has residues, or a seed and a shape")
        self._recipient = recipient
        self._shape = shape
        self._seed = seed
        self._expected = expected
        self._residues = residues

    def __repr__(self) -> str:
        return f"Share(recipient={self.recipient}, shape={self.shape})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a share cannot be pickled: it holds a mask or what hides under one")

    @property
    def recipient(self) -> int:
        """Index of the only operator that may see this share."""
        return self._recipient

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the residues."""
        return self._shape

    @property
    def seed(self) -> Seed | None:
        """What is sent instead of the residues, when they are its expansion."""
        return self._seed

    @property
    def expected(self) -> Residues | None:
        """C_t . v for each row, read-only, if it is known."""
        return self._expected

    @property
    def residues(self) -> Residues:
        """uint32 [rows, contraction], read-only: expanded from the seed when they are first asked for."""
        if self._residues is None and self.seed is not None:
            residues = self.seed.expand(*self.shape)
            residues.flags.writeable = False
            self._residues = residues
        return cast(Residues, self._residues)

    def rows(self, start: int, stop: int) -> "Share":
        """The share's rows ``start ... stop - 1``, for the same recipient."""
        seed = self.seed and Seed(self.seed.key, self.seed.row_offset + start)
        return Share(
            self.recipient,
            None if self._residues is None else self._residues[start:stop],
            seed,
            shape=(len(range(*slice(start, stop).indices(self.shape[0]))), self.shape[1]),
            expected=None if self.expected is None else self.expected[start:stop],
        )


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

    def reveal(
        self, responses: Sequence[Residues], scales: Float64, column_scale: Float32 | None = None
    ) -> Float32:
        """The real values of X M, as `dequantize_rows` of what `unmask` returns.

        Args:
            responses: as for `unmask`, and verified.
            scales: float64 [rows], from `MaskSource.hide`.
            column_scale: float32 [outputs], ones by default.

        Returns:
            float32 [rows, outputs].
        """
        return dequantize_rows(self.unmask(responses), scales, column_scale)


class MaskSource(ABC):
    """Draws masks. Guarantees that no mask is ever used for two operands.

    A source can't be pickled, a copy of it is itself, and a forked child uses nothing of what its parent
    keeps.

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

    def hide(
        self,
        x: Float32,
        product: Product,
        budget: int,
        column_scale: Float32 | None = None,
        v: Residues | None = None,
    ) -> tuple[MaskedOperand, Float64]:
        """`mask` for the integers that `quantize_rows` makes of real numbers.

        Args:
            x: float32 [rows, contraction].
            product: what the integers will be multiplied by.
            budget, column_scale: as for `quantize_rows`.
            v: uint32 [contraction], the product's first verification vector. A source may use it to say what
                to expect of answers.

        Returns:
            The operand, and the rows' scales, float64 [rows].

        Raises:
            UnsupportedError, ValueError: as `quantize_rows` does.
        """
        operand, scales = quantize_rows(x, budget, column_scale)
        return self.mask(operand, product), scales

    def draw_ahead(self, product: Product, rows: int, v: Residues) -> tuple[Share, ...]:
        """Draws the mask of an operand that is not known yet: the next one of a product and number of rows.

        Args:
            product: what the operand will be multiplied by.
            rows: of the operand.
            v: uint32 [product.contraction], the product's first verification vector.

        Returns:
            The shares that do not depend on the operand, for operators to multiply already. The masked
            operand will hold these very objects. None, where every share depends on it.
        """
        return ()

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

    def reveal(
        self, responses: Sequence[Residues], scales: Float64, column_scale: Float32 | None = None
    ) -> Float32:
        if len(responses) != len(self.shares) or len(responses) < 2:
            return super().reveal(responses, scales, column_scale)
        *masks, result = responses
        for mask in masks[:-1]:
            result = subtract(result, mask)
        return reveal_reals(result, masks[-1], scales, column_scale)


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
        self._ahead: MasksAhead[tuple[Share, ...]] = MasksAhead()

    def noise(self, column_absolute_sum: int) -> int:
        return 0

    def mask(self, operand: Centred, product: Product) -> MaskedOperand:
        rows, columns = operand.shape
        if columns != product.contraction:
            raise ValueError(f"the operand has {columns} columns, the product takes {product.contraction}")
        if operand.dtype != np.int32:
            raise ValueError(f"an operand has elements of type int32, not {operand.dtype}")
        seeds, ahead = self._drawn(rows, product)
        masked = np.empty((rows, columns), np.uint32)
        exposed: list[int] = []
        step = rows_at_once(columns)

        def block(start: int, stop: int) -> None:
            masks = [np.empty((step, columns), np.uint32) for _ in seeds]
            for first in range(start, stop, step):
                some = slice(first, min(first + step, stop))
                parts = [mask[: some.stop - first] for mask in masks]
                for seed, part in zip(seeds, parts, strict=True):
                    expand_into(part, seed.key, first)
                if not hide(operand[some], parts, masked[some]):
                    exposed.append(first)

        for_row_blocks(rows, columns, block, DRAWN)
        if exposed:
            require_centred(operand)
            raise ValueError("the operand changed while it was masked")
        return self._shared(seeds, ahead, masked, None)

    def hide(
        self,
        x: Float32,
        product: Product,
        budget: int,
        column_scale: Float32 | None = None,
        v: Residues | None = None,
    ) -> tuple[MaskedOperand, Float64]:
        rows, columns = x.shape
        if columns != product.contraction:
            raise ValueError(f"the operand has {columns} columns, the product takes {product.contraction}")
        seeds, ahead = self._drawn(rows, product)
        masked, scales, expected = hide_reals(x, budget, column_scale, [seed.key for seed in seeds], v)
        return self._shared(seeds, ahead, masked, expected), scales

    def draw_ahead(self, product: Product, rows: int, v: Residues) -> tuple[Share, ...]:
        shape = rows, product.contraction
        shares = tuple(
            Share(i, None, seed, shape=shape, expected=expanded_dots(seed.key, rows, v))
            for i, seed in enumerate(self._draw(rows, product))
        )
        self._ahead = self._ahead.of_this_process()
        self._ahead.put(product, rows, shares)
        return shares

    def _drawn(self, rows: int, product: Product) -> tuple[list[Seed], tuple[Share, ...]]:
        """Seeds that nobody has used, and their shares if they were drawn ahead."""
        self._ahead = self._ahead.of_this_process()
        ahead = self._ahead.take(product, rows) or ()
        return [share.seed for share in ahead if share.seed] or self._draw(rows, product), ahead

    def _draw(self, rows: int, product: Product) -> list[Seed]:
        secret = self._random_bytes(KEY_BYTES)
        return [
            Seed(derive_key(secret, "share", str(recipient), product.label, str(rows)))
            for recipient in range(self.operators - 1)
        ]

    def _shared(
        self, seeds: Sequence[Seed], ahead: tuple[Share, ...], masked: Residues, expected: Residues | None
    ) -> MaskedOperand:
        # What the masks expand to is left to whoever asks for it: workers get the seeds.
        dots = [None] * self.operators if expected is None else list(expected)
        shares = ahead or tuple(
            Share(i, None, seed, shape=masked.shape, expected=dots[i]) for i, seed in enumerate(seeds)
        )
        return _Shared((*shares, Share(self.operators - 1, masked, expected=dots[-1])))


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
