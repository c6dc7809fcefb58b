"""What the lattice tests compare with: definitions, written out in big integers and nothing else."""

import threading
from functools import cache

import numpy as np
import torch

from blindtune.protocol.expansion import KEY_BYTES, derive_key, expand
from blindtune.protocol.lattice.hint import hint_request, pack_rows, packed_shape
from blindtune.protocol.lattice.noise import centred_binomial
from blindtune.protocol.lattice.parameters import DEGREE, LatticeParameters
from blindtune.protocol.lattice.transform import primitive_root
from blindtune.protocol.multiplication.methods import FloatProduct
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Product, backward_products, forward_products

HALF = (Q31.modulus - 1) // 2
EXTREMES = [0, 1, Q31.modulus - 1, HALF - 1, HALF, HALF + 1, HALF + 2, Q31.modulus - 2]
TOY = LatticeParameters(name="toy", rank=1, eta=2, security="none: a toy for tests")
PUBLIC_SEED = bytes(range(32))


class KnownRandomness:
    """The same secrets in every test, each once, and a record of them. Threads may share it."""

    def __init__(self, seed: bytes = b"tests of lattice masks") -> None:
        self._secret = derive_key(seed.ljust(KEY_BYTES, b"\0"), "randomness for tests")
        self._lock = threading.Lock()
        self.drawn: list[bytes] = []

    def __call__(self, size: int) -> bytes:
        assert size == KEY_BYTES
        with self._lock:
            self.drawn.append(derive_key(self._secret, str(len(self.drawn))))
            return self.drawn[-1]


def product(contraction: int, layer: str = "layer") -> Product:
    return forward_products([layer], contraction)[0]


def backward(outputs: int, layer: str = "layer") -> Product:
    return backward_products([(layer, outputs)])[0]


class Worker:
    """One layer in this process, and the hints that it computes."""

    def __init__(self, integers: np.ndarray, layer: str = "layer") -> None:
        self.integers = integers
        layers = {layer: torch.from_numpy(np.ascontiguousarray(integers, np.int8))}
        self._multiplier = Multiplier(layers, FloatProduct(Q31, torch.device("cpu")))

    def multiply(self, which: Product, residues: np.ndarray) -> np.ndarray:
        return self._multiplier.multiply(which, residues, Q31)

    def hint(self, parameters: LatticeParameters, which: Product, seed: bytes = PUBLIC_SEED) -> np.ndarray:
        packed = np.empty(packed_shape(parameters, self._multiplier.outputs(which)), np.int32)
        for row in range(0, parameters.dimension, DEGREE):
            share = hint_request(Q31, seed, which, row, DEGREE)
            pack_rows(self.multiply(which, share.residues), packed, row, Q31)
        return packed


def centred(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x) % Q31.modulus
    return np.where(x > HALF, x - Q31.modulus, x)


@cache
def _evaluation() -> np.ndarray:
    """The matrix of the transform: powers of psi, in Python integers [256, 256]."""
    powers = [pow(primitive_root(Q31), k, Q31.modulus) for k in range(2 * DEGREE)]
    exponents = [2 * int(f"{j:08b}"[::-1], 2) + 1 for j in range(DEGREE)]
    rows = [[powers[e * i % (2 * DEGREE)] for i in range(DEGREE)] for e in exponents]
    return np.array(rows, object)


def evaluate(coefficients: np.ndarray) -> np.ndarray:
    """The transform by its definition: coefficients [256, any] at the odd powers of psi."""
    return (_evaluation() @ coefficients.astype(object)) % Q31.modulus


@cache
def _interpolation() -> np.ndarray:
    """The inverse of `_evaluation`: inverse powers, transposed, over 256."""
    powers = [pow(primitive_root(Q31), -k, Q31.modulus) for k in range(2 * DEGREE)]
    exponents = [2 * int(f"{j:08b}"[::-1], 2) + 1 for j in range(DEGREE)]
    rows = [[powers[e * i % (2 * DEGREE)] for e in exponents] for i in range(DEGREE)]
    return np.array(rows, object) * pow(DEGREE, -1, Q31.modulus) % Q31.modulus


def interpolate(values: np.ndarray) -> np.ndarray:
    """The inverse of `evaluate`."""
    return (_interpolation() @ (values.astype(object) % Q31.modulus)) % Q31.modulus


def schoolbook(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a b in Z_q[X] / (X^256 + 1), in Python integers."""
    full = np.convolve(a.astype(object), b.astype(object))
    full = np.concatenate([full, [0]])
    return (full[:DEGREE] - full[DEGREE:]) % Q31.modulus


def by_fft(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a b in Z_q[X] / (X^256 + 1) by floating-point FFTs of 8-bit limbs: no root of unity mod q.

    Sums of 256 products of 8-bit numbers are below 2^24, where double precision rounds right.
    """
    a, b = a.astype(np.int64) % Q31.modulus, b.astype(np.int64) % Q31.modulus
    result = np.zeros(DEGREE, object)
    for i in range(4):
        for k in range(4):
            x, y = (a >> (8 * i)) & 255, (b >> (8 * k)) & 255
            full = np.fft.irfft(np.fft.rfft(x, 2 * DEGREE) * np.fft.rfft(y, 2 * DEGREE), 2 * DEGREE)
            limb = np.rint(full).astype(np.int64)
            result += (limb[:DEGREE] - limb[DEGREE:]).astype(object) << (8 * (i + k))
    return result % Q31.modulus


def secrets_of(
    parameters: LatticeParameters, which: Product, secret: bytes, columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """S [rank, 256] and E [256, columns] of the block that has this secret."""
    label = ("lattice", parameters.name, which.label)
    s = centred_binomial(derive_key(secret, *label, "S"), 0, parameters.rank, DEGREE, parameters.eta)
    e = centred_binomial(derive_key(secret, *label, "E"), 0, DEGREE, columns, parameters.eta)
    return s.astype(np.int64), e.astype(np.int64)


def block_of_masks(
    parameters: LatticeParameters, which: Product, secret: bytes, seed: bytes = PUBLIC_SEED
) -> np.ndarray:
    """R = A S + E, uint32 [256, contraction], from the definition."""
    columns = which.contraction
    s, e = secrets_of(parameters, which, secret, columns)
    a = expand(seed, 0, parameters.dimension, columns, Q31).reshape(parameters.rank, DEGREE, columns)
    values = sum(a[rank].astype(object) * evaluate(s[rank][:, None]) for rank in range(parameters.rank))
    return ((interpolate(values) + e) % Q31.modulus).astype(np.uint32)
