"""The protocol without its masks, to see what the masks cost. Nothing but benchmarks may ever use it.

One worker gets the operand in the clear, as residues, and all else is as it is with masks: the fixed point,
the rounds, the network, the check of every answer. The product has no such mode, and refuses its own
`UnmaskedSource` as soon as there are workers.
"""

from collections.abc import Sequence

from blindtune.client.config.blind_config import BlindConfig
from blindtune.client.kit.kit import Kit
from blindtune.client.rounds.connect import HintProgress, connect
from blindtune.client.rounds.multiplier import RemoteMultiplier
from blindtune.protocol.masks import MaskedOperand, MaskSource, Share
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Centred, Residues, centre, from_centred

__all__ = ["ClearSource", "connect_unmasked"]


class _Clear(MaskedOperand):
    def __init__(self, operand: Centred) -> None:
        self.shares = (Share(0, from_centred(operand, Q31)),)

    def unmask(self, responses: Sequence[Residues]) -> Centred:
        (response,) = responses
        return centre(response, Q31)


class ClearSource(MaskSource):
    """Hides nothing: the only operator sees the operand."""

    operators = 1
    parameters = Q31

    def noise(self, column_absolute_sum: int) -> int:
        return 0

    def mask(self, operand: Centred, product: Product) -> MaskedOperand:
        return _Clear(operand)


def connect_unmasked(
    config: BlindConfig, kit: Kit, progress: HintProgress = lambda products, size: products
) -> RemoteMultiplier:
    """Connects as ``masking="lattice"`` does, to one operator, and leaves the masks out."""
    multiplier = connect(config, kit, progress)
    multiplier.source = ClearSource()
    multiplier.ready = lambda products: None  # type: ignore[method-assign]  # there are no hints to obtain
    return multiplier
