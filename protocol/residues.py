"""Arithmetic on residues mod q, stored as ``uint32`` in 0 ... q - 1.

Centred residues lie in -(q-1)/2 ... (q-1)/2 and are stored as ``int32``. Kernels take q as a ``uint32``, and
are compiled once for all parameter sets.
"""

from collections.abc import Sequence

import numpy as np
from numba import njit, uint32, uint64
from numpy.typing import NDArray

from blindtune.errors import VerificationError
from blindtune.protocol.kernels.compiled import kernel
from blindtune.protocol.kernels.reals import high_of_half, total_of_half
from blindtune.protocol.kernels.row_blocks import READ, for_row_blocks
from blindtune.protocol.kernels.vectors import (
    LANES,
    even_words,
    least,
    load,
    multiply,
    multiply_signed,
    odd_words,
    prefetch,
    repeated,
    repeated_half,
    store,
)
from blindtune.protocol.kernels.vectors import add as add_vectors
from blindtune.protocol.kernels.vectors import subtract as subtract_vectors
from blindtune.protocol.parameters import ParameterSet

__all__ = [
    "Centred",
    "Residues",
    "add",
    "add_rows",
    "centre",
    "centred_difference",
    "centred_differences",
    "centred_of",
    "dot",
    "dots_fit",
    "from_centred",
    "hide",
    "hide_row",
    "hide_rows",
    "lifted_of",
    "require_centred",
    "require_residues",
    "residues_of",
    "signed_products",
    "subtract",
    "subtract_and_centre",
    "sums_of",
]

Residues = NDArray[np.uint32]
Centred = NDArray[np.int32]

# Of t and t - q mod 2^32 the smaller is t mod q for t below 2 q; of t and t + q mod 2^32, for t above -q.
# Without branches, these loops are compiled to vector instructions.


@kernel
def add_rows(a, b, q, out):  # type: ignore[no-untyped-def]
    for r in range(a.shape[0]):
        for i in range(a.shape[1]):
            t = uint32(a[r, i] + b[r, i])
            out[r, i] = min(t, uint32(t - q))


@kernel
def _subtract(a, b, q, out):  # type: ignore[no-untyped-def]
    for r in range(a.shape[0]):
        for i in range(a.shape[1]):
            t = uint32(a[r, i] - b[r, i])
            out[r, i] = min(t, uint32(t + q))


@kernel
def _from_centred(x, q, out):  # type: ignore[no-untyped-def]
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            t = uint32(x[r, i])
            out[r, i] = min(t, uint32(t + q))


@kernel
def _centre(x, q, out):  # type: ignore[no-untyped-def]
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            t = x[r, i]
            out[r, i] = np.int32(uint32(t - q) if t > uint32(q >> 1) else t)


@kernel
def hide_rows(x, mask, q, out):  # type: ignore[no-untyped-def]
    """Adds, and returns what `_largest_from_lowest` does."""
    largest = uint32(0)
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            t = uint32(x[r, i])
            largest = max(largest, uint32(t + uint32(q >> 1)))
            t = uint32(min(t, uint32(t + q)) + mask[r, i])
            out[r, i] = min(t, uint32(t - q))
    return largest


@kernel
def _subtract_and_centre(a, b, q, out):  # type: ignore[no-untyped-def]
    for r in range(a.shape[0]):
        for i in range(a.shape[1]):
            out[r, i] = centred_difference(a[r, i], b[r, i], q)


@njit(inline="always")
def centred_difference(a, b, q):  # type: ignore[no-untyped-def]
    """The representative of smallest magnitude of a - b, of two words."""
    t = uint32(a - b)
    t = min(t, uint32(t + q))
    return np.int32(uint32(t - q) if t > uint32(q >> 1) else t)


@njit(inline="always")
def residues_of(words, q):  # type: ignore[no-untyped-def]
    """Sixteen residues, of themselves or of what is above -q and below 0."""
    return least(words, add_vectors(words, repeated(q)))


@njit(inline="always")
def sums_of(a, b, q):  # type: ignore[no-untyped-def]
    """a + b mod q, sixteen times."""
    total = add_vectors(a, b)
    return least(total, subtract_vectors(total, repeated(q)))


@njit(inline="always")
def lifted_of(residues, lift, q):  # type: ignore[no-untyped-def]
    """The representatives in lift - q + 1 ... lift, sixteen times."""
    # Plus q - 1 - lift, reduced, less that: as integers with a sign, those are the wanted ones.
    below = repeated(uint32(q - uint32(1) - lift))
    return subtract_vectors(sums_of(residues, below, q), below)


