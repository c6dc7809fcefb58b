"""The kernels for NVIDIA GPUs in Triton's interpreter, on the processor: run with TRITON_INTERPRET=1.

Everything is compared bit for bit with the host's code or with Python's integers. The interpreter takes a
fraction of a second for each tile, so that operands are small.
"""

import numpy as np
import torch

from blindtune.protocol.expansion import Seed
from blindtune.protocol.multiplication import cuda_product
from blindtune.protocol.multiplication.cuda_product import TritonInt8Product
from blindtune.protocol.multiplication.exactness import expand_on_host_unless_exact
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.operands import SeededRows
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import backward_products, forward_products

CPU = torch.device("cpu")
HALF = (Q31.modulus - 1) // 2
METHOD = TritonInt8Product(Q31, CPU)
KEY = np.random.default_rng(1).bytes(32)


def _exact_int_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    assert a.shape[0] > 16 and not a.shape[0] % 8 and not a.shape[1] % 8 and not b.shape[1] % 8
    return (a.double() @ b.double()).to(torch.int32)


def check_split() -> None:
    """Limbs are balanced digits, for residues around every carry, with zeros as padding."""
    edges = [k * 2**shift for shift in (7, 8, 15, 16, 23, 24, 30) for k in (-1, 1)] + [0, -HALF, HALF]
    centred = np.array([e + d for e in edges for d in range(-130, 131) if abs(e + d) <= HALF], np.int64)
    centred = np.stack([centred, centred[::-1], np.roll(centred, 7)])[:, :-3]
    limbs, rows = METHOD.prepare((centred % Q31.modulus).astype(np.uint32))
    digits = limbs.numpy().astype(np.int64).reshape(4, 8, -1)
    assert rows == 3 and not digits[:, 3:].any() and not digits[:, :, centred.shape[1] :].any()
    sums = sum(digits[k, :3, : centred.shape[1]] << (8 * k) for k in range(4))
    assert np.array_equal(sums, centred)


def check_recombination() -> None:
    """Sums near multiples of q, and the largest and smallest that there can be, are reduced exactly."""
    generator = np.random.default_rng(2)
    near = generator.integers(-(2**21) + 8, 2**21 - 8, 3000) * Q31.modulus + generator.integers(
        -300, 301, 3000
    )
    sums = np.empty((4, 3, 1000), np.int64)
    rest = near.reshape(3, 1000)
    for k in range(3):
        sums[k] = ((rest + 128) & 255) - 128
        rest = (rest - sums[k]) >> 8
    sums[3] = rest
    extreme = 128 * 127 * 32768
    sums[:, 0, :8] = [[extreme, -extreme] * 4, [extreme] * 8, [-extreme] * 8, [extreme, -extreme] * 4]
    expected = sum(sums[k] << (8 * k) for k in range(4)) % Q31.modulus
    padded = np.zeros((4, 8, 1008), np.int32)
    padded[:, :3, :1000] = sums
    out = torch.full((3, 1000), -1, dtype=torch.int32)
    cuda_product._recombine[(3, 1)](
        torch.from_numpy(padded).reshape(32, 1008), out, 1000, 1008, 8 * 1008, Q31.modulus, 1024
    )
    assert np.array_equal(out.numpy(), expected)


def check_expansion() -> None:
    """Limbs of a seed's rows are those of its expansion: odd shapes, and parts that begin anywhere."""
    for rows, columns, row, first in (
        (1, 1, 0, 0),
        (1, 8, 2**31, 16),
        (3, 9, 2**32 - 1, 3),
        (2, 513, 2**40 + 2**31 + 3, 0),
        (1, 530, 2**62 + 12345, 1013),
        (9, 16, 2**63 - 9, 15),
        (1, 5, 17, 2_000_003),
        (1, 512, 3, 15),
    ):
        operand = SeededRows(Seed(KEY, Q31, row), rows, columns, first)
        limbs, counted = METHOD.expand(operand)
        expected, _ = METHOD.prepare(operand.residues())
        assert counted == rows and torch.equal(limbs, expected), (rows, columns, row, first)


def check_probes() -> None:
    """Words that are rejected once and twice, q, and q - 1."""
    said: list[str] = []
    expand_on_host_unless_exact(METHOD, CPU, said.append)
    assert METHOD.expand is not None and not said, said


def check_products() -> None:
    """Products of seeds with layers side by side and on top of each other."""
    generator = np.random.default_rng(3)
    layers = {
        name: generator.integers(-127, 128, shape, dtype=np.int8)
        for name, shape in {"a": (21, 40), "b": (10, 40)}.items()
    }
    held = Multiplier({name: torch.from_numpy(w) for name, w in layers.items()}, METHOD)
    stack = np.concatenate(list(layers.values()))
    for product, matrix in (
        (forward_products(["a", "b"], 40)[0], stack.T),
        (backward_products([("a", 21), ("b", 10)])[0], stack),
    ):
        operand = SeededRows(Seed(KEY, Q31, 2**35 + 1), 3, product.contraction)
        expected = (operand.residues().astype(object) @ matrix.astype(object)) % Q31.modulus
        assert np.array_equal(held.multiply(product, operand, Q31), expected)


if __name__ == "__main__":
    torch._int_mm = _exact_int_mm  # a processor without VNNI has none
    for check in (check_split, check_recombination, check_expansion, check_probes, check_products):
        check()
        print(check.__name__, flush=True)
