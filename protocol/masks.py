"""Mask sources: how an operand is hidden, and how its product is recovered.

A source draws a mask R for the integer operand X, and later supplies R M:

    send     C = X + R  mod q
    get      C M
    result   C M - R M  =  X M    (plus a small noise, for lattice masks)

What goes to whom is fixed when the mask is drawn: each `Share` names its recipient, an operator's index.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn, Self, cast

import numpy as np
from numpy.typing import NDArray

from blindtune.protocol.expansion import Seed
from blindtune.protocol.fixed_point import Float32, Float64, dequantize_rows, quantize_rows, remainder
from blindtune.protocol.kernels.low_sums import Words, row_peaks, row_sums
from blindtune.protocol.operands import Operand, SeededRows
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Centred, Residues

__all__ = ["LOCAL", "MaskSource", "MaskedOperand", "Revealed", "Share"]

LOCAL = -1
"""Recipient of an operand in the clear: this process. It is the index of no operator."""


class Share:
    """What one operator is asked to multiply.

    Args:
        recipient: index of the only operator that may see this share.
        operand: [rows, contraction]: residues that are sent, or rows of a seed that is sent in their place.
        expected: the dot products of everyday vectors v with the operand's rows, uint32 [vectors, rows], if
            they are known; see `verification`. They are a secret as v is, and stay here.
    """

    def __init__(self, recipient: int, operand: Operand, *, expected: Residues | None = None) -> None:
        if isinstance(operand, SeededRows) and operand.first_column:
            raise ValueError("a share is all columns of its seed's rows: no request says where others begin")
        # Every attempt sends the same bytes, and the check reads them again.
        for array in (operand, expected):
            if isinstance(array, np.ndarray):
                array.flags.writeable = False
        self._recipient = recipient
        self._operand = operand
        self._expected = expected
        self._residues = None if isinstance(operand, SeededRows) else operand

    def __repr__(self) -> str:
        return f"Share(recipient={self.recipient}, shape={self.shape})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a share cannot be pickled: it holds a mask or what hides under one")

    @property
    def recipient(self) -> int:
        """Index of the only operator that may see this share."""
        return self._recipient

    @property
    def operand(self) -> Operand:
        """What is sent: residues, or rows of a seed."""
        return self._operand

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self._operand.shape
        return rows, columns

    @property
    def seed(self) -> Seed | None:
        """What is sent instead of the residues, when they are its expansion."""
        return self._operand.seed if isinstance(self._operand, SeededRows) else None

    @property
    def expected(self) -> Residues | None:
        """C_t . v for each row, read-only, if it is known."""
        return self._expected

    @property
    def residues(self) -> Residues:
        """uint32 [rows, contraction], read-only: expanded from the seed when they are first asked for."""
        if self._residues is None:
            residues = cast(SeededRows, self._operand).seed.expand(*self.shape)
            residues.flags.writeable = False
            self._residues = residues
        return self._residues

    def rows(self, start: int, stop: int) -> "Share":
        """The share's rows ``start ... stop - 1``, for the same recipient."""
        expected = None if self.expected is None else self.expected[:, start:stop]
        part = Share(self.recipient, self._operand[start:stop], expected=expected)
        if self._residues is not None:
            part._residues = self._residues[start:stop]
        return part


@dataclass(frozen=True, eq=False)
class Revealed:
    """Real values of a product, with what certifies them.

    Attributes:
        values: float32 [rows, outputs].
        sums: y u mod 2^32 of each row y of the centred integers that they were made of, uint32 [rows].
        peaks: largest magnitudes of these integers, uint32 [rows].
    """

    values: Float32 = field(repr=False)
    sums: Words = field(repr=False)
    peaks: Words = field(repr=False)


