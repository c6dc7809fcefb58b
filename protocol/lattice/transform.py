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

from functools import cache
from typing import NamedTuple

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
from blindtune.protocol.parameters import Q24, Q31, ParameterSet
from blindtune.protocol.residues import Centred

__all__ = [
    "ASKED",
    "LANES",
    "Transform",
    "forward",
    "inverse",
    "primitive_root",
    "reduce_sums",
    "reversed_bits",
    "transform_of",
    "transformed",
]

# Of the multiplicative groups, whose orders are 2^12 * 3 * 5 * 7 * 4993 and 2^14 * 3 * 11 * 31.
_GENERATORS = {Q31.name: 11, Q24.name: 7}

ASKED = DEGREE // 2 * (DEGREE.bit_length() - 1) * LANES
"""The words of as many vectors as a transform has butterflies."""

_WORD = 1 << 32


class Transform(NamedTuple):
    """What kernels need to know of a modulus.

    Attributes:
        q: the modulus.
        inverse: 1 / q mod 2^32.
        w, w1: w and w' of the roots, uint32 [256], in the order of use.
        z, z1: z and z' of their inverses.
        scale, scale1: w and w' of what a transform back leaves out.
    """

    q: np.uint32
    inverse: np.uint32
    w: NDArray[np.uint32]
    w1: NDArray[np.uint32]
    z: NDArray[np.uint32]
    z1: NDArray[np.uint32]
    scale: np.uint32
    scale1: np.uint32


