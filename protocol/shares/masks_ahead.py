"""Masks drawn ahead of their operands, each handed out once.

They live in memory only, and a forked process finds none of its parent's.
"""

import threading
from typing import Generic, TypeVar

from blindtune.protocol.kernels.process import this_process
from blindtune.protocol.products import Product

__all__ = ["MasksAhead"]

Mask = TypeVar("Mask")
_MOST = 64


class MasksAhead(Generic[Mask]):
    """Masks that wait for an operand of their product with their number of rows.

    Args:
        most: that wait at once. Beyond it the oldest is forgotten, and masks nothing.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._process = this_process()
        self._waiting: list[tuple[Product, int, Mask]] = []

    def of_this_process(self) -> "MasksAhead[Mask]":
        """This one, or an empty one if it was inherited through a fork."""
        return self if self._process is this_process() else MasksAhead(self._most)

    def put(self, product: Product, rows: int, mask: Mask) -> None:
        """Keeps a mask that nobody has used."""
        with self._lock:
            self._waiting.append((product, rows, mask))
            del self._waiting[: -self._most]

    def take(self, product: Product, rows: int) -> Mask | None:
        """The oldest mask for such an operand, which nobody else ever gets, or None."""
        with self._lock:
            for place, (its_product, its_rows, mask) in enumerate(self._waiting):
                if (its_product, its_rows) == (product, rows):
                    del self._waiting[place]
                    return mask
        return None