class MaskedOperand(ABC):
    """An operand under its mask, good for one multiplication.

    Attributes:
        expected_sums: Z V mod 2^32 of each row Z that is multiplied, noise included, uint32 [rows]; None
            where no certificate was asked for. A secret, as V is; see `blindtune.protocol.certificate`.
    """

    shares: tuple[Share, ...]
    expected_sums: Words | None = None

    def __reduce__(self) -> NoReturn:
        raise TypeError("a masked operand cannot be pickled: it holds a mask")

    @abstractmethod
    def reveal_integers(self, responses: Sequence[Residues]) -> Centred:
        """X M from the verified responses, one for each share in order.

        Args:
            responses: uint32 [rows, outputs] each. They must have been verified: a wrong one that
                is decoded tells its sender about the mask by what the client does next.

        Returns:
            int32 [rows, outputs].
        """

    def reveal_reals(
        self, responses: Sequence[Residues], scales: Float64, column_scale: Float32 | None = None
    ) -> Float32:
        """The real values of X M, as `dequantize_rows` of what `reveal_integers` returns.

        Args:
            responses: as for `reveal_integers`, and verified.
            scales: float64 [rows], from `MaskSource.hide_reals`.
            column_scale: float32 [outputs], ones by default.

        Returns:
            float32 [rows, outputs].
        """
        return dequantize_rows(self.reveal_integers(responses), scales, column_scale)

    def reveal_reals_with_sums(
        self, responses: Sequence[Residues], scales: Float64, column_scale: Float32 | None, u: Words
    ) -> Revealed:
        """`reveal_reals`, and what a certificate compares with `expected_sums`.

        Args:
            responses, scales, column_scale: as for `reveal_reals`.
            u: secret words for the outputs, uint32 [outputs].
        """
        y = self.reveal_integers(responses)
        return Revealed(dequantize_rows(y, scales, column_scale), row_sums(y, u), row_peaks(y))

    def rows_again(self, responses: Sequence[Residues], rows: NDArray[np.int64]) -> tuple[Centred, Centred]:
        """Of a few rows, the integers that were multiplied and their centred results.

        Args:
            responses: those that were just revealed.
            rows: their numbers.

        Returns:
            Z, int32 [len(rows), contraction], noise included, and y, int32 [len(rows), outputs].
        """
        raise NotImplementedError("operands of this mask have no certificate")


class MaskSource(ABC):
    """Draws masks. Guarantees that no mask is ever used for two operands.

    A source can't be pickled, a copy of it is itself, and a forked child uses nothing of what its parent
    keeps.

    Attributes:
        operators: how many operators it needs.
        parameters: the modulus and what goes with it.
        largest_noise: largest magnitude of what it adds to an element of an operand.
        noise_variance: of that.
    """

    operators: int
    parameters: ParameterSet
    largest_noise: int = 0
    noise_variance: float = 0.0

    @abstractmethod
    def noise(self, column_absolute_sum: int) -> int:
        """Largest magnitude of what unmasking adds to a result.

        Args:
            column_absolute_sum: the largest sum of magnitudes of a column of M.
        """

    @abstractmethod
    def hide_integers(self, operand: Centred, product: Product, image: Words | None = None) -> MaskedOperand:
        """Hides an operand under a mask that has never been used and never will be again.

        Args:
            operand: int32 [rows, contraction], within the budget of the fixed point.
            product: what it will be multiplied by.
            image: V of a certificate, uint32 [contraction], for `MaskedOperand.expected_sums`.
        """

    def hide_reals(
        self,
        x: Float32,
        product: Product,
        budget: int,
        column_scale: Float32 | None = None,
        v: Residues | None = None,
        image: Words | None = None,
    ) -> tuple[MaskedOperand, Float64]:
        """`hide_integers` for the integers that `quantize_rows` makes of real numbers.

        Args:
            x: float32 [rows, contraction].
            product: what the integers will be multiplied by.
            budget, column_scale: as for `quantize_rows`.
            v: uint32 [vectors, contraction], the product's everyday verification vectors. A source may
                use them to say what to expect of answers.
            image: as for `hide_integers`.

        Returns:
            The operand, and the rows' scales, float64 [rows].

        Raises:
            UnsupportedError, ValueError: as `quantize_rows` does.
        """
        operand, scales = quantize_rows(x, budget, column_scale, product.diffused)
        return self.hide_integers(operand, product, image), scales

    def hide_reals_twice(
        self,
        x: Float32,
        product: Product,
        budget: int,
        column_scale: Float32 | None = None,
        image: Words | None = None,
    ) -> tuple[MaskedOperand, Float64]:
        """Rows, and behind them what rounding and noise left of each, scaled up.

        Real values of the results, added up, are as precise as budget allows twice.

        Args:
            x, product, budget, column_scale, image: as for `hide_reals`; no row is zeros.

        Returns:
            The operand, of twice as many rows, and their scales, float64 [2 rows].
        """
        z, scales = quantize_rows(x, budget, column_scale, product.diffused)
        left = remainder(x, column_scale, scales, z)
        rest, rest_scales = quantize_rows(left, budget, diffused=product.diffused)
        operand = np.concatenate([z, rest])
        return self.hide_integers(operand, product, image), np.concatenate([scales, scales * rest_scales])

    def draw_ahead(self, product: Product, rows: int, v: Residues) -> tuple[Share, ...]:
        """Draws the mask of an operand that is not known yet: the next one of a product and number of rows.

        Args:
            product: what the operand will be multiplied by.
            rows: of the operand.
            v: uint32 [vectors, product.contraction], the product's everyday verification vectors.

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
