"""``blindtune-worker``, but it lies: every answer is wrong in one residue once it has got SIGUSR1.

With BLINDTUNE_LIES=1 in the environment it lies from the start, so that a liar that was killed comes back as
one. It is the daemon as it is, with another multiplier.
"""

import os
import signal
import threading
from collections.abc import Callable

from blindtune.protocol.parameters import Q31, ParameterSet
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Residues
from blindtune.server.cli import main
from blindtune.server.hooks import Multiplying
from blindtune.server.store import LayerStore

_lies = threading.Event()


class LyingMultiplier:
    """Answers right until it is told to lie, and never again after that."""

    def __init__(self, honest: Multiplying) -> None:
        self._honest = honest

    def outputs(self, product: Product) -> int:
        return self._honest.outputs(product)

    def multiply(self, product: Product, operand: Residues, parameters: ParameterSet) -> Residues:
        answer = self._honest.multiply(product, operand, parameters)
        if _lies.is_set():
            answer[-1, -1] = (int(answer[-1, -1]) + 1) % Q31.modulus
        return answer


def _lying(honest: Callable[[LayerStore], Multiplying]) -> Callable[[LayerStore], Multiplying]:
    return lambda store: LyingMultiplier(honest(store))


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, lambda *_: _lies.set())
    if os.environ.get("BLINDTUNE_LIES") == "1":
        _lies.set()
    LayerStore.multiplier = _lying(LayerStore.multiplier)  # type: ignore[assignment, method-assign]
    main()
