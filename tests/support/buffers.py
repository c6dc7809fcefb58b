"""Memory of answers that shows who uses it after handing it back."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from blindtune.client.operators.buffers import Buffers
from blindtune.client.operators.operator import OperatorClient

__all__ = ["WatchedBuffers"]

_NOBODYS = 0xFFFFFFFF


class WatchedBuffers(Buffers):
    """Memory that holds no residue from the moment when it is handed back.

    Who still reads it gets wrong results. Who still writes to it is noticed.

    Args:
        broken: is told.
    """

    def __init__(self, broken: Callable[[str], object]) -> None:
        super().__init__(1 << 20)
        self._broken = broken

    def given_to(self, client: OperatorClient) -> "WatchedBuffers":
        """Becomes the memory of an operator's answers."""
        client._buffers = client._asking._buffers = self
        return self

    def take(self, rows: int, columns: int) -> NDArray[np.uint32]:
        self.judge()
        return super().take(rows, columns)

    def give(self, array: NDArray[np.uint32]) -> None:
        if any(np.shares_memory(array, x) for x in self._kept):
            self._broken("memory was handed back twice")
        array[:] = _NOBODYS
        super().give(array)

    def judge(self) -> None:
        """Looks at all that was handed back."""
        if any((x != _NOBODYS).any() for x in self._kept):
            self._broken("memory was written to after it was handed back")
