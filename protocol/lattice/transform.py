"""The negacyclic number-theoretic transform of length n = 256 mod q, on tiles of 16 ring elements.

    a^[j] = sum_i a[i] psi^((2 brv(j) + 1) i)  mod q,      psi^n = -1,   brv reverses 8 bits

A product in Z_q[X] / (X^n + 1) is the pointwise product of transforms. Cooley-Tukey butterflies forward,
Gentleman-Sande butterflies back, with the powers of psi in the order of use (Longa, Naehrig 2016).

A tile is uint32 [256][16], the coefficients of 16 ring elements side by side, so that every butterfly is
a loop over 16 contiguous words, which compilers turn into vector instructions. Its residues lie in
0 ... q - 1. The sum of two fits 32 bits, and min(x, x - q) modulo 2^32 reduces it: if x < q, x - q wraps
around to something larger. Casts are written out because numba widens all arithmetic to 64 bits.

Forward, products are Montgomery's (1985) with constants w = 2^32 z mod q and w' = w / q mod 2^32
(Seiler 2018):

    t = b w,    m = b w' mod 2^32,    b z = (t - m q) / 2^32 = hi(t) - hi(m q)   (mod q)

The low words of t and m q are equal, so only high words are subtracted, and both are below q. Back, where
all time goes, they are Shoup's, with z' = floor(2^32 z / q):

    b z = b z - hi(b z') q   (mod q),      0 <= b z - hi(b z') q < q + b q / 2^32 < 2 q < 2^32

so that only low words are subtracted, for which vectors need fewer instructions.
"""

import numpy as np
from numba import int64, njit, uint32, uint64
from numpy.typing import NDArray

from blindtune.protocol.kernels.compiled import kernel
from blindtune.protocol.kernels.vectors import (
    LANES,
    add,
    even_words,
    high_words,
    least,
    load,
    low_words,
    multiply,
    multiply_low,
    odd_words,
    prefetch,
    repeated,
    repeated_half,
    store,
    subtract,
)
from blindtune.protocol.lattice.parameters import DEGREE
from blindtune.protocol.parameters import MODULUS
from blindtune.protocol.residues import Centred

__all__ = ["ASKED", "LANES", "PSI", "forward", "inverse", "reduce_sums", "reversed_bits", "transformed"]

_GENERATOR = 11  # of the multiplicative group mod q, whose order is 2^12 * 3 * 5 * 7 * 4993
PSI = pow(_GENERATOR, (MODULUS - 1) // (2 * DEGREE), MODULUS)
"""A primitive 512th root of unity mod q."""

ASKED = DEGREE // 2 * (DEGREE.bit_length() - 1) * LANES
"""The words of as many vectors as a transform has butterflies."""

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
_INVERSE_ROOTS = [pow(x, -1, MODULUS) for x in _ROOTS]
_Z = np.array(_INVERSE_ROOTS, np.uint32)
_Z1 = np.array([x * _WORD // MODULUS for x in _INVERSE_ROOTS], np.uint32)
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
def _once_less(x):  # type: ignore[no-untyped-def]
    """x mod q for words below 2 q."""
    return least(x, subtract(x, repeated(_Q)))


@njit(inline="always")
def _once_more(x):  # type: ignore[no-untyped-def]
    """x mod q for differences of residues, which are negative numbers modulo 2^32 or below q."""
    return least(x, add(x, repeated(_Q)))


@njit(inline="always")
def _high_products(a, b):  # type: ignore[no-untyped-def]
    """The high words of products of sixteen words with a word."""
    b = repeated_half(int64(b))
    return high_words(multiply(even_words(a), b), multiply(odd_words(a), b))


@njit(inline="always")
def _vector_times(b, z, z1):  # type: ignore[no-untyped-def]
    """b z mod q for any sixteen words b and a constant z, given with z'."""
    quotient = _high_products(b, z1)
    return _once_less(subtract(multiply_low(b, repeated(z)), multiply_low(quotient, repeated(_Q))))


@njit(inline="always")
def reduce_sums(even, odd):  # type: ignore[no-untyped-def]
    """total / 2^32 mod q, for sixteen int64 totals of magnitude below 2^32 q, in two halves.

    High words lie in -q ... q - 1, so one correction makes them residues.
    """
    m = multiply_low(low_words(even, odd), repeated(_INVERSE))
    return _once_more(subtract(_once_more(high_words(even, odd)), _high_products(m, _Q)))


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
def inverse(tile, at, later=None, share=0, shares=1):  # type: ignore[no-untyped-def]
    """Transforms a tile back in place, and leaves it n times too large.

    Args:
        tile: uint32, of one dimension.
        at: where the tile's 256 times 16 words begin.
        later: int32, contiguous. Its first `ASKED` words, or one share of them, come from memory meanwhile,
            which the transform leaves alone.
        share, shares: which of how many.
    """
    length, level = 1, 0
    while length < DEGREE:
        asks = level % shares == share
        word = level * (DEGREE // 2) * LANES
        groups = DEGREE // (2 * length)
        for g in range(groups):
            z, z1 = _Z[groups + g], _Z1[groups + g]
            first = at + 2 * length * LANES * g
            for j in range(first, first + length * LANES, LANES):
                if later is not None:
                    if asks:
                        prefetch(later, word)
                        word += LANES
                a, b = load(tile, j), load(tile, j + length * LANES)
                store(tile, j, _once_less(add(a, b)))
                # a - b + q lies in 1 ... 2 q - 1, which a product with a constant takes as it is.
                store(tile, j + length * LANES, _vector_times(add(subtract(a, b), repeated(_Q)), z, z1))
        length *= 2
        level += 1


@kernel
def _scaled_and_centred(tile, out):  # type: ignore[no-untyped-def]
    for p in range(out.shape[0]):
        for j in range(DEGREE):
            x = np.int64(_times(tile[j, p], _SCALE[0], _SCALE1[0]))
            out[p, j] = np.int32(x - MODULUS) if x > _HALF else np.int32(x)


def transformed(polynomials: NDArray[np.int8]) -> Centred:
    """The factors of a pointwise product that `reduce_sums` and `inverse` turn into a product in the ring.

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
