"""From the operators' verified answers to the product: what shares hid is the last one's, less all others."""

from collections.abc import Sequence
from dataclasses import dataclass

from blindtune.protocol.fixed_point import Float32, Float64
from blindtune.protocol.masks import MaskedOperand, Share
from blindtune.protocol.residues import Centred, Residues, centre, subtract, subtract_and_centre
from blindtune.protocol.shares.one_pass import reveal_reals

__all__ = ["SharedOperand"]


@dataclass(frozen=True, eq=False)
class SharedOperand(MaskedOperand):
    """An operand whose last share hides under the expansions of all others, or under none if it is alone."""

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
