"""The mask source for one operator that nobody needs to trust.

    mask       R = A S + E            over Z_q[X] / (X^256 + 1), a row being one coefficient
    send       C = X + R              indistinguishable from uniform if Module-LWE is hard
    get        C M
    result     C M - H S = X M + E M,        H = A M, asked for once, E M within the noise bound

A is public and shared by all blocks of a run; S and E are fresh for each block of 256 rows and serve
one product. Many secrets under one matrix are as hard as one, up to the number of blocks (Peikert,
Vaikuntanathan, Waters 2008).
"""

import os
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from blindtune.protocol.expansion import RandomBytes
from blindtune.protocol.lattice.hint import PublicMatrix, packed_shape
from blindtune.protocol.lattice.kernels import mask_rows, mask_with, unmask_rows, unmask_with
from blindtune.protocol.lattice.parameters import LatticeParameters
from blindtune.protocol.lattice.stock import Run, Stock
from blindtune.protocol.lattice.transform import LANES
from blindtune.protocol.masks import MaskedOperand, MaskSource, Share
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Centred, Residues, require_centred

__all__ = ["LatticeSource"]

_KEPT_BYTES = 1 << 28


class _LatticeMasked(MaskedOperand):
    """Holds the secrets of its rows until it is unmasked, which it can be once."""

    def __init__(self, share: Share, product: Product, hint: Centred, stock: Stock, runs: list[Run]) -> None:
        self.shares = (share,)
        self._product = product
        self._hint = hint
        self._stock = stock
        self._runs: list[Run] | None = runs

    def unmask(self, responses: Sequence[Residues]) -> Centred:
        if len(responses) != 1:
            raise ValueError(f"one response is needed, not {len(responses)}")
        response, hint = responses[0], self._hint
        rows, columns = response.shape
        fits = rows == len(self.shares[0].residues) and -(-columns // LANES) == len(hint)
        if not fits or response.dtype != np.uint32:
            raise ValueError(
                f"a response of type {response.dtype} and shape {response.shape} does not fit "
                f"{self._product.label}"
            )
        runs, self._runs = self._runs, None
        if runs is None:
            raise ValueError(f"an operand of {self._product.label} was unmasked before")
        out = np.empty((rows, columns), np.int32)

        def compute(factors: Centred, bounds: NDArray[np.int64], rest: Residues) -> None:
            unmask_rows(hint, factors, bounds, response, out, rest)

        def serve(rows: slice, kept: Residues) -> None:
            unmask_with(kept, response[rows], out[rows])

        self._stock.for_rows("hint", runs, columns, compute, serve)
        return out


class LatticeSource(MaskSource):
    """Masks R = A S + E, which a single operator cannot tell from uniform.

    Guarantees that what operators record of all operands of a run, even together, tells nothing about
    them beyond their products and numbers of rows, as long as Module-LWE with these parameters is hard
    and ChaCha20 and HKDF-SHA256 are pseudorandom. Rows of a block that are left over mask a later
    operand, which may depend on results that hold noise of the block's first rows; that this tells
    nothing either is an assumption of its own, like circular security. Not guaranteed: that a response
    or a hint is right. Both must be verified, or what the client does next tells their sender about the
    mask.

    Args:
        parameters: the lattice.
        public_seed: 32 bytes that A is expanded from, drawn by this client at random when the hints were
            made. Not secret.
        hints: gives a product's hint, int32 of its `packed_shape`, made with this public seed and verified.
        random_bytes: ``os.urandom`` everywhere but in tests.
        kept_bytes: limit on mask rows that were computed along with others and wait for the next operand of
            their product. They matter for operands far shorter than 256 rows; a block's worth of them takes
            1 KiB for each column of the product's operand, and of its result.
    """

    operators = 1

    def __init__(
        self,
        parameters: LatticeParameters,
        public_seed: bytes,
        hints: Callable[[Product], Centred],
        random_bytes: RandomBytes = os.urandom,
        kept_bytes: int = _KEPT_BYTES,
    ) -> None:
        self.lattice = parameters
        self.parameters = parameters.residues
        self._public = PublicMatrix(parameters, public_seed)
        self._hints = hints
        self._stock = Stock(parameters, random_bytes, kept_bytes)

    def noise(self, column_absolute_sum: int) -> int:
        return self.lattice.noise(column_absolute_sum)

    def mask(self, operand: Centred, product: Product) -> MaskedOperand:
        rows, columns = operand.shape
        if columns != product.contraction or operand.dtype != np.int32:
            raise ValueError(
                f"{product.label} takes int32 operands of {product.contraction} columns, "
                f"not {operand.dtype} of {columns}"
            )
        hint = self._hints(product)
        if hint.shape[1:] != packed_shape(self.lattice, 0)[1:] or hint.dtype != np.int32:
            raise ValueError(
                f"the hint of {product.label} has type {hint.dtype} and shape {hint.shape}, "
                f"not that of parameter set {self.lattice.name}"
            )
        packed = self._public.packed(columns)
        self._stock = stock = self._stock.of_this_process()
        runs = stock.draw(product, rows)
        masked, noise = np.empty((rows, columns), np.uint32), np.empty((rows, columns), np.int8)
        for run in runs:
            run.noise(noise[run.rows])
        hidden: list[bool] = []

        def compute(factors: Centred, bounds: NDArray[np.int64], rest: Residues) -> None:
            hidden.append(mask_rows(packed, factors, bounds, operand, noise, masked, rest))

        def serve(rows: slice, kept: Residues) -> None:
            hidden.append(mask_with(kept, operand[rows], noise[rows], masked[rows]))

        stock.for_rows("mask", runs, columns, compute, serve)
        if not all(hidden):
            require_centred(operand)
            raise ValueError("the operand changed while it was masked")
        return _LatticeMasked(Share(0, masked), product, hint, stock, runs)
