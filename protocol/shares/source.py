"""The mask source for two or more operators, of whom one keeps what it sees to itself."""

import os
from collections.abc import Sequence

import numpy as np

from blindtune.protocol.expansion import KEY_BYTES, RandomBytes, Seed, derive_key, expand_into, expanded_dots
from blindtune.protocol.fixed_point import Float32, Float64
from blindtune.protocol.kernels.low_sums import Words, row_sums
from blindtune.protocol.kernels.row_blocks import DRAWN, for_row_blocks
from blindtune.protocol.kernels.shared_rows import rows_at_once
from blindtune.protocol.masks import MaskedOperand, MaskSource, Share
from blindtune.protocol.operands import SeededRows
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Centred, Residues, hide, require_centred
from blindtune.protocol.shares.answered import SharedOperand
from blindtune.protocol.shares.fused import hide_reals
from blindtune.protocol.shares.masks_ahead import MasksAhead

__all__ = ["ShareSource"]


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

    def hide_integers(self, operand: Centred, product: Product, image: Words | None = None) -> MaskedOperand:
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
                    expand_into(part, seed.key, first, self.parameters)
                if not hide(operand[some], parts, self.parameters, masked[some]):
                    exposed.append(first)

        for_row_blocks(rows, columns, block, DRAWN)
        if exposed:
            require_centred(operand, self.parameters)
            raise ValueError("the operand changed while it was masked")
        sums = None if image is None else row_sums(operand, image)
        return self._shared(seeds, ahead, masked, None, sums)

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
        if columns != product.contraction:
            raise ValueError(f"the operand has {columns} columns, the product takes {product.contraction}")
        seeds, ahead = self._drawn(rows, product)
        masked, scales, expected, sums = hide_reals(
            x, budget, column_scale, product.diffused, [seed.key for seed in seeds], v, self.parameters, image
        )
        return self._shared(seeds, ahead, masked, expected, sums), scales

    def draw_ahead(self, product: Product, rows: int, v: Residues) -> tuple[Share, ...]:
        shares = tuple(
            Share(
                i,
                SeededRows(seed, rows, product.contraction),
                expected=expanded_dots(seed.key, rows, v, self.parameters),
            )
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
        label = "share", self.parameters.name
        return [
            Seed(derive_key(secret, *label, str(recipient), product.label, str(rows)), self.parameters)
            for recipient in range(self.operators - 1)
        ]

    def _shared(
        self,
        seeds: Sequence[Seed],
        ahead: tuple[Share, ...],
        masked: Residues,
        expected: Residues | None,
        sums: Words | None,
    ) -> MaskedOperand:
        # What the masks expand to is left to whoever asks for it: workers get the seeds.
        dots = [None] * self.operators if expected is None else list(expected)
        shares = ahead or tuple(
            Share(i, SeededRows(seed, *masked.shape), expected=dots[i]) for i, seed in enumerate(seeds)
        )
        last = Share(self.operators - 1, masked, expected=dots[-1])
        return SharedOperand((*shares, last), self.parameters, sums)
