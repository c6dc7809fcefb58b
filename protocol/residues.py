"""Arithmetic on residues mod q, stored as ``uint32`` in 0 ... q - 1.

Centred residues lie in -(q-1)/2 ... (q-1)/2 and are stored as ``int32``.
"""

import numpy as np
from numba import uint32, uint64
from numpy.typing import NDArray

from blindtune.protocol.compiled import kernel
from blindtune.protocol.errors import VerificationError
from blindtune.protocol.parameters import MODULUS
from blindtune.protocol.row_blocks import for_row_blocks

__all__ = [
    "Centred",
    "Residues",
    "add",
    "centre",
    "from_centred",
    "require_centred",
    "require_residues",
    "subtract",
]

Residues = NDArray[np.uint32]
Centred = NDArray[np.int32]

_HALF = (MODULUS - 1) // 2


@kernel
def _add(a, b, out):  # type: ignore[no-untyped-def]
    for r in range(a.shape[0]):
        for i in range(a.shape[1]):
            t = uint32(a[r, i] + b[r, i])
            out[r, i] = uint32(t - uint32(MODULUS)) if t >= uint32(MODULUS) else t


@kernel
def _subtract(a, b, out):  # type: ignore[no-untyped-def]
    for r in range(a.shape[0]):
        for i in range(a.shape[1]):
            x, y = a[r, i], b[r, i]
            out[r, i] = uint32(x - y) if x >= y else uint32(x + uint32(MODULUS) - y)


@kernel
def _from_centred(x, out):  # type: ignore[no-untyped-def]
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            v = np.int64(x[r, i])
            out[r, i] = np.uint32(v + MODULUS) if v < 0 else np.uint32(v)


@kernel
def _centre(x, out):  # type: ignore[no-untyped-def]
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            v = np.int64(x[r, i])
            out[r, i] = np.int32(v - MODULUS) if v > _HALF else np.int32(v)


@kernel
def _largest(x):  # type: ignore[no-untyped-def]
    largest = uint64(0)
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            largest = max(largest, uint64(x[r, i]))
    return largest


def _elementwise(kernel, *arrays):  # type: ignore[no-untyped-def]
    """Runs an elementwise kernel over row blocks; the last array is the output."""
    rows, columns = arrays[0].shape
    if any(x.shape != arrays[0].shape for x in arrays):
        raise ValueError(f"matrices of different shape: {' and '.join(str(x.shape) for x in arrays[:-1])}")
    for_row_blocks(rows, columns, lambda a, b: kernel(*(x[a:b] for x in arrays)))
    return arrays[-1]


def add(a: Residues, b: Residues) -> Residues:
    """a + b mod q, for matrices of the same shape."""
    return _elementwise(_add, a, b, np.empty(a.shape, np.uint32))


def subtract(a: Residues, b: Residues) -> Residues:
    """a - b mod q, for matrices of the same shape."""
    return _elementwise(_subtract, a, b, np.empty(a.shape, np.uint32))


def require_centred(x: Centred) -> None:
    """Refuses integers that a mask would not hide.

    Raises:
        ValueError: an integer has a magnitude above (q-1)/2.
    """
    if x.size and (x.max() > _HALF or x.min() < -_HALF):
        raise ValueError(f"an integer has a magnitude above {_HALF}, so it is no centred residue")


def from_centred(x: Centred) -> Residues:
    """Residues of centred integers.

    Raises:
        ValueError: an integer has a magnitude above (q-1)/2. Under a mask it would not be hidden.
    """
    require_centred(x)
    return _elementwise(_from_centred, x, np.empty(x.shape, np.uint32))


def centre(x: Residues) -> Centred:
    """The representatives of smallest magnitude."""
    return _elementwise(_centre, x, np.empty(x.shape, np.int32))


def require_residues(x: Residues, what: str) -> None:
    """Refuses words that are not residues.

    A word y + q is congruent to y and would pass any check mod q, and yet corrupt the decoded
    result, so it counts as a failed check before any arithmetic.

    Raises:
        VerificationError: a word is q or larger.
    """
    if x.size and _largest(x) >= MODULUS:
        raise VerificationError(f"{what} holds a word of {MODULUS} or more, which is no residue mod q")
