"""Bytes and rounds of asking for products.

For every product of R rows, with contraction c and outputs o, in words of w bytes (three in `q24`, four in
`q31`), an operator that gets residues receives w R c bytes, one that gets a seed 32, and each sends w R o
back. R is the padded size of a batch, or its
number of examples in a layer that reads one token of each.
"""

from collections.abc import Sequence

from blindtune.client.kit.kit import product_outputs
from blindtune.client.plan.asked import Asked
from blindtune.client.training.batches import padded_rows
from blindtune.protocol.expansion import KEY_BYTES
from blindtune.protocol.parameters import ParameterSet

__all__ = ["WORD_BYTES", "Traffic"]

WORD_BYTES = 4
"""A residue in memory."""


class Traffic:
    """Of asking for some products once.

    Args:
        asked: the products.
        shapes: [out, in] of each layer.
        operators: how many there are; with none, nothing is sent.
        parameters: of the residues.
    """

    def __init__(
        self,
        asked: Sequence[Asked],
        shapes: dict[str, tuple[int, int]],
        operators: int,
        parameters: ParameterSet,
    ) -> None:
        self.rounds = len(asked) if operators else 0
        self._seeds = KEY_BYTES * max(0, operators - 1) * len(asked)
        self._up, self._down = {True: 0, False: 0}, {True: 0, False: 0}
        for product, all_tokens in asked if operators else ():
            self._up[all_tokens] += parameters.word_bytes * product.contraction
            self._down[all_tokens] += parameters.word_bytes * product_outputs(product, shapes) * operators

    def up(self, batch: Sequence[int]) -> int:
        """Bytes to the operators, for a batch of such lengths."""
        return padded_rows(batch) * self._up[True] + len(batch) * self._up[False] + self._seeds

    def down(self, batch: Sequence[int]) -> int:
        """Bytes from them."""
        return padded_rows(batch) * self._down[True] + len(batch) * self._down[False]
