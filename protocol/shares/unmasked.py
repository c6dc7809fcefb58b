"""No mask at all: the reference that masked products are compared with."""

from blindtune.protocol.kernels.low_sums import Words, row_sums
from blindtune.protocol.masks import LOCAL, MaskedOperand, MaskSource, Share
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Centred, from_centred
from blindtune.protocol.shares.answered import SharedOperand

__all__ = ["UnmaskedSource"]


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

    def hide_integers(self, operand: Centred, product: Product, image: Words | None = None) -> MaskedOperand:
        sums = None if image is None else row_sums(operand, image)
        share = Share(LOCAL, from_centred(operand, self.parameters))
        return SharedOperand((share,), self.parameters, sums)
