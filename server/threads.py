"""Which threads products are computed in."""

from concurrent.futures import Executor

from blindtune.protocol.operands import Operand
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Residues
from blindtune.server.hooks import Multiplying

__all__ = ["InThreads"]


class InThreads:
    """A multiplier whose products are computed in threads of a pool, each for one that waits.

    Every request that waits has a thread, and each thread that multiplied once would keep those of OpenMP
    that helped it for good.

    Args:
        multiplier: what computes.
        pool: with as many threads as there may be products at a time.
    """

    def __init__(self, multiplier: Multiplying, pool: Executor) -> None:
        self._multiplier = multiplier
        self._pool = pool

    def outputs(self, product: Product) -> int:
        return self._multiplier.outputs(product)

    def multiply(self, product: Product, operand: Operand, parameters: ParameterSet) -> Residues:
        return self._pool.submit(self._multiplier.multiply, product, operand, parameters).result()
