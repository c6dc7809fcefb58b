"""Ways to compute operand . M mod q, of which `exactness` chooses one.

A residue, centred to x in -(q-1)/2 ... (q-1)/2, is four balanced base-256 digits (limbs):

    x = d_0 + 256 d_1 + 256^2 d_2 + 256^3 d_3,      d = ((x + 128) & 255) - 128;  x = (x - d) >> 8

so operand . M is four products of int8 matrices with int32 accumulators, recombined in 64 bits and
reduced mod q. The four limbs stand on top of each other, so they are one call of ``torch._int_mm``.

One float64 product of whole centred residues is slower, and exact wherever floating point is, because no
partial sum reaches 2^53: contractions have at most 2^15 terms below 2^30 * 2^7.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from math import gcd
from typing import Any

import numpy as np
import torch
from numba import float64, int8, uint32, uint64
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from blindtune.protocol.kernels.compiled import kernel
from blindtune.protocol.kernels.recycled import large_matrix
from blindtune.protocol.kernels.row_blocks import for_row_blocks
from blindtune.protocol.multiplication.layer_memory import row_bytes
from blindtune.protocol.operands import SeededRows
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.residues import Residues, add

__all__ = [
    "FloatProduct",
    "Int8Product",
    "Method",
    "TorchInt8Product",
    "contiguous_rows",
    "padded_int_mm",
    "row_multiple",
    "stacked",
]

_BYTES_OF_128 = 0x80808080
# int32 sums of one block of outputs on a processor: about 4 MiB. Twice that from 4096 features on, where sums
# are less of the work and limbs, which the library packs anew for each block, are more.
_SUMS_AT_ONCE = 1 << 20
_LONG_CONTRACTION = 4096
_INT32 = 4
_FLOATS_AT_ONCE = 1 << 24


class Method(ABC):
    """One way to compute operand . M mod q on one device.

    Attributes:
        name: of the method.
        parameters: the modulus and the limbs.
        expand: brings rows of a seed into the form that `multiply` takes, as `prepare` does with their
            residues; None where seeds are expanded on the host.
    """

    name: str
    expand: Callable[[SeededRows], Any] | None = None

    def __init__(self, parameters: ParameterSet) -> None:
        self.parameters = parameters

    @abstractmethod
    def prepare(self, operand: Residues) -> Any:
        """Brings an operand, uint32 [rows, contraction], into the form that `multiply` takes."""

    @abstractmethod
    def multiply(self, prepared: Any, matrix: torch.Tensor) -> Residues:
        """The product mod q.

        Args:
            prepared: from `prepare`.
            matrix: int8 [contraction, outputs], of any strides, on the method's device.

        Returns:
            uint32 [rows, outputs].
        """

    def multiply_into(
        self, out: Residues, column: int, prepared: Any, *matrices: torch.Tensor, adding: bool = False
    ) -> None:
        """Writes the product mod q into ``out`` from ``column`` on, or adds it to what is there.

        Args:
            out: uint32 [rows, column + outputs or more], contiguous.
            column: where the product's first column goes.
            prepared: from `prepare`.
            matrices: int8 [features, outputs], of any strides, on the method's device; they stand on top of
                each other, and have as many features together as the operand has columns.
            adding: whether the product is added, mod q, to the residues there.
        """
        product = self.multiply(prepared, matrices[0] if len(matrices) == 1 else torch.cat(matrices))
        target = out[:, column : column + product.shape[1]]
        np.copyto(target, add(target, product, self.parameters) if adding else product)


@kernel
def _split(operand, columns, q, lift, limbs, start, stop):  # type: ignore[no-untyped-def]
    count = limbs.shape[1]
    for r in range(start, stop):
        row = operand[r]
        limb0, limb1, limb2, limb3 = limbs[r, 0], limbs[r, 1], limbs[r, 2], limbs[r, count - 1]
        for i in range(columns):
            value = row[i]
            x = uint32(value - q) if value > lift else value
            # Adding 128 to every byte carries just where a digit below is negative, so that each byte then
            # holds its digit plus 128, and flipping the byte's top bit takes the 128 off again.
            x = uint32(uint32(x + uint32(_BYTES_OF_128)) ^ uint32(_BYTES_OF_128))
            limb0[i] = int8(x)
            limb1[i] = int8(uint32(x >> uint32(8)))
            limb2[i] = int8(uint32(x >> uint32(16)))
            if count > 3:
                limb3[i] = int8(uint32(x >> uint32(24)))


@kernel
def _recombine(sums, q, out, column, adding, start, stop):  # type: ignore[no-untyped-def]
    count, modulus = sums.shape[1], float64(q)
    inverse = 1.0 / modulus
    for r in range(start, stop):
        sums0, sums1, sums2, sums3 = sums[r, 0], sums[r, 1], sums[r, 2], sums[r, count - 1]
        for j in range(sums0.shape[0]):
            at = uint64(uint64(column) + uint64(j))  # unsigned: else numba looks out for negative indices
            # All of these are integers below 2^53, so float64 holds them exactly, and unlike 64-bit integers
            # it has a vector instruction for each step.
            value = float64(sums0[j]) + 256.0 * float64(sums1[j]) + 65536.0 * float64(sums2[j])
            if count > 3:
                value += 16777216.0 * float64(sums3[j])
            if adding:
                value += float64(out[r, at])
            # value / q is below 2^22 and comes out with an error below 2^-29. Less 2^-24, its floor is never
            # too high, and too low by one only if the remainder is below 2^-23 q: q + 256 fits 31 bits.
            quotient = np.floor(value * inverse - 2.0**-24)
            remainder = uint32(np.int32(value - quotient * modulus))
            # A remainder below q wraps around here to something larger.
            out[r, at] = min(remainder, uint32(remainder - q))


def row_multiple(limbs: int) -> int:
    """Of what the rows of each limb must be multiples: on CUDA, some layouts take 32 rows at a time."""
    return 32 // gcd(32, limbs)


def padded_int_mm(limbs: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """`torch._int_mm` with zeros added to a matrix whose sides are no multiples of 8, as CUDA wants them.

    Args:
        limbs: int8 [m, k rounded up to a multiple of 8].
        matrix: int8 [k, n].

    Returns:
        int32 [m, n rounded up to a multiple of 8].
    """
    contraction, outputs = matrix.shape
    padding = (0, -outputs % 8, 0, -contraction % 8)
    return torch._int_mm(limbs, torch.nn.functional.pad(matrix, padding) if any(padding) else matrix)


def stacked(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Matrices on top of each other, int8 [features, outputs], copied if there are several."""
    if len(matrices) == 1:
        return matrices[0]
    outputs = matrices[0].shape[1]
    features = sum(len(matrix) for matrix in matrices)
    stack = torch.from_numpy(large_matrix(features, row_bytes(outputs), np.int8))[:, :outputs]
    return torch.cat(list(matrices), out=stack)