def primitive_root(parameters: ParameterSet) -> int:
    """psi, a primitive 512th root of unity mod q."""
    q = parameters.modulus
    return pow(_GENERATORS[parameters.name], (q - 1) // (2 * DEGREE), q)


@cache
def transform_of(parameters: ParameterSet) -> Transform:
    """The constants of a parameter set."""
    q, psi = parameters.modulus, primitive_root(parameters)
    inverse = pow(q, -1, _WORD)

    def constants(z: list[int]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """w and w' of the factors z."""
        w = [x * _WORD % q for x in z]
        return np.array(w, np.uint32), np.array([x * inverse % _WORD for x in w], np.uint32)

    roots = [pow(psi, reversed_bits(j), q) for j in range(DEGREE)]
    back = [pow(x, -1, q) for x in roots]
    (scale,), (scale1,) = constants([_WORD * pow(DEGREE, -1, q) % q])
    z, z1 = np.array(back, np.uint32), np.array([x * _WORD // q for x in back], np.uint32)
    return Transform(parameters.q, np.uint32(inverse), *constants(roots), z, z1, scale, scale1)


def reversed_bits(j: int) -> int:
    """An index below 256 with its 8 bits reversed."""
    return int(f"{j:08b}"[::-1], 2)


@njit(inline="always")
def _times(b, w, w1, q):  # type: ignore[no-untyped-def]
    """b z mod q for a constant z given by w and w'."""
    m = uint32(uint32(b) * uint32(w1))
    difference = uint32(
        uint32((uint64(b) * uint64(w)) >> uint64(32)) - uint32((uint64(m) * uint64(q)) >> uint64(32))
    )
    return min(difference, uint32(difference + q))


@njit(inline="always")
def _once_less(x, q):  # type: ignore[no-untyped-def]
    """x mod q for words below 2 q."""
    return least(x, subtract(x, repeated(q)))


@njit(inline="always")
def _once_more(x, q):  # type: ignore[no-untyped-def]
    """x mod q for differences of residues, which are negative numbers modulo 2^32 or below q."""
    return least(x, add(x, repeated(q)))


@njit(inline="always")
def _high_products(a, b):  # type: ignore[no-untyped-def]
    """The high words of products of sixteen words with a word."""
    b = repeated_half(int64(b))
    return high_words(multiply(even_words(a), b), multiply(odd_words(a), b))


@njit(inline="always")
def _vector_times(b, z, z1, q):  # type: ignore[no-untyped-def]
    """b z mod q for any sixteen words b and a constant z, given with z'."""
    quotient = _high_products(b, z1)
    return _once_less(subtract(multiply_low(b, repeated(z)), multiply_low(quotient, repeated(q))), q)


@njit(inline="always")
def reduce_sums(even, odd, inverse, q):  # type: ignore[no-untyped-def]
    """total / 2^32 mod q, for sixteen int64 totals of magnitude below 2^32 q, in two halves.

    High words lie in -q ... q - 1, so one correction makes them residues.
    """
    m = multiply_low(low_words(even, odd), repeated(inverse))
    return _once_more(subtract(_once_more(high_words(even, odd), q), _high_products(m, q)), q)


@kernel
def forward(tile, transform):  # type: ignore[no-untyped-def]
    """Transforms a tile in place."""
    q = transform.q
    length = DEGREE // 2
    while length:
        groups = DEGREE // (2 * length)
        for g in range(groups):
            w, w1 = transform.w[groups + g], transform.w1[groups + g]
            for j in range(2 * length * g, 2 * length * g + length):
                for f in range(LANES):
                    a, b = tile[j, f], _times(tile[j + length, f], w, w1, q)
                    plus, minus = uint32(a + b), uint32(a - b)
                    tile[j, f] = min(plus, uint32(plus - q))
                    tile[j + length, f] = min(minus, uint32(minus + q))
        length //= 2


@kernel
def inverse(tile, at, transform, later=None, share=0, shares=1):  # type: ignore[no-untyped-def]
    """Transforms a tile back in place, and leaves it n times too large.

    Args:
        tile: uint32, of one dimension.
        at: where the tile's 256 times 16 words begin.
        transform: of the modulus.
        later: int32, contiguous. Its first `ASKED` words, or one share of them, come from memory meanwhile,
            which the transform leaves alone.
        share, shares: which of how many.
    """
    q, length, level = transform.q, 1, 0
    while length < DEGREE:
        asks = level % shares == share
        word = level * (DEGREE // 2) * LANES
        groups = DEGREE // (2 * length)
        for g in range(groups):
            z, z1 = transform.z[groups + g], transform.z1[groups + g]
            first = at + 2 * length * LANES * g
            for j in range(first, first + length * LANES, LANES):
                if later is not None:
                    if asks:
                        prefetch(later, word)
                        word += LANES
                a, b = load(tile, j), load(tile, j + length * LANES)
                store(tile, j, _once_less(add(a, b), q))
                # a - b + q lies in 1 ... 2 q - 1, which a product with a constant takes as it is.
                store(tile, j + length * LANES, _vector_times(add(subtract(a, b), repeated(q)), z, z1, q))
        length *= 2
        level += 1


@kernel
def _scaled_and_centred(tile, transform, out):  # type: ignore[no-untyped-def]
    q = transform.q
    for p in range(out.shape[0]):
        for j in range(DEGREE):
            x = np.int64(_times(tile[j, p], transform.scale, transform.scale1, q))
            out[p, j] = np.int32(x - np.int64(q)) if x > np.int64(q >> 1) else np.int32(x)


def transformed(polynomials: NDArray[np.int8], parameters: ParameterSet) -> Centred:
    """The factors of a pointwise product that `reduce_sums` and `inverse` turn into a product in the ring.

    They carry the factors 2^32 and 1/n that those two leave out.

    Args:
        polynomials: int8 [count, 256], at most 16 ring elements.
        parameters: of the residues.

    Returns:
        int32 [count, 256], centred.
    """
    tile = np.zeros((DEGREE, LANES), np.uint32)
    tile[:, : len(polynomials)] = polynomials.T.astype(np.int64) % parameters.modulus
    transform = transform_of(parameters)
    forward(tile, transform)
    out = np.empty(polynomials.shape, np.int32)
    _scaled_and_centred(tile, transform, out)
    return out
