"""D = q^-1 (Z V - y^ u): mod 2^32 of all rows, mod 2^64 of those where it was not 0.

Z are the integers that were multiplied, y^ their centred result, y = y^ + q w, and V = M u, so that D is
sum_j w_j u_j. q is odd, so it has an inverse.
"""

import numpy as np
from numpy.typing import NDArray

from blindtune.protocol.certificate.words import CertificateWords, LongWords
from blindtune.protocol.kernels.low_sums import Words
from blindtune.protocol.residues import Centred

__all__ = ["long_syndromes", "syndromes"]


def syndromes(expected: Words, sums: Words, modulus: int) -> Words:
    """D mod 2^32.

    Args:
        expected: Z V of each row mod 2^32, uint32 [rows].
        sums: y^ u, likewise.
        modulus: q.
    """
    return (expected - sums) * np.uint32(pow(modulus, -1, 1 << 32))


def long_syndromes(z: Centred, y: Centred, words: CertificateWords, modulus: int) -> LongWords:
    """D mod 2^64, of few rows.

    Args:
        z: int32 [rows, contraction].
        y: int32 [rows, outputs], centred.
        words: of the product.
        modulus: q.
    """
    difference = _dots(z, words.long_image) - _dots(y, words.long_u)
    return difference * np.uint64(pow(modulus, -1, 1 << 64))


def _dots(x: NDArray[np.int32], words: LongWords) -> LongWords:
    products: LongWords = x.astype(np.int64).view(np.uint64) * words
    return products.sum(axis=1, dtype=np.uint64)
