"""Memory of large matrices that nobody refers to any more, for the next ones of about the same size.

The operating system clears fresh memory page by page, which for a large matrix takes longer than writing it.
A matrix counts as done with when it and all its views are gone, so whoever still reads it, a request under
way for instance, keeps it from being written again.
"""

import weakref
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["give_back", "large_matrix"]

_SMALLEST, _LARGEST = 1 << 20, 1 << 27
_MOST, _MOST_BYTES = 8, 1 << 29
_LINE = 64
# Its `put` may be called while the same thread is in another of its methods, as happens to finalizers.
_kept: SimpleQueue[NDArray[np.uint8]] = SimpleQueue()


def large_matrix(rows: int, columns: int, dtype: DTypeLike) -> NDArray[Any]:
    """A matrix of any content, in C order, which nobody else has.

    It begins with a cache line if it is large: vectors that lie across two are slow to write.
    """
    size = rows * columns * np.dtype(dtype).itemsize
    if not _SMALLEST <= size <= _LARGEST:
        return np.empty((rows, columns), dtype)
    # Rounded up, so that sizes that are not quite the same share memory. What nobody writes to takes none.
    whole = (1 << (size - 1).bit_length()) + _LINE
    memory = _taken(whole)
    if memory is None:
        memory = np.empty(whole, np.uint8)
    # Views of an array that is made of a buffer refer to the array, and not to the buffer's owner.
    array = np.frombuffer(memory.data, dtype, rows * columns, -memory.ctypes.data % _LINE)
    weakref.finalize(array, _keep, memory).atexit = False
    return array.reshape(rows, columns)


def _taken(size: int) -> NDArray[np.uint8] | None:
    for _ in range(_kept.qsize()):
        try:
            memory = _kept.get_nowait()
        except Empty:
            break
        if memory.nbytes == size:
            return memory
        _kept.put(memory)
    return None


def give_back() -> None:
    """Lets go of what nobody refers to, where memory has run short."""
    _keep_at_most(0)


def _keep(memory: NDArray[np.uint8]) -> None:
    _keep_at_most(min(_MOST, _MOST_BYTES // memory.nbytes) - 1)
    _kept.put(memory)


def _keep_at_most(count: int) -> None:
    while _kept.qsize() > count:
        try:
            _kept.get_nowait()
        except Empty:
            break
