"""Linear algebra over Z_q, for attacks on masks that are uniform word by word and yet of low rank."""

import numpy as np
from numpy.typing import NDArray

from blindtune.protocol.residues import Residues

__all__ = ["combine", "outside", "row_space"]

Integers = NDArray[np.int64]


def row_space(matrix: Residues, q: int) -> tuple[Integers, list[int]]:
    """A basis of the rows' span, in reduced echelon form.

    Args:
        matrix: uint32 [m, d].
        q: the modulus.

    Returns:
        int64 [rank, d], and the column of each row's leading 1.
    """
    rest = matrix.astype(np.int64)
    pivots: list[int] = []
    for column in range(rest.shape[1]):
        rank = len(pivots)
        if rank == len(rest):
            break
        candidates = np.flatnonzero(rest[rank:, column])
        if not candidates.size:
            continue
        rest[[rank, rank + candidates[0]]] = rest[[rank + candidates[0], rank]]
        rest[rank] = rest[rank] * pow(int(rest[rank, column]), -1, q) % q
        factors = rest[:, column].copy()
        factors[rank] = 0
        # Terms are below 2^62.
        rest = (rest - factors[:, None] * rest[rank]) % q
        pivots.append(column)
    return rest[: len(pivots)], pivots


def outside(rows: Integers, basis: Integers, pivots: list[int], q: int) -> Integers:
    """What is left of rows once their part in a span is taken away; zero for rows of the span.

    Args:
        rows: int64 [n, d], any representatives.
        basis, pivots: from `row_space`.
        q: the modulus.
    """
    rest = rows % q
    for vector, pivot in zip(basis, pivots, strict=True):
        rest = (rest - rest[:, pivot : pivot + 1] * vector) % q
    return rest


def combine(coefficients: Residues, basis: Residues, q: int) -> Residues:
    """coefficients . basis mod q, for matrices of any residues."""
    total = np.zeros((len(coefficients), basis.shape[1]), np.int64)
    for column, vector in zip(coefficients.T.astype(np.int64), basis.astype(np.int64), strict=True):
        total = (total + column[:, None] * vector % q) % q
    return total.astype(np.uint32)
