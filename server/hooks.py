"""The two places where tests and demonstrations look into a worker, or make it lie."""

from typing import Protocol

from blindtune.protocol.expansion import Seed
from blindtune.protocol.operands import Operand
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Residues
from blindtune.server.wire import Request

__all__ = ["Multiplying", "Observer"]


class Multiplying(Protocol):
    """What a service needs of a multiplier: that of `blindtune.protocol.multiplication` has it.

    A worker that lies is a wrapper around one.
    """

    def outputs(self, product: Product) -> int:
        """Columns of the result.

        Raises:
            ValueError: the product does not fit the layers.
        """

    def multiply(self, product: Product, operand: Operand, parameters: ParameterSet) -> Residues:
        """operand . M mod q, for a block of an operand's rows, or of a seed's."""


class Observer(Protocol):
    """Watches all that a worker receives. No worker has one unless it is given one."""

    def operand(self, request: Request, part: Residues | Seed) -> None:
        """Called in the request's own thread, before anything is computed from ``part``.

        Args:
            request: the header.
            part: the seed, once; or a block of the rows, in order, each block once.
        """