def contiguous_rows(matrix: NDArray[Any]) -> NDArray[Any]:
    """A matrix for kernels: as rows of a contiguous one, of which only the first so many columns count.

    So columns of a wider matrix are read where they lie. Others are copied.
    """
    rows, columns = matrix.shape
    pitch, size = matrix.strides[0], matrix.itemsize
    if pitch < size * columns or pitch % size or matrix.strides[1] != size:
        matrix = matrix.copy()  # of a single row, ascontiguousarray would keep any strides
    return as_strided(matrix, (rows, matrix.strides[0] // size), matrix.strides, writeable=False)


class Int8Product(Method):
    """Four int8 products on the processor.

    The sums of all outputs would be several times as large as operand and result, and writing them to memory
    and reading them back would cost more than recombining them. So outputs are computed in blocks of columns
    whose sums stay in the processor's caches.
    """

    name = "int8"

    def prepare(self, operand: Residues) -> torch.Tensor:
        rows, columns = operand.shape
        parameters, count = self.parameters, self.parameters.limbs
        limbs = large_matrix(rows * count, row_bytes(columns), np.int8).reshape(rows, count, -1)
        wide, q, lift = contiguous_rows(operand), parameters.q, np.uint32(parameters.lift)
        for_row_blocks(rows, columns, lambda a, b: _split(wide, columns, q, lift, limbs, a, b))
        return torch.from_numpy(limbs)[:, :, :columns]

    def multiply(self, prepared: Any, matrix: torch.Tensor) -> Residues:
        out = large_matrix(len(prepared), matrix.shape[1], np.uint32)
        self.multiply_into(out, 0, prepared, matrix)
        return out

    def multiply_into(
        self, out: Residues, column: int, prepared: Any, *matrices: torch.Tensor, adding: bool = False
    ) -> None:
        rows, count, contraction = prepared.shape
        limbs = prepared.view(rows * count, contraction)
        matrix = stacked(matrices)
        if contraction == 1:
            # Of a layer with one input feature both strides are 1, and torch multiplies by nothing at all.
            matrix = matrix.clone(memory_format=torch.contiguous_format)
        outputs = matrix.shape[1]
        most = _SUMS_AT_ONCE if contraction < _LONG_CONTRACTION else 2 * _SUMS_AT_ONCE
        step = min(outputs, row_bytes(_INT32 * most // (rows * count)) // _INT32)
        buffer = large_matrix(1, rows * count * step, np.int32)[0]
        for start in range(0, outputs, step):
            stop = min(start + step, outputs)
            sums = buffer[: rows * count * (stop - start)].reshape(rows, count, stop - start)
            torch._int_mm(limbs, matrix[:, start:stop], out=torch.from_numpy(sums).view(len(limbs), -1))
            recombine = partial(_recombine, sums, self.parameters.q, out, column + start, adding)
            for_row_blocks(rows, count * (stop - start), recombine)


class TorchInt8Product(Method):
    """Four int8 products in torch operations, for CUDA devices without Triton (it runs anywhere).

    The int8 product on CUDA takes more than 16 rows, in some layouts only multiples of 32, and contraction
    and outputs that are multiples of 8: operands and matrices are padded with zeros, which add nothing to
    any sum.
    """

    name = "int8-torch"

    def __init__(self, parameters: ParameterSet, device: torch.device) -> None:
        super().__init__(parameters)
        self.device = device

    def prepare(self, operand: Residues) -> tuple[torch.Tensor, int]:
        rows = operand.shape[0]
        x = torch.from_numpy(operand.view(np.int32)).to(self.device)
        x = torch.where(x > self.parameters.lift, x - self.parameters.modulus, x)
        padding = (0, -x.shape[1] % 8, 0, -rows % row_multiple(self.parameters.limbs))
        limbs = []
        for _ in range(self.parameters.limbs):
            digit = ((x + 128) & 255) - 128
            limbs.append(torch.nn.functional.pad(digit.to(torch.int8), padding))
            x = (x - digit) >> 8
        return torch.cat(limbs), rows

    def multiply(self, prepared: Any, matrix: torch.Tensor) -> Residues:
        limbs, rows = prepared
        outputs = matrix.shape[1]
        sums = padded_int_mm(limbs, matrix)
        sums = sums.view(self.parameters.limbs, -1, sums.shape[1])[:, :rows, :outputs]
        total = torch.zeros((rows, outputs), dtype=torch.int64, device=sums.device)
        for k in reversed(range(self.parameters.limbs)):
            total = (total << 8) + sums[k]
        return torch.remainder(total, self.parameters.modulus).cpu().numpy().astype(np.uint32)


class FloatProduct(Method):
    """One float64 product of centred residues: slower, exact on every processor and GPU."""

    name = "float64"

    def __init__(self, parameters: ParameterSet, device: torch.device) -> None:
        super().__init__(parameters)
        self.device = device

    def prepare(self, operand: Residues) -> torch.Tensor:
        x = torch.from_numpy(operand.astype(np.float64)).to(self.device)
        return torch.where(x > self.parameters.half, x - self.parameters.modulus, x)

    def multiply(self, prepared: Any, matrix: torch.Tensor) -> Residues:
        out = np.empty((prepared.shape[0], matrix.shape[1]), np.uint32)
        step = max(1, _FLOATS_AT_ONCE // matrix.shape[0])
        for start in range(0, matrix.shape[1], step):
            columns = matrix[:, start : start + step].to(torch.float64)
            product = (prepared @ columns).to(torch.int64)
            out[:, start : start + step] = torch.remainder(product, self.parameters.modulus).cpu().numpy()
        return out
