"""The mask source for one operator that nobody needs to trust.

    mask       R = A S + E            over Z_q[X] / (X^256 + 1), a row being one coefficient
    send       C = X + R              indistinguishable from uniform if Module-LWE is hard
    get        C M
    result     C M - H S = X M + E M,        H = A M, asked for once, E M within the noise bound

A is public and shared by all blocks of a run; S and E are fresh for each block of 256 rows. A block serves
one product and one operand, but for the last rows of some: see `blindtune.protocol.lattice.stock`. Many
secrets under one matrix are as hard as one, up to the number of blocks (Peikert, Vaikuntanathan, Waters
2008).
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blindtune.protocol.expansion import RandomBytes
from blindtune.protocol.fixed_point import Float32, Float64, quantize_rows, remainder
from blindtune.protocol.kernels.low_sums import Words, row_sums
from blindtune.protocol.kernels.recycled import large_matrix
from blindtune.protocol.lattice.fused import add_noisy_integers, largest_budget, noisy_dots_fit
from blindtune.protocol.lattice.hint import MOST_COLUMNS, PublicMatrix, pack_combination, packed_shape
from blindtune.protocol.lattice.masking import Scales, add_operand, mask_rows, unmask_rows, unmask_with
from blindtune.protocol.lattice.parameters import DEGREE, LatticeParameters
from blindtune.protocol.lattice.stock import Run, Stock, bounds
from blindtune.protocol.lattice.transform import LANES
from blindtune.protocol.masks import MaskedOperand, MaskSource, Revealed, Share
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Centred, Residues, require_centred, subtract_and_centre

__all__ = ["LatticeSource"]

_KEPT_BYTES = 1 << 28


class _LatticeMasked(MaskedOperand):
    """Holds the secrets of its rows until it is unmasked, which it can be once."""

    def __init__(
        self,
        parameters: ParameterSet,
        share: Share,
        product: Product,
        hint: Centred,
        packed: Centred,
        stock: Stock,
        runs: list[Run],
        sums: Words | None,
    ) -> None:
        self.shares = (share,)
        self._parameters = parameters
        self.expected_sums = sums
        self._packed = packed
        self._certified: list[Run] = []
        self._product = product
        self._hint = hint
        self._stock = stock
        self._runs: list[Run] | None = runs

    def reveal_integers(self, responses: Sequence[Residues]) -> Centred:
        out = np.empty(self._shape(responses), np.int32)
        self._remove_masks(responses[0], out, None, None, None)
        return out

    def reveal_reals(
        self, responses: Sequence[Residues], scales: Float64, column_scale: Float32 | None = None
    ) -> Float32:
        return self._reveal(responses, scales, column_scale, None).values

    def reveal_reals_with_sums(
        self, responses: Sequence[Residues], scales: Float64, column_scale: Float32 | None, u: Words
    ) -> Revealed:
        self._certified = self._runs or []
        return self._reveal(responses, scales, column_scale, u)

    def rows_again(self, responses: Sequence[Residues], rows: NDArray[np.int64]) -> tuple[Centred, Centred]:
        shape = self._shape(responses)
        z = np.empty((len(rows), self.shares[0].shape[1]), np.int32)
        y = np.empty((len(rows), shape[1]), np.int32)
        for place, row in enumerate(rows.tolist()):
            run = next(x for x in self._certified if x.row <= row < x.row + x.count)
            factors = run.block.factors[np.newaxis]
            one = np.array([(0, run.first + row - run.row, 1)], np.int64)
            mask, rest = np.empty((1, z.shape[1]), np.uint32), np.empty((0, z.shape[1]), np.uint32)
            mask_rows(self._packed, factors, one, self._parameters, mask, rest)
            shown = self.shares[0].rows(row, row + 1).residues
            z[place] = subtract_and_centre(shown, mask, self._parameters)
            rest = np.empty((0, shape[1]), np.uint32)
            answer, to = responses[0][row : row + 1], y[place : place + 1]
            unmask_rows(self._hint, factors, one, self._parameters, answer, to, rest)
        return z, y

    def _reveal(
        self,
        responses: Sequence[Residues],
        scales: Float64,
        column_scale: Float32 | None,
        u: Words | None,
    ) -> Revealed:
        rows, columns = self._shape(responses)
        if column_scale is None:
            column_scale = np.ones(columns, np.float32)
        if u is not None and (u.shape != (columns,) or u.dtype != np.uint32):
            raise ValueError(f"there are not {columns} words")
        if scales.shape != (rows,) or column_scale.shape != (columns,):
            raise ValueError(f"the row or column scales do not fit a matrix of shape {(rows, columns)}")
        out = large_matrix(rows, columns, np.float32)
        sums = np.zeros((2, rows), np.uint32)
        self._remove_masks(responses[0], out, (scales, column_scale), u, sums)
        return Revealed(out, sums[0], sums[1])

    def _shape(self, responses: Sequence[Residues]) -> tuple[int, int]:
        """Of the response, if it fits."""
        if len(responses) != 1:
            raise ValueError(f"one response is needed, not {len(responses)}")
        response = responses[0]
        rows, columns = response.shape
        fits = rows == len(self.shares[0].residues) and -(-columns // LANES) == len(self._hint)
        if not fits or response.dtype != np.uint32:
            raise ValueError(
                f"a response of type {response.dtype} and shape {response.shape} does not fit "
                f"{self._product.label}"
            )
        return rows, columns

    def _remove_masks(
        self,
        response: Residues,
        out: Centred | Float32,
        scales: Scales | None,
        u: Words | None,
        sums: Words | None,
    ) -> None:
        runs, self._runs = self._runs, None
        if runs is None:
            raise ValueError(f"an operand of {self._product.label} was unmasked before")

        def compute(factors: Centred, bounds: NDArray[np.int64], rest: Residues) -> None:
            unmask_rows(self._hint, factors, bounds, self._parameters, response, out, rest, scales, u, sums)

        def serve(rows: slice, kept: Residues) -> None:
            part = None if scales is None else (scales[0][rows], scales[1])
            some = None if sums is None else sums[:, rows]
            unmask_with(kept, response[rows], self._parameters, out[rows], part, u, some)

        self._stock.for_rows("hint", runs, out.shape[1], compute, serve)


class LatticeSource(MaskSource):
    """Masks R = A S + E, which a single operator cannot tell from uniform.

    Guarantees that what operators record of all operands of a run, even together, tells nothing about
    them beyond their products and numbers of rows, as long as Module-LWE with these parameters is hard
    and ChaCha20 and HKDF-SHA256 are pseudorandom, and nothing that depends on results reaches them.
    Results hold noise; what depends on it and reaches operators (a later operand that shares a block, a
    published adapter or text, a stop) is covered by an assumption of its own, like circular security: see
    docs/protocol.md, section 12. Not guaranteed: that a response or a hint is right. Both must be
    verified, or what the client does next tells their sender about the mask.

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
        self.largest_noise, self.noise_variance = parameters.eta, parameters.eta / 2
        self._public = PublicMatrix(parameters, public_seed)
        self._hints = hints
        self._stock = Stock(parameters, random_bytes, kept_bytes)
        # Of each product the last v, an integrity secret, and A v.
        self._combinations: dict[Product, tuple[Residues, Centred]] = {}

    def noise(self, column_absolute_sum: int) -> int:
        return self.lattice.noise(column_absolute_sum)

    def hide_integers(self, operand: Centred, product: Product, image: Words | None = None) -> MaskedOperand:
        self._require(product, operand, np.int32)
        return self._masked(operand.shape[0], product, image, lambda noise: operand)

    def hide_reals_twice(
        self,
        x: Float32,
        product: Product,
        budget: int,
        column_scale: Float32 | None = None,
        image: Words | None = None,
    ) -> tuple[MaskedOperand, Float64]:
        self._require(product, x, np.float32)
        z, scales = quantize_rows(x, budget, column_scale, product.diffused)
        rows, of_rest = len(x), np.empty(len(x), np.float64)

        def operand(noise: NDArray[np.int8]) -> Centred:
            # The noise of the first rows is known before those of the second are chosen.
            left = remainder(x, column_scale, scales, z + noise[:rows])
            rest, of_rest[:] = quantize_rows(left, budget, diffused=product.diffused)
            return np.concatenate([z, rest])

        masked = self._masked(2 * rows, product, image, operand)
        return masked, np.concatenate([scales, scales * of_rest])

    def _masked(
        self,
        rows: int,
        product: Product,
        image: Words | None,
        integers: Callable[[NDArray[np.int8]], Centred],
    ) -> MaskedOperand:
        """Hides what is made of the noise that will be added to it."""
        columns = product.contraction
        hint, packed = self._hint(product), self._public.packed(columns)
        stock, runs, masked = self._masks(product, rows, packed)
        noise = np.empty((rows, columns), np.int8)
        for run in runs:
            run.noise(noise[run.rows])
        operand = integers(noise)
        if not add_operand(operand, noise, self.parameters, masked):
            require_centred(operand, self.parameters)
            raise ValueError("the operand changed while it was masked")
        sums = None if image is None else row_sums(operand + noise, image)
        share = Share(0, masked)
        return _LatticeMasked(self.parameters, share, product, hint, packed, stock, runs, sums)

    def hide_reals(
        self,
        x: Float32,
        product: Product,
        budget: int,
        column_scale: Float32 | None = None,
        v: Residues | None = None,
        image: Words | None = None,
    ) -> tuple[MaskedOperand, Float64]:
        rows, columns = x.shape
        eta = self.lattice.eta
        if rows == 0 or budget > largest_budget(eta, self.parameters):
            return super().hide_reals(x, product, budget, column_scale, v, image)
        self._require(product, x, np.float32)
        hint, packed = self._hint(product), self._public.packed(columns)
        stock, runs, masked = self._masks(product, rows, packed)
        keys = [run.block.noise_key for run in runs]
        exact = columns <= MOST_COLUMNS and noisy_dots_fit(budget, eta, columns, self.parameters)
        # A transform for less than a block of rows costs more than a check that looks at them once more.
        v = v if exact and rows >= DEGREE else None
        scales, dots, sums = add_noisy_integers(
            x,
            budget,
            column_scale,
            product.diffused,
            keys,
            bounds(runs),
            eta,
            v,
            self.parameters,
            masked,
            image,
        )
        expected = None if v is None else self._expected(product, v, packed, runs, dots)
        share, own = Share(0, masked, expected=expected), None if image is None else sums
        return _LatticeMasked(self.parameters, share, product, hint, packed, stock, runs, own), scales

    def _require(self, product: Product, operand: NDArray[Any], dtype: type[Any]) -> None:
        columns = operand.shape[1]
        if columns != product.contraction or operand.dtype != dtype:
            raise ValueError(
                f"{product.label} takes {np.dtype(dtype)} operands of {product.contraction} columns, "
                f"not {operand.dtype} of {columns}"
            )

    def _hint(self, product: Product) -> Centred:
        hint = self._hints(product)
        if hint.shape[1:] != packed_shape(self.lattice, 0)[1:] or hint.dtype != np.int32:
            raise ValueError(
                f"the hint of {product.label} has type {hint.dtype} and shape {hint.shape}, "
                f"not that of parameter set {self.lattice.name}"
            )
        return hint

    def _masks(self, product: Product, rows: int, packed: Centred) -> tuple[Stock, list[Run], Residues]:
        """Draws rows of masks, and computes them but for their noise."""
        self._stock = stock = self._stock.of_this_process()
        runs = stock.draw(product, rows)
        masks = large_matrix(rows, product.contraction, np.uint32)

        def compute(factors: Centred, bounds: NDArray[np.int64], rest: Residues) -> None:
            mask_rows(packed, factors, bounds, self.parameters, masks, rest)

        def serve(rows: slice, kept: Residues) -> None:
            masks[rows] = kept

        stock.for_rows("mask", runs, product.contraction, compute, serve)
        return stock, runs, masks

    def _expected(
        self, product: Product, v: Residues, packed: Centred, runs: list[Run], dots: NDArray[np.int64]
    ) -> Residues:
        """C_t . v = ((A v) S)_t + N_t . v mod q, from the N_t . v."""
        known, combination = self._combinations.get(product, (None, packed))
        if known is None or not np.array_equal(known, v):
            known = v.copy()
            combination = pack_combination(packed, known, self.parameters)
            self._combinations[product] = known, combination
        factors = np.stack([run.block.factors for run in runs])
        masks = np.empty((dots.shape[1], len(v)), np.uint32)
        rest = np.empty((0, len(v)), np.uint32)
        mask_rows(combination, factors, bounds(runs), self.parameters, masks, rest)
        modulus = self.parameters.modulus
        return ((dots % modulus + masks.T) % modulus).astype(np.uint32)
