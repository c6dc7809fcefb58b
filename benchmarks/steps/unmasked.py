"""The protocol without its masks, to see what the masks cost. Nothing but benchmarks may ever use it.

One worker gets the operand in the clear, as residues, and all else is as it is with masks: the fixed point,
the rounds, the network, the check of every answer. The product has no such mode, and refuses its own
`UnmaskedSource` as soon as there are workers.
"""

from blindtune.client.config.blind_config import BlindConfig
from blindtune.client.kit.kit import Kit
from blindtune.client.rounds.connect import HintProgress, connect
from blindtune.client.rounds.multiplier import RemoteMultiplier
from blindtune.protocol.kernels.low_sums import Words, row_sums
from blindtune.protocol.masks import MaskedOperand, Share
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Centred, from_centred
from blindtune.protocol.shares.answered import SharedOperand
from blindtune.protocol.shares.unmasked import UnmaskedSource

__all__ = ["ClearSource", "connect_unmasked"]


class ClearSource(UnmaskedSource):
    """Hides nothing: the only operator sees the operand."""

    operators = 1

    def hide_integers(self, operand: Centred, product: Product, image: Words | None = None) -> MaskedOperand:
        sums = None if image is None else row_sums(operand, image)
        return SharedOperand((Share(0, from_centred(operand, self.parameters)),), self.parameters, sums)


def connect_unmasked(
    config: BlindConfig, kit: Kit, progress: HintProgress = lambda products, size: products
) -> RemoteMultiplier:
    """Connects as ``masking="lattice"`` does, to one operator, and leaves the masks out."""
    multiplier = connect(config, kit, progress)
    multiplier.source = ClearSource(multiplier.source.parameters)
    multiplier.ready = lambda products: None  # type: ignore[method-assign]  # there are no hints to obtain
    return multiplier
