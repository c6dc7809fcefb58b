"""Lattice masks of any degree and modulus, small enough to be broken.

    R = A S + E    over  Z_q[X] / (X^n + 1),      C = X + R,      q = 1 mod 2n

The product's kernels are compiled for n = 256 and one modulus. This is the same mask from the same
definitions, with n and q as parameters: the rejection sampling of `protocol.expansion`, the layout of A in
the transform domain of `protocol.lattice.hint`, the noise sampler itself, the labels of its keys. With the
product's n and q it gives the product's words.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray
from sympy import primitive_root

from blindtune.protocol.expansion import derive_key
from blindtune.protocol.lattice.noise import centred_binomial
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Product

__all__ = ["ToyBlock", "ToyLattice", "centred", "evaluate", "interpolate", "uniform"]

Integers = NDArray[Any]
"""Python integers or int64: products of two 31-bit residues summed would overflow the latter."""


def centred(x: Integers, q: int) -> NDArray[np.int64]:
    """The representatives of least magnitude."""
    x = np.asarray(x % q, np.int64)
    return np.where(x > q // 2, x - q, x)


def uniform(key: bytes, rows: int, columns: int, q: int) -> NDArray[np.int64]:
    """The expansion of a key, of rows 0, 1, ...: the first word below q among those of all streams.

    A word keeps as many bits as q has, so that at least half of them are below q.
    """
    mask = np.uint32((1 << q.bit_length()) - 1)
    out = np.empty((rows, columns), np.uint32)
    for row in range(rows):
        missing, stream = np.arange(columns), 0
        while missing.size:
            nonce = bytes(4) + stream.to_bytes(4, "little") + row.to_bytes(8, "little")
            encryptor = Cipher(ChaCha20(key, nonce), mode=None).encryptor()
            words = np.frombuffer(encryptor.update(bytes(4 * columns)), "<u4") & mask
            out[row, missing] = words[missing]
            missing, stream = missing[words[missing] >= q], stream + 1
    return out.astype(np.int64)


@cache
def _evaluation(n: int, q: int) -> Integers:
    """From coefficients to values at psi^(2 brv(j) + 1), in the order of j: [n, n]."""
    bits = n.bit_length() - 1
    psi = pow(primitive_root(q), (q - 1) // (2 * n), q)
    powers = [pow(psi, k, q) for k in range(2 * n)]
    exponents = [2 * int(f"{j:0{bits}b}"[::-1], 2) + 1 for j in range(n)]
    return np.array([[powers[e * i % (2 * n)] for i in range(n)] for e in exponents], object)


@cache
def _interpolation(n: int, q: int) -> Integers:
    """The inverse of `_evaluation`: inverse powers, transposed, over n."""
    inverses = [[pow(int(x), -1, q) for x in row] for row in _evaluation(n, q).T]
    return np.array(inverses, object) * pow(n, -1, q) % q


def evaluate(coefficients: Integers, q: int) -> Integers:
    """The transform, by its definition: [n, any] to [n, any]."""
    return _evaluation(len(coefficients), q) @ coefficients.astype(object) % q


def interpolate(values: Integers, q: int) -> Integers:
    """The inverse of `evaluate`."""
    return _interpolation(len(values), q) @ values.astype(object) % q


@dataclass(frozen=True)
class ToyBlock:
    """One block of masks.

    Attributes:
        lwe: A as a plain LWE matrix, [columns, degree, rank degree]: times S, flattened, it gives A S.
        s: the secret, [rank degree].
        e: the noise, [degree, columns].
    """

    lwe: Integers
    s: NDArray[np.int64]
    e: NDArray[np.int64]

    def masked(self, operand: NDArray[np.int64], q: int) -> NDArray[np.int64]:
        """C = X + A S + E mod q, [degree, columns]."""
        product = (self.lwe @ self.s.astype(object)).T
        return np.asarray((operand + product + self.e) % q, np.int64)


@dataclass(frozen=True)
class ToyLattice:
    """Parameters of a lattice that may be weak.

    Attributes:
        degree: n, a power of two with q = 1 mod 2n.
        rank: k; the dimension of LWE is n k.
        eta: parameter of the noise.
        modulus: q, a prime.
        name: goes into the labels of keys, as a parameter set's does.
    """

    degree: int
    rank: int
    eta: int
    modulus: int = Q31.modulus
    name: str = "toy"

    def __post_init__(self) -> None:
        if (self.modulus - 1) % (2 * self.degree):
            raise ValueError(f"{self.modulus} is not 1 mod {2 * self.degree}")

    @property
    def dimension(self) -> int:
        return self.degree * self.rank

    def public_matrix(self, seed: bytes, columns: int) -> Integers:
        """Coefficients of A: [rank, degree, columns]."""
        values = uniform(seed, self.dimension, columns, self.modulus)
        values = values.reshape(self.rank, self.degree, columns)
        return np.stack([interpolate(x, self.modulus) for x in values])

    def lwe_matrix(self, coefficients: Integers) -> Integers:
        """A as `ToyBlock.lwe`, whose rows are made of the products of A's polynomials with 1, X, X^2, ..."""
        n = self.degree
        t, u = np.indices((n, n))
        rotations = np.where(t >= u, 1, -1) * np.moveaxis(coefficients[:, (t - u) % n], -1, 0)
        return rotations.transpose(0, 2, 1, 3).reshape(-1, n, self.dimension) % self.modulus

    def block(self, public_seed: bytes, product: Product, secret: bytes) -> ToyBlock:
        """The block that the product's mask source would make of these seeds.

        Args:
            public_seed: 32 bytes, of A.
            product: its contraction is the number of columns.
            secret: 32 bytes, of S and E.
        """
        label, columns = ("lattice", self.name, product.label), product.contraction
        s = centred_binomial(derive_key(secret, *label, "S"), 0, self.rank, self.degree, self.eta)
        e = centred_binomial(derive_key(secret, *label, "E"), 0, self.degree, columns, self.eta)
        lwe = self.lwe_matrix(self.public_matrix(public_seed, columns))
        return ToyBlock(lwe, s.reshape(-1).astype(np.int64), e.astype(np.int64))
