"""`blindtune.protocol.expansion` on NVIDIA GPUs: ChaCha20 with rejection, as a function for Triton kernels.

    element(row r, column i) = the first word below q among the i-th words of streams 0, 1, 2, ...

Each lane computes one block of the cipher, that is sixteen consecutive columns. All elements are rejected to
begin with, and as long as some are, the next stream replaces them: one loop for stream 0, which nearly always
suffices, and for those after it.
"""

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

from blindtune.protocol.expansion import Seed
from blindtune.protocol.kernels.chacha20 import BLOCK_WORDS

__all__ = ["LANES", "TILE", "elements", "seed_words"]

# One warp: the words of a block are then put in order without shared memory and barriers.
LANES = 32
TILE = LANES * BLOCK_WORDS


def seed_words(seed: Seed) -> NDArray[np.int32]:
    """What `elements` reads of a seed: the key and the first row, int32 [10]. It holds the key."""
    return np.frombuffer(seed.key + seed.row_offset.to_bytes(8, "little"), np.int32)


@triton.jit
def _rotate_left(x, bits: tl.constexpr):  # type: ignore[no-untyped-def]
    return (x << bits) | (x >> (32 - bits))


@triton.jit
def _quarter_round(a, b, c, d):  # type: ignore[no-untyped-def]
    a += b
    d = _rotate_left(d ^ a, 16)
    c += d
    b = _rotate_left(b ^ c, 12)
    a += b
    d = _rotate_left(d ^ a, 8)
    c += d
    b = _rotate_left(b ^ c, 7)
    return a, b, c, d


@triton.jit
def _key_stream(seed, row, stream, counter):  # type: ignore[no-untyped-def]
    """The blocks of a row's stream at some counters, uint32 [lanes], word by word: uint32 [16 lanes]."""
    zero = tl.zeros_like(counter)
    k0, k1 = zero + tl.load(seed).to(tl.uint32), zero + tl.load(seed + 1).to(tl.uint32)
    k2, k3 = zero + tl.load(seed + 2).to(tl.uint32), zero + tl.load(seed + 3).to(tl.uint32)
    k4, k5 = zero + tl.load(seed + 4).to(tl.uint32), zero + tl.load(seed + 5).to(tl.uint32)
    k6, k7 = zero + tl.load(seed + 6).to(tl.uint32), zero + tl.load(seed + 7).to(tl.uint32)
    n0, n1, n2 = zero + stream, zero + row.to(tl.uint32), zero + (row >> 32).to(tl.uint32)
    a0, a1, a2, a3 = zero + 0x61707865, zero + 0x3320646E, zero + 0x79622D32, zero + 0x6B206574
    b0, b1, b2, b3 = k0, k1, k2, k3
    c0, c1, c2, c3 = k4, k5, k6, k7
    d0, d1, d2, d3 = counter, n0, n1, n2
    for _ in range(10):
        a0, b0, c0, d0 = _quarter_round(a0, b0, c0, d0)
        a1, b1, c1, d1 = _quarter_round(a1, b1, c1, d1)
        a2, b2, c2, d2 = _quarter_round(a2, b2, c2, d2)
        a3, b3, c3, d3 = _quarter_round(a3, b3, c3, d3)
        a0, b1, c2, d3 = _quarter_round(a0, b1, c2, d3)
        a1, b2, c3, d0 = _quarter_round(a1, b2, c3, d0)
        a2, b3, c0, d1 = _quarter_round(a2, b3, c0, d1)
        a3, b0, c1, d2 = _quarter_round(a3, b0, c1, d2)
    a0, a1, a2, a3 = a0 + 0x61707865, a1 + 0x3320646E, a2 + 0x79622D32, a3 + 0x6B206574
    b0, b1, b2, b3 = b0 + k0, b1 + k1, b2 + k2, b3 + k3
    c0, c1, c2, c3 = c0 + k4, c1 + k5, c2 + k6, c3 + k7
    d0, d1, d2, d3 = d0 + counter, d1 + n0, d2 + n1, d3 + n2
    # Each step doubles how many words of a lane stand together: those 8 apart first, and 1 apart last.
    even = tl.interleave(
        tl.interleave(tl.interleave(a0, c0), tl.interleave(b0, d0)),
        tl.interleave(tl.interleave(a2, c2), tl.interleave(b2, d2)),
    )
    odd = tl.interleave(
        tl.interleave(tl.interleave(a1, c1), tl.interleave(b1, d1)),
        tl.interleave(tl.interleave(a3, c3), tl.interleave(b3, d3)),
    )
    return tl.interleave(even, odd)


@triton.jit
def elements(seed, row, counter, wanted, MODULUS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Consecutive columns of one row of a seed's matrix.

    Args:
        seed: from `seed_words`.
        row: int64, counted from the seed's first row.
        counter: uint32 [lanes], which sixteen columns each lane computes.
        wanted: bool [16 lanes].

    Returns:
        int32 [16 lanes], residues; zeros where they are not wanted.
    """
    low = tl.load(seed + 8).to(tl.uint32).to(tl.int64)
    row += (tl.load(seed + 9).to(tl.int64) << 32) + low
    value = tl.where(wanted, MODULUS, 0)
    stream = 0
    while tl.max(value, axis=0) >= MODULUS:
        word = _key_stream(seed, row, stream, counter) & 0x7FFFFFFF
        value = tl.where(value >= MODULUS, word.to(tl.int32), value)
        stream += 1
    return value
