"""The modular product on NVIDIA GPUs: four int8 passes, and one pass each over operand and result.

The int8 product itself is ``torch._int_mm``. Around it, in torch operations, splitting residues into limbs
and recombining the sums would read and write the GPU's memory about thirty times over. The two Triton
kernels here touch each element once. Rows travel through page-locked memory, several times faster than
through ordinary memory.

Triton comes with PyTorch's CUDA builds, so this module is imported only where there is a GPU.
"""

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from blindtune.protocol.modular_product import LIMBS, Method, padded_int_mm
from blindtune.protocol.parameters import MODULUS
from blindtune.protocol.residues import Residues

__all__ = ["TritonInt8Product"]

_BLOCK = 1024
# The int8 product on CUDA takes more than 16 rows, in some layouts only multiples of 32: four limbs of 8.
_ROW_MULTIPLE = 8


@triton.jit
def _split(x, limbs, rows, columns, padded, plane, MODULUS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + row * columns + column, mask=(column < columns) & (row < rows), other=0)
    value = tl.where(value > (MODULUS - 1) // 2, value - MODULUS, value)
    target = limbs + row * padded + column
    for limb in tl.static_range(4):
        digit = ((value + 128) & 255) - 128
        tl.store(target + limb * plane, digit.to(tl.int8), mask=column < padded)
        value = (value - digit) >> 8


@triton.jit
def _recombine(sums, out, columns, padded, plane, MODULUS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    source = sums + row * padded + column
    total = tl.load(source + 3 * plane, mask=inside, other=0).to(tl.int64)
    for limb in tl.static_range(3):
        total = (total << 8) + tl.load(source + (2 - limb) * plane, mask=inside, other=0)
    total = total % MODULUS  # as in C: negative for negative values
    total = tl.where(total < 0, total + MODULUS, total)
    tl.store(out + row * columns + column, total.to(tl.int32), mask=inside)


class TritonInt8Product(Method):
    """Four int8 products on a CUDA device, with fused kernels around them.

    Operands are padded to multiples of 8 rows and columns with zeros, which add nothing to any sum.
    """

    name = "int8-triton"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def prepare(self, operand: Residues) -> tuple[torch.Tensor, int]:
        rows, columns = operand.shape
        locked = torch.empty((rows, columns), dtype=torch.int32, pin_memory=True)
        np.copyto(locked.numpy(), operand.view(np.int32))
        x = locked.to(self.device, non_blocking=True)
        padded_rows, padded = rows + -rows % _ROW_MULTIPLE, columns + -columns % 8
        limbs = torch.empty((LIMBS * padded_rows, padded), dtype=torch.int8, device=self.device)
        grid = (padded_rows, triton.cdiv(padded, _BLOCK))
        with torch.cuda.device(self.device):
            _split[grid](x, limbs, rows, columns, padded, padded_rows * padded, MODULUS, _BLOCK)
        return limbs, rows

    def multiply(self, prepared: Any, matrix: torch.Tensor) -> Residues:
        limbs, rows = prepared
        outputs = matrix.shape[1]
        sums = padded_int_mm(limbs, matrix)
        padded = sums.shape[1]
        out = torch.empty((rows, outputs), dtype=torch.int32, device=self.device)
        grid = (rows, triton.cdiv(outputs, _BLOCK))
        with torch.cuda.device(self.device):
            _recombine[grid](sums, out, outputs, padded, len(limbs) // LIMBS * padded, MODULUS, _BLOCK)
        locked = torch.empty((rows, outputs), dtype=torch.int32, pin_memory=True)
        locked.copy_(out)
        return locked.numpy().view(np.uint32)
