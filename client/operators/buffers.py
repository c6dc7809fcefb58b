"""Memory of answers that were decoded, kept for the next answers of the same shape.

The operating system hands out fresh memory page by page, each cleared, and takes it back from large arrays at
once: for arrays as large as answers that costs as much again as copying into them.

`blindtune.protocol.kernels.recycled` is as fast and needs nobody who gives back, but it rounds sizes up to a
power of two and has one bound for a whole process. Here an operator's answers keep their exact sizes and a
bound of their own, on which plans count.
"""

import threading

import numpy as np
from numpy.typing import NDArray

__all__ = ["Buffers"]


class Buffers:
    """Arrays that nobody uses any more.

    Args:
        most_bytes: that are kept.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._kept: list[NDArray[np.uint32]] = []

    def take(self, rows: int, columns: int) -> NDArray[np.uint32]:
        """An array of any content, which nobody else has."""
        with self._lock:
            for place in reversed(range(len(self._kept))):
                if self._kept[place].shape == (rows, columns):
                    return self._kept.pop(place)
        return np.empty((rows, columns), np.uint32)

    def give(self, array: NDArray[np.uint32]) -> None:
        """Keeps an array, which the caller must not use again, until newer ones need its room."""
        if array.nbytes > self._most_bytes:
            return
        with self._lock:
            self._kept.append(array)
            while sum(x.nbytes for x in self._kept) > self._most_bytes:
                self._kept.pop(0)
