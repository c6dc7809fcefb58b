"""NF4, the four-bit numbers of QLoRA (Dettmers et al. 2023), as bitsandbytes makes them: blocks of 64 codes.

    absmax[b] = max |w| over block b of 64 consecutive elements of the [out, in] matrix, row after row
    code[i]   = the value of the table nearest to w[i] * (1 / absmax),    w[i] ~ table[code[i]] * absmax

The last block may be shorter. With double quantization, absmax is itself stored in eight bits, in blocks of
256, less its mean. All of it is float32, in this order, and on the processor: GPUs divide otherwise, and both
sides of the protocol need the same bits.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import fsum

import numpy as np
import torch

from blindtune.protocol.kernels.four_bits import BLOCK, DOUBLE_BLOCK

__all__ = [
    "BLOCK",
    "DOUBLE_BLOCK",
    "DYNAMIC",
    "TABLE",
    "BlockScales",
    "FourBitWeight",
    "quantize_nf4",
    "unpacked",
]

_ELEMENTS_AT_ONCE = BLOCK << 16

TABLE = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)
"""The sixteen values, float32: quantiles of a normal distribution."""

_BOUNDS = (TABLE[:-1] + TABLE[1:]) / 2
_CODE_OF_ZERO = 7
_TINY = 1e-38  # what bitsandbytes divides by where a block holds nothing but zeros


@dataclass(frozen=True, eq=False)
class FourBitWeight:
    """A weight matrix of four-bit codes.

    Attributes:
        codes: uint8 [ceil(out * in / 2)], two codes a byte, the first one in the high half.
        scales: what each block is multiplied by.
        shape: out and in.
    """

    codes: torch.Tensor
    scales: "BlockScales"
    shape: tuple[int, int]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """The numbers that rows ``start ... stop - 1`` stand for, float32 [stop - start, in]."""
        first, last = start * self.shape[1], stop * self.shape[1]
        codes = unpacked(self.codes[first // 2 : -(-last // 2)])[first % 2 :][: last - first]
        scales = self.scales.values(first // BLOCK, -(-last // BLOCK)).repeat_interleave(BLOCK)
        numbers = TABLE[codes] * scales[first % BLOCK :][: last - first]
        return numbers.view(stop - start, self.shape[1])


@dataclass(frozen=True, eq=False)
class BlockScales:
    """The largest magnitude of each block, as it is or in eight bits.

    Attributes:
        stored: float32 [blocks]; or uint8, codes of `DYNAMIC`.
        largest: float32 [ceil(blocks / 256)], what the values of each 256 codes are multiplied by.
        offset: float32 scalar, what is added then.
    """

    stored: torch.Tensor
    largest: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes + (0 if self.largest is None else self.largest.nbytes + 4)

    def values(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """float32 [blocks], of all blocks or of blocks ``start ... stop - 1``."""
        stored = self.stored[start:stop]
        if self.largest is None or self.offset is None:
            return stored
        largest = self.largest[torch.arange(start, start + len(stored)) // DOUBLE_BLOCK]
        return DYNAMIC[stored.long()] * largest + self.offset


def unpacked(codes: torch.Tensor) -> torch.Tensor:
    """Four-bit codes of bytes, the one in the high half first: int32, twice as many."""
    wide = codes.to(torch.int32)
    return torch.stack((wide >> 4, wide & 15), dim=1).flatten()


def quantize_nf4(weight: torch.Tensor, *, double: bool = False) -> FourBitWeight:
    """Quantizes a weight matrix.

    Args:
        weight: [out_features, in_features], of any floating-point type.
        double: whether the blocks' largest magnitudes are quantized, too.

    Raises:
        ValueError: a value is not finite, or the matrix has no elements.
    """
    if not weight.numel():
        raise ValueError("the weight matrix is empty")
    out_features, in_features = weight.shape
    absmax = torch.empty(-(-weight.numel() // BLOCK))
    codes = torch.empty(-(-weight.numel() // 2), dtype=torch.uint8)
    numbers = weight.detach().reshape(-1)
    for start in range(0, len(numbers), _ELEMENTS_AT_ONCE):
        part = numbers[start : start + _ELEMENTS_AT_ONCE].to("cpu", torch.float32)
        whole = len(part) - len(part) % BLOCK
        _put(part[:whole].view(-1, BLOCK), start, absmax, codes)
        if whole < len(part):
            _put(part[None, whole:], start + whole, absmax, codes)
    if not torch.isfinite(absmax).all():
        raise ValueError("the weight matrix holds a value that is not finite")
    scales = _twice(absmax, _mean(absmax)) if double else BlockScales(absmax)
    return FourBitWeight(codes, scales, (out_features, in_features))


def _put(blocks: torch.Tensor, start: int, absmax: torch.Tensor, codes: torch.Tensor) -> None:
    """Puts blocks, float32 [blocks, 64], or a single shorter one, at their places."""
    largest = blocks.abs().amax(dim=1, keepdim=True)
    divisor = largest.clamp(min=_TINY)
    if blocks.shape[1] == BLOCK:
        scaled = blocks * (1 / divisor)
    else:  # the rest, of which bitsandbytes takes quotients, and keeps what it divided by
        scaled, largest = blocks / divisor, divisor
    absmax[start // BLOCK : start // BLOCK + len(blocks)] = largest[:, 0]
    found = torch.bucketize(scaled.clamp_(-1, 1).flatten(), _BOUNDS, out_int32=True).to(torch.uint8)
    found = torch.nn.functional.pad(found, (0, len(found) % 2), value=_CODE_OF_ZERO)
    codes[start // 2 : (start + len(found)) // 2] = found[::2] << 4 | found[1::2]


def _dynamic_table() -> torch.Tensor:
    """The 256 values that scales are stored as (Dettmers 2016): each power of ten has twice the last's."""
    table, first, last = [0.0, 1.0], float(np.float32(0.1)), 1.0
    for exponent in range(7):
        count = 1 << exponent
        step, factor = float(np.float32((last - first) / count)), np.float32(10.0 ** (exponent - 6))
        # Counted from the nearer end and rounded once, as torch's equal steps are.
        edges = [first + step * i if 2 * i < count else last - step * (count - i) for i in range(count + 1)]
        for left, right in pairwise(map(np.float32, edges)):
            middle = float((left + right) / np.float32(2) * factor)
            table += [middle, -middle]
    return torch.tensor(sorted(table))


