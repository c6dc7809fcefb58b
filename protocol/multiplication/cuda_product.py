"""The modular product on NVIDIA GPUs: four int8 passes, and one pass each over operand and result.

The int8 product itself is ``torch._int_mm``. Around it, in torch operations, splitting residues into limbs
and recombining the sums would read and write the GPU's memory about thirty times over. The Triton
kernels here touch each element once. Rows travel through page-locked memory, several times faster than
through ordinary memory; the rows of a seed do not travel at all, since the GPU expands them into limbs.

Triton comes with PyTorch's CUDA builds, so this module is imported only where there is a GPU.
"""

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from blindtune.protocol.kernels.chacha20 import BLOCK_WORDS
from blindtune.protocol.multiplication.cuda_expansion import LANES, TILE, elements, seed_words
from blindtune.protocol.multiplication.methods import Method, padded_int_mm, row_multiple
from blindtune.protocol.operands import SeededRows
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.residues import Residues

__all__ = ["TritonInt8Product"]

_BLOCK = 1024


@triton.jit
def _store_limbs(  # type: ignore[no-untyped-def]
    value, target, plane, inside, MODULUS: tl.constexpr, LIFT: tl.constexpr, LIMBS: tl.constexpr
):
    value = tl.where(value > LIFT, value - MODULUS, value)
    for limb in tl.static_range(LIMBS):
        digit = ((value + 128) & 255) - 128
        tl.store(target + limb * plane, digit.to(tl.int8), mask=inside)
        value = (value - digit) >> 8


@triton.jit
def _split(  # type: ignore[no-untyped-def]
    x,
    limbs,
    rows,
    columns,
    padded,
    plane,
    MODULUS: tl.constexpr,
    LIFT: tl.constexpr,
    LIMBS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + row * columns + column, mask=column < tl.where(row < rows, columns, 0), other=0)
    _store_limbs(value, limbs + row * padded + column, plane, column < padded, MODULUS, LIFT, LIMBS)


# Compiled once, and not once for each way in which sizes can be divisible.
@triton.jit(do_not_specialize=["rows", "columns", "first", "padded", "plane"])
def _expand(  # type: ignore[no-untyped-def]
    seed,
    limbs,
    rows,
    columns,
    first,
    padded,
    plane,
    MODULUS: tl.constexpr,
    LIFT: tl.constexpr,
    LIMBS: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = first // 16 + tl.program_id(1) * LANES
    column = (block * 16 - first + tl.arange(0, 16 * LANES)).to(tl.uint32)  # on the left of the first: huge
    wanted = column < tl.where(row < rows, columns, 0)
    value = elements(seed, row, (block + tl.arange(0, LANES)).to(tl.uint32), wanted, MODULUS)
    _store_limbs(value, limbs + row * padded + column, plane, column < padded, MODULUS, LIFT, LIMBS)


@triton.jit
def _recombine(  # type: ignore[no-untyped-def]
    sums,
    out,
    columns,
    padded,
    plane,
    MODULUS: tl.constexpr,
    LIMBS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    source = sums + row * padded + column
    total = tl.load(source + (LIMBS - 1) * plane, mask=inside, other=0).to(tl.int64)
    for limb in tl.static_range(1, LIMBS):
        total = (total << 8) + tl.load(source + (LIMBS - 1 - limb) * plane, mask=inside, other=0)
    total = total % MODULUS  # as in C: negative for negative values
    total = tl.where(total < 0, total + MODULUS, total)
    tl.store(out + row * columns + column, total.to(tl.int32), mask=inside)


class TritonInt8Product(Method):
    """Four int8 products on a CUDA device, with fused kernels around them, and seeds expanded there.

    Operands are padded with zeros, which add nothing to any sum, to multiples of `row_multiple` rows and 8
    columns.

    Args:
        parameters: the modulus and the limbs.
        device: where the matrices lie. In Triton's interpreter, it may be the processor.
    """

    name = "int8-triton"

    def __init__(self, parameters: ParameterSet, device: torch.device) -> None:
        super().__init__(parameters)
        self.device = device
        self._constants = parameters.modulus, parameters.lift, parameters.limbs
        if parameters.word_bytes == 4:
            self.expand = self._expand  # words of three bytes are left to the host

    def prepare(self, operand: Residues) -> tuple[torch.Tensor, int]:
        rows, columns = operand.shape
        x = self._sent(operand.view(np.int32))
        limbs, padded_rows, padded = self._limbs(rows, columns)
        grid = (padded_rows, triton.cdiv(padded, _BLOCK))
        with torch.cuda.device_of(limbs):
            _split[grid](x, limbs, rows, columns, padded, padded_rows * padded, *self._constants, _BLOCK)
        return limbs, rows

    def _expand(self, operand: SeededRows) -> tuple[torch.Tensor, int]:
        rows, columns = operand.shape
        first = operand.first_column
        seed = self._sent(seed_words(operand.seed))
        limbs, padded_rows, padded = self._limbs(rows, columns)
        grid = (padded_rows, triton.cdiv(first % BLOCK_WORDS + padded, TILE))
        with torch.cuda.device_of(limbs):
            _expand[grid](
                seed,
                limbs,
                rows,
                columns,
                first,
                padded,
                padded_rows * padded,
                *self._constants,
                LANES,
                num_warps=1,
            )
        return limbs, rows

    def multiply(self, prepared: Any, matrix: torch.Tensor) -> Residues:
        (limbs, rows), (modulus, _, count) = prepared, self._constants
        outputs = matrix.shape[1]
        sums = padded_int_mm(limbs, matrix)
        padded = sums.shape[1]
        out = torch.empty((rows, outputs), dtype=torch.int32, device=self.device)
        grid = (rows, triton.cdiv(outputs, _BLOCK))
        with torch.cuda.device_of(out):
            _recombine[grid](sums, out, outputs, padded, len(limbs) // count * padded, modulus, count, _BLOCK)
        locked = self._locked((rows, outputs))
        locked.copy_(out)
        return locked.numpy().view(np.uint32)

    def _limbs(self, rows: int, columns: int) -> tuple[torch.Tensor, int, int]:
        """Room for the limbs of an operand, and its padded shape."""
        count = self.parameters.limbs
        padded_rows, padded = rows + -rows % row_multiple(count), columns + -columns % 8
        limbs = torch.empty((count * padded_rows, padded), dtype=torch.int8, device=self.device)
        return limbs, padded_rows, padded

    def _locked(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, pin_memory=self.device.type == "cuda")

    def _sent(self, words: NDArray[np.int32]) -> torch.Tensor:
        """A copy on the device."""
        locked = self._locked(words.shape)
        np.copyto(locked.numpy(), words)
        return locked.to(self.device, non_blocking=True)
