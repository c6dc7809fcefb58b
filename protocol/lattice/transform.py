"""The negacyclic number-theoretic transform of length n = 256 mod q, on tiles of 16 ring elements.

    a^[j] = sum_i a[i] psi^((2 brv(j) + 1) i)  mod q,      psi^n = -1,   brv reverses 8 bits

A product in Z_q[X] / (X^n + 1) is the pointwise product of transforms. Cooley-Tukey butterflies forward,
Gentleman-Sande butterflies back, with the powers of psi in the order of use (Longa, Naehrig 2016).

A tile is uint32 [256][16], the coefficients of 16 ring elements side by side, so that every butterfly is
a loop over 16 contiguous words, which compilers turn into vector instructions. Its residues lie in
0 ... q - 1. The sum of two fits 32 bits, and min(x, x - q) modulo 2^32 reduces it: if x < q, x - q wraps
around to something larger. Casts are written out because numba widens all arithmetic to 64 bits.

Products are Montgomery's (1985) with constants w = 2^32 z mod q and w' = w / q mod 2^32 (Seiler 2018):

    t = b w,    m = b w' mod 2^32,    b z = (t - m q) / 2^32 = hi(t) - hi(m q)   (mod q)

The low words of t and m q are equal, so only high words are subtracted, and both are below q.
"""

import numpy as np
from numba import njit, uint32, uint64
from numpy.typing import NDArray

from blindtune.protocol.compiled import kernel
from blindtune.protocol.lattice.parameters import DEGREE
from blindtune.protocol.parameters import MODULUS
from blindtune.protocol.residues import Centred

__all__ = ["LANES", "PSI", "forward", "inverse", "reduce_sum", "reversed_bits", "transformed"]

LANES = 16
"""Ring elements in a tile."""

_GENERATOR = 11  # of the multiplicative group mod q, whose order is 2^12 * 3 * 5 * 7 * 4993
PSI = pow(_GENERATOR, (MODULUS - 1) // (2 * DEGREE), MODULUS)
"""A primitive 512th root of unity mod q."""

_WORD = 1 << 32
_INVERSE = np.uint32(pow(MODULUS, -1, _WORD))
_Q = np.uint32(MODULUS)
_HALF = (MODULUS - 1) // 2


def reversed_bits(j: int) -> int:
    """An index below 256 with its 8 bits reversed."""
    return int(f"{j:08b}"[::-1], 2)


def _constants(z: list[int]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """w and w' of the factors z."""
    w = [x * _WORD % MODULUS for x in z]
    return np.array(w, np.uint32), np.array([x * int(_INVERSE) % _WORD for x in w], np.uint32)


_ROOTS = [pow(PSI, reversed_bits(j), MODULUS) for j in range(DEGREE)]
_W, _W1 = _constants(_ROOTS)
_V, _V1 = _constants([pow(x, -1, MODULUS) for x in _ROOTS])
_SCALE, _SCALE1 = _constants([_WORD * pow(DEGREE, -1, MODULUS) % MODULUS])


@njit(inline="always")
def _times(b, w, w1):  # type: ignore[no-untyped-def]
    """b z mod q for a constant z given by w and w'."""
    m = uint32(uint32(b) * uint32(w1))
    difference = uint32(
        uint32((uint64(b) * uint64(w)) >> uint64(32)) - uint32((uint64(m) * uint64(_Q)) >> uint64(32))
    )
    return min(difference, uint32(difference + _Q))


@njit(inline="always")
def reduce_sum(total):  # type: ignore[no-untyped-def]
    """total / 2^32 mod q, for an int64 of magnitude below 2^32 q.

    The high word lies in -q ... q - 1, so one correction makes it a residue.
    """
    m = uint32(uint32(total) * _INVERSE)
    high = uint32(total >> 32)
    high = min(high, uint32(high + _Q))
    difference = uint32(high - uint32((uint64(m) * uint64(_Q)) >> uint64(32)))
    return min(difference, uint32(difference + _Q))


@kernel
def forward(tile):  # type: ignore[no-untyped-def]
    """Transforms a tile in place."""
    length = DEGREE // 2
    while length:
        groups = DEGREE // (2 * length)
        for g in range(groups):
            w, w1 = _W[groups + g], _W1[groups + g]
            for j in range(2 * length * g, 2 * length * g + length):
                for f in range(LANES):
                    a, b = tile[j, f], _times(tile[j + length, f], w, w1)
                    plus, minus = uint32(a + b), uint32(a - b)
                    tile[j, f] = min(plus, uint32(plus - _Q))
                    tile[j + length, f] = min(minus, uint32(minus + _Q))
        length //= 2


@kernel
def inverse(tile):  # type: ignore[no-untyped-def]
    """Transforms a tile back in place, and leaves it n times too large."""
    length = 1
    while length < DEGREE:
        groups = DEGREE // (2 * length)
        for g in range(groups):
            w, w1 = _V[groups + g], _V1[groups + g]
            for j in range(2 * length * g, 2 * length * g + length):
                for f in range(LANES):
                    a, b = tile[j, f], tile[j + length, f]
                    plus, minus = uint32(a + b), uint32(a - b)
                    tile[j, f] = min(plus, uint32(plus - _Q))
                    tile[j + length, f] = _times(min(minus, uint32(minus + _Q)), w, w1)
        length *= 2


@kernel
def _scaled_and_centred(tile, out):  # type: ignore[no-untyped-def]
    for p in range(out.shape[0]):
        for j in range(DEGREE):
            x = np.int64(_times(tile[j, p], _SCALE[0], _SCALE1[0]))
            out[p, j] = np.int32(x - MODULUS) if x > _HALF else np.int32(x)


def transformed(polynomials: NDArray[np.int8]) -> Centred:
    """The factors of a pointwise product that `reduce_sum` and `inverse` turn into a product in the ring.

    They carry the factors 2^32 and 1/n that those two leave out.

    Args:
        polynomials: int8 [count, 256], at most 16 ring elements.

    Returns:
        int32 [count, 256], centred.
    """
    tile = np.zeros((DEGREE, LANES), np.uint32)
    tile[:, : len(polynomials)] = polynomials.T.astype(np.int64) % MODULUS
    forward(tile)
    out = np.empty(polynomials.shape, np.int32)
    _scaled_and_centred(tile, out)
    return out