DYNAMIC = _dynamic_table()
"""What codes of scales stand for, float32 [256]."""

_STEPS = (1 << 16) - 1
# bitsandbytes looks the nearest value up by the nearest of so many equal steps from -1 to 1.
_NEAREST = torch.bucketize(-1 + 2 * torch.arange(_STEPS + 1) / _STEPS, (DYNAMIC[:-1] + DYNAMIC[1:]) / 2)


def _mean(scales: torch.Tensor) -> torch.Tensor:
    """Rounded once, whatever the number of threads and the width of vectors.

    bitsandbytes takes torch's, whose last bits depend on both.
    """
    return torch.tensor(fsum(scales.tolist()) / len(scales))


def _twice(absmax: torch.Tensor, offset: torch.Tensor) -> BlockScales:
    """Scales in eight bits, less their mean."""
    around = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % DOUBLE_BLOCK))
    around = around.view(-1, DOUBLE_BLOCK)
    largest = around.abs().amax(dim=1, keepdim=True)
    scaled = (around * (1 / largest)).clamp_(-1, 1)
    codes = _NEAREST[((scaled + 1) * 0.5 * _STEPS + 0.5).nan_to_num(0).to(torch.int64)]
    codes[(largest == 0).expand_as(codes)] = 0
    return BlockScales(codes.to(torch.uint8).flatten()[: len(absmax)].clone(), largest[:, 0], offset)
