"""Attacks on LWE,  b = a s + e mod q:  linear algebra where there is no noise, else lattice reduction.

The primal attack (Kannan 1987; Albrecht, Göpfert, Virdia, Wunderer 2017) looks for the unusually short
vector (e, -s, 1) among the integer combinations of the rows of

    q I    0    0
    a^T    I    0
    b      0    1         since  e = b - a s  mod q
"""

from concurrent.futures import Executor
from math import log, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sympy import GF
from sympy.polys.matrices import DomainMatrix

from support.toy_lattice import centred, evaluate, interpolate

__all__ = ["LLL_DELTA", "primal_attack", "reduced", "ring_elimination", "samples_for", "solve"]

LLL_DELTA = 1.0219
"""Root Hermite factor of LLL on average (Nguyen, Stehlé 2006)."""

Integers = NDArray[Any]


def solve(a: Integers, b: Integers, q: int) -> Integers:
    """The x with a x = b mod q, by Gaussian elimination: a [n, n] invertible, b [n]."""
    field = GF(q, symmetric=False)
    left = DomainMatrix([[field(int(x)) for x in row] for row in a], a.shape, field)
    right = DomainMatrix([[field(int(x))] for x in b], (len(b), 1), field)
    return np.array([int(x) for x in left.lu_solve(right).to_list_flat()], object)


def ring_elimination(a: Integers, r: Integers, q: int) -> NDArray[np.int64]:
    """The S with A S = R in Z_q[X] / (X^n + 1), one small system for each point of the transform.

    Args:
        a: k columns of A in the transform domain, [k, n, k].
        r: the same columns of R, coefficients, [n, k].

    Returns:
        [k, n], centred.
    """
    values = evaluate(r, q)
    s = np.stack([solve(a[:, j].T, values[j], q) for j in range(len(r))])
    return centred(interpolate(s, q), q).T


def samples_for(n: int, q: int, delta: float = LLL_DELTA) -> int:
    """m for which reduction with root Hermite factor delta makes the shortest basis vectors."""
    return round(sqrt(n * log(q) / log(delta))) - n


def reduced(basis: list[list[int]], block_size: int) -> list[list[int]]:
    """LLL, and BKZ after it for a block size above 2. To be run in a process of its own.

    cysignals, on which fpylll rests, takes over the signal handlers of its process.
    """
    from fpylll import BKZ, LLL, IntegerMatrix

    matrix = IntegerMatrix.from_matrix(basis)
    LLL.reduction(matrix)
    if block_size > 2:
        BKZ.reduction(matrix, BKZ.Param(block_size, flags=BKZ.AUTO_ABORT))
    return [list(row) for row in matrix]


def primal_attack(
    process: Executor, a: Integers, b: Integers, q: int, eta: int, block_size: int = 2
) -> NDArray[np.int64] | None:
    """The secret, if lattice reduction uncovers it.

    Args:
        process: runs the reduction.
        a: [m, n].
        b: [m].
        q: the modulus.
        eta: largest magnitude of s and e, by which an attacker knows them.
        block_size: of BKZ; 2 is LLL alone.

    Returns:
        s, [n], or None if no vector of the reduced basis has the form (e, -s, 1).
    """
    m, n = a.shape
    basis = np.zeros((m + n + 1, m + n + 1), object)
    basis[:m, :m] = q * np.eye(m, dtype=int)
    basis[m:-1, :m], basis[m:-1, m:-1] = a.T, np.eye(n, dtype=int)
    basis[-1, :m], basis[-1, -1] = b, 1
    for vector in np.array(process.submit(reduced, basis.tolist(), block_size).result(), object):
        if abs(vector[-1]) == 1 and np.abs(vector).max() <= max(eta, 1):
            return -(vector[m:-1] * vector[-1]).astype(np.int64)
    return None