@njit(inline="always")
def centred_of(residues, q):  # type: ignore[no-untyped-def]
    """The representatives of smallest magnitude, sixteen times."""
    return lifted_of(residues, uint32(q >> 1), q)


@njit(inline="always")
def centred_differences(a, b, q):  # type: ignore[no-untyped-def]
    """`centred_difference`, sixteen times."""
    return centred_of(residues_of(subtract_vectors(a, b), q), q)


@kernel
def _largest(x):  # type: ignore[no-untyped-def]
    largest = uint32(0)
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            largest = max(largest, x[r, i])
    return largest


@kernel
def _largest_from_lowest(x, q):  # type: ignore[no-untyped-def]
    """The largest of x + (q-1)/2 mod 2^32, which is below q if all x are centred residues."""
    largest = uint32(0)
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            largest = max(largest, uint32(uint32(x[r, i]) + uint32(q >> 1)))
    return largest


@njit(inline="always")
def _products(a, b):  # type: ignore[no-untyped-def]
    """Sums of two, of sixteen products."""
    return add_vectors(multiply(even_words(a), even_words(b)), multiply(odd_words(a), odd_words(b)))


@njit(inline="always")
def signed_products(x, v):  # type: ignore[no-untyped-def]
    """Sums of two, of sixteen products of integers with residues."""
    return add_vectors(
        multiply_signed(even_words(x), even_words(v)), multiply_signed(odd_words(x), odd_words(v))
    )


# A dot product takes 32 words at a time, and adds up four products of them, which is below 2^64. The sum of
# all fours is 2^32 high + low. Of it mod 2^64 and of high follows low, which is below 2^64.


@kernel
def _reduced(sums, highs, q):  # type: ignore[no-untyped-def]
    """Of the sums of fours and of their high words: 2^32 high + low mod q."""
    high = total_of_half(highs)
    low = uint64(total_of_half(sums) - (high << uint64(32)))
    carried = uint64(high + (low >> uint64(32)))
    return (((carried % uint64(q)) << uint64(32)) + (low & uint64(0xFFFFFFFF))) % uint64(q)


@kernel
def _plus_rest(dot, row, vector, first, q):  # type: ignore[no-untyped-def]
    """A dot product, and the words from ``first`` on."""
    for i in range(first, row.shape[0]):
        dot = (dot + uint64(row[i]) * uint64(vector[i])) % uint64(q)
    return uint32(dot)


