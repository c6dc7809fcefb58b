"""A layer that is kept as four-bit codes: int8 pieces of it are made as they are multiplied.

A piece is some outputs of a product, with all features that are multiplied: forward some rows of the stored
matrix, backward some of its columns. It is made once for all rows of an operand's block, and forgotten.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from blindtune.protocol.kernels.four_bits import four_bit_integers
from blindtune.protocol.kernels.recycled import large_matrix
from blindtune.protocol.kernels.row_blocks import WRITTEN, for_row_blocks
from blindtune.protocol.multiplication.layer_memory import row_bytes
from blindtune.protocol.nf4 import BLOCK, DOUBLE_BLOCK, DYNAMIC, TABLE, FourBitWeight

__all__ = ["PIECE_BYTES", "FourBitMatrix"]

PIECE_BYTES = 1 << 22
"""Of int8 numbers that are made at once, about: less than the last cache, enough for all threads."""

_OUTPUTS = 512  # a multiple of which are made at once, so that products have whole groups of them


class FourBitMatrix:
    """int8 [out, in], as codes and scales.

    Args:
        weight: codes and what they stand for.
        scales: float32 [out], of the integers.
        device: where products are computed.
    """

    def __init__(self, weight: FourBitWeight, scales: NDArray[np.float32], device: torch.device) -> None:
        self.shape = weight.shape
        self.device = device
        stored, largest, offset = weight.scales.stored, weight.scales.largest, weight.scales.offset
        self._codes = weight.codes.contiguous().to(device)
        self._stored = stored.contiguous().to(device)
        self._nested: tuple[torch.Tensor, float] | None = None
        if largest is not None and offset is not None:
            self._nested = largest.contiguous().to(device), offset.item()
        self._scales = torch.from_numpy(np.array(scales, np.float32)).to(device)

    def __len__(self) -> int:
        return self.shape[0]

    def numel(self) -> int:
        """Elements of the matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        largest = 0 if self._nested is None else self._nested[0].nbytes + 4
        return self._codes.nbytes + self._stored.nbytes + largest + self._scales.nbytes

    def pieces(self, outputs: int, features: int) -> Iterator[slice]:
        """Outputs of a product in pieces, of so many features each."""
        step = max(_OUTPUTS, PIECE_BYTES // max(features, 1) // _OUTPUTS * _OUTPUTS)
        for start in range(0, outputs, step):
            yield slice(start, min(start + step, outputs))

    def integers(self, rows: slice, columns: slice) -> torch.Tensor:
        """A part of the matrix, int8 [rows, columns]: valid as long as something refers to it."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if self.device.type != "cpu":
            return self._on_device(rows, columns)
        out = large_matrix(height, row_bytes(width), np.int8)[:, :width]
        codes, stored, scales = self._codes.numpy(), self._stored.numpy(), self._scales.numpy()
        nested = None
        if self._nested is not None:
            nested = self._nested[0].numpy(), np.float32(self._nested[1]), DYNAMIC.numpy()
        table, first = TABLE.numpy(), (rows.start, columns.start)

        def some(start: int, stop: int) -> None:
            four_bit_integers(codes, stored, nested, table, scales, self.shape[1], first, out, start, stop)

        for_row_blocks(height, width, some, WRITTEN)
        return torch.from_numpy(out)

    def _on_device(self, rows: slice, columns: slice) -> torch.Tensor:
        """The same in operations of torch. Quotients of float64, rounded to float32, are those of float32."""
        element = torch.arange(rows.start, rows.stop, device=self.device)[:, None] * self.shape[1]
        element = element + torch.arange(columns.start, columns.stop, device=self.device)
        packed = self._codes[element // 2]
        codes = torch.where(element % 2 == 0, packed >> 4, packed & 15).to(torch.int64)
        block = element // BLOCK
        scale = self._stored[block]
        if self._nested is not None:
            largest, offset = self._nested
            scale = DYNAMIC.to(self.device)[scale.to(torch.int64)] * largest[block // DOUBLE_BLOCK] + offset
        numbers = (TABLE.to(self.device)[codes] * scale).to(torch.float64)
        quotients = (numbers / self._scales[rows, None].to(torch.float64)).to(torch.float32)
        return torch.round(quotients).clamp_(-127, 127).to(torch.int8)
