"""Where int8 matrices lie in a processor's memory, which decides how fast they are multiplied.

Rows begin an odd number of cache lines apart. With a large power of two, as layers are wide, all elements of
a column fall into the same few sets of a cache, and the library, which packs a matrix before it multiplies,
waits for memory.

Layers stand one behind the other. The product with the stack of some is one product over all their rows, and
those that are neighbours, as the layers of a group are in a checkpoint, are such a stack without a copy.
"""

from collections.abc import Sequence

import numpy as np
import torch

__all__ = ["LayerMemory", "joined", "row_bytes"]

_LINE = 64
_PIECE = 1 << 28


def row_bytes(size: int) -> int:
    """Bytes from one row to the next, for rows of so many bytes: an odd number of cache lines."""
    return _LINE * (-(-size // _LINE) | 1)


class LayerMemory:
    """Memory that layers are put into, each behind the last.

    It is taken in pieces, of which the system provides what is written to. A layer that does not fit into the
    rest of a piece begins the next.
    """

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.int8)

    def keep(self, matrix: torch.Tensor) -> torch.Tensor:
        """A copy of a matrix, int8 [rows, columns].

        Raises:
            MemoryError: the system has no more.
        """
        rows, columns = matrix.shape
        size = rows * row_bytes(columns)
        if size > len(self._rest):
            piece = np.empty(max(size, _PIECE) + _LINE, np.int8)
            self._rest = torch.from_numpy(piece[-piece.ctypes.data % _LINE :])
        kept, self._rest = self._rest[:size].view(rows, -1)[:, :columns], self._rest[size:]
        return kept.copy_(matrix)


def joined(matrices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Matrices of as many columns that stand on top of each other already, as one; others as they are."""
    first = matrices[0]
    place, piece = first.data_ptr(), first.untyped_storage().data_ptr()
    for matrix in matrices:
        here = matrix.data_ptr(), matrix.untyped_storage().data_ptr(), matrix.stride()
        if here != (place, piece, first.stride()):
            return list(matrices)
        place += matrix.element_size() * len(matrix) * matrix.stride(0)
    return [first.as_strided((sum(map(len, matrices)), first.shape[1]), first.stride())]