@kernel
def dot(row, vector, q, later=0):  # type: ignore[no-untyped-def]
    """row . vector mod q, of contiguous uint32 words below q.

    Meanwhile it asks for memory: half as much from element ``later`` of the row on, if there is one.
    """
    whole = row.shape[0] - row.shape[0] % (2 * LANES)
    sums, highs = repeated_half(np.int64(0)), repeated_half(np.int64(0))
    for i in range(0, whole, 2 * LANES):
        if later > 0:
            prefetch(row, later + i // 2)
        a, b = load(row, i), load(row, i + LANES)
        four = add_vectors(_products(a, load(vector, i)), _products(b, load(vector, i + LANES)))
        sums, highs = add_vectors(sums, four), add_vectors(highs, high_of_half(four))
    return _plus_rest(_reduced(sums, highs, q), row, vector, whole, q)


@kernel
def hide_row(x, mask, v, q, out):  # type: ignore[no-untyped-def]
    """Adds a mask to a row, and returns two dot products.

    Args:
        x: int32 [columns], centred residues.
        mask, v: uint32 [columns], below q.
        out: uint32 [columns], receives x + mask mod q.

    Returns:
        mask . v mod q, and x . v mod 2^64, which is x . v itself where `dots_fit`.
    """
    whole = x.shape[0] - x.shape[0] % (2 * LANES)
    zero = repeated_half(np.int64(0))
    sums, highs, small = zero, zero, zero
    for i in range(0, whole, 2 * LANES):
        a, b = load(mask, i), load(mask, i + LANES)
        c, d = load(x, i), load(x, i + LANES)
        one, other = load(v, i), load(v, i + LANES)
        store(out, i, sums_of(residues_of(c, q), a, q))
        store(out, i + LANES, sums_of(residues_of(d, q), b, q))
        four = add_vectors(_products(a, one), _products(b, other))
        sums, highs = add_vectors(sums, four), add_vectors(highs, high_of_half(four))
        small = add_vectors(small, add_vectors(signed_products(c, one), signed_products(d, other)))
    total = np.int64(total_of_half(small))
    for i in range(whole, x.shape[0]):
        total += np.int64(x[i]) * np.int64(v[i])
        t = uint32(x[i])
        t = uint32(min(t, uint32(t + q)) + mask[i])
        out[i] = min(t, uint32(t - q))
    return _plus_rest(_reduced(sums, highs, q), mask, v, whole, q), total


def dots_fit(square_sum: int, columns: int, parameters: ParameterSet) -> bool:
    """Whether int64 holds the dot product of any row of integers with any row of residues.

    By Cauchy-Schwarz it is at most the product of their norms, and computed mod 2^64 it is exact if that is
    below 2^63.

    Args:
        square_sum: of the integers, at most.
        columns: of the rows.
        parameters: of the residues.
    """
    # As Python counts, without end.
    return int(square_sum) * columns * (parameters.modulus - 1) ** 2 < 1 << 126


def _elementwise(kernel, parameters, *arrays):  # type: ignore[no-untyped-def]
    """Runs an elementwise kernel over row blocks; the last array is the output."""
    (*inputs, out), q = arrays, parameters.q
    rows, columns = out.shape
    if any(x.shape != arrays[0].shape for x in arrays):
        raise ValueError(f"matrices of different shape: {' and '.join(str(x.shape) for x in arrays[:-1])}")
    for_row_blocks(rows, columns, lambda a, b: kernel(*(x[a:b] for x in inputs), q, out[a:b]))
    return out


def add(a: Residues, b: Residues, parameters: ParameterSet) -> Residues:
    """a + b mod q, for matrices of the same shape."""
    return _elementwise(add_rows, parameters, a, b, np.empty(a.shape, np.uint32))


def subtract(a: Residues, b: Residues, parameters: ParameterSet) -> Residues:
    """a - b mod q, for matrices of the same shape."""
    return _elementwise(_subtract, parameters, a, b, np.empty(a.shape, np.uint32))


def subtract_and_centre(a: Residues, b: Residues, parameters: ParameterSet) -> Centred:
    """The representative of smallest magnitude of a - b, for matrices of the same shape."""
    return _elementwise(_subtract_and_centre, parameters, a, b, np.empty(a.shape, np.int32))


def require_centred(x: Centred, parameters: ParameterSet) -> None:
    """Refuses integers that a mask would not hide.

    Raises:
        ValueError: an integer has a magnitude above (q-1)/2, or they are not stored as ``int32``.
    """
    if x.dtype != np.int32:
        raise ValueError(f"centred residues are stored as int32, not {x.dtype}")
    rows, columns = x.shape
    largest: list[int] = []
    q = parameters.q
    for_row_blocks(rows, columns, lambda a, b: largest.append(_largest_from_lowest(x[a:b], q)), READ)
    if max(largest, default=0) >= parameters.modulus:
        raise ValueError(f"an integer has a magnitude above {parameters.half}, so it is no centred residue")


def from_centred(x: Centred, parameters: ParameterSet) -> Residues:
    """Residues of centred integers.

    Raises:
        ValueError: an integer has a magnitude above (q-1)/2. Under a mask it would not be hidden.
    """
    require_centred(x, parameters)
    return _elementwise(_from_centred, parameters, x, np.empty(x.shape, np.uint32))


def hide(x: Centred, masks: Sequence[Residues], parameters: ParameterSet, out: Residues) -> bool:
    """out = x + the masks mod q, in this thread, for matrices of the same shape and one mask or more.

    Returns:
        Whether all integers are centred residues. If not, ``out`` must not be used: see `require_centred`.
    """
    largest = hide_rows(x, masks[0], parameters.q, out)
    for mask in masks[1:]:
        add_rows(out, mask, parameters.q, out)
    return bool(largest < parameters.modulus)


def centre(x: Residues, parameters: ParameterSet) -> Centred:
    """The representatives of smallest magnitude."""
    return _elementwise(_centre, parameters, x, np.empty(x.shape, np.int32))


def require_residues(x: Residues, parameters: ParameterSet, what: str) -> None:
    """Refuses words that are not residues.

    A word y + q is congruent to y and would pass any check mod q, and yet corrupt the decoded
    result, so it counts as a failed check before any arithmetic.

    Raises:
        VerificationError: a word is q or larger.
    """
    if x.size and _largest(x) >= parameters.modulus:
        raise VerificationError(
            f"{what} holds a word of {parameters.modulus} or more, which is no residue mod q"
        )
