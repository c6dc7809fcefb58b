"""From the operators' verified answers to the product: what shares hid is the last one's, less all others."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from blindtune.protocol.fixed_point import Float32, Float64
from blindtune.protocol.kernels.low_sums import Words
from blindtune.protocol.masks import MaskedOperand, Revealed, Share
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.residues import Centred, Residues, centre, subtract, subtract_and_centre
from blindtune.protocol.shares.fused import reveal_reals, reveal_reals_with_sums

__all__ = ["SharedOperand"]


@dataclass(frozen=True, eq=False)
class SharedOperand(MaskedOperand):
    """An operand whose last share hides under the expansions of all others, or under none if it is alone."""

    shares: tuple[Share, ...]
    parameters: ParameterSet
    expected_sums: Words | None = field(default=None, repr=False)

    def reveal_integers(self, responses: Sequence[Residues]) -> Centred:
        if len(responses) != len(self.shares):
            raise ValueError(f"{len(self.shares)} responses are needed, not {len(responses)}")
        if len(responses) == 1:
            return centre(responses[0], self.parameters)
        return subtract_and_centre(*self._last_two(responses), self.parameters)

    def reveal_reals(
        self, responses: Sequence[Residues], scales: Float64, column_scale: Float32 | None = None
    ) -> Float32:
        if len(responses) != len(self.shares) or len(responses) < 2:
            return super().reveal_reals(responses, scales, column_scale)
        return reveal_reals(*self._last_two(responses), scales, column_scale, self.parameters)

    def reveal_reals_with_sums(
        self, responses: Sequence[Residues], scales: Float64, column_scale: Float32 | None, u: Words
    ) -> Revealed:
        if len(responses) != len(self.shares) or len(responses) < 2:
            return super().reveal_reals_with_sums(responses, scales, column_scale, u)
        last_two = self._last_two(responses)
        return Revealed(*reveal_reals_with_sums(*last_two, scales, column_scale, u, self.parameters))

    def rows_again(self, responses: Sequence[Residues], rows: NDArray[np.int64]) -> tuple[Centred, Centred]:
        def operand(share: Share) -> Residues:
            return np.concatenate([share.rows(row, row + 1).residues for row in rows.tolist()])

        shown = [operand(share) for share in self.shares], [response[rows] for response in responses]
        z, y = (self.reveal_integers(some) for some in shown)
        return z, y

    def _last_two(self, responses: Sequence[Residues]) -> tuple[Residues, Residues]:
        """The last answer less all others' but one, and that one."""
        *masks, result = responses
        for mask in masks[:-1]:
            result = subtract(result, mask, self.parameters)
        return result, masks[-1]
