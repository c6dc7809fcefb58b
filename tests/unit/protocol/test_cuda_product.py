"""The kernels for NVIDIA GPUs: in Triton's interpreter, in its compiler, and on a GPU if there is one."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from blindtune.protocol.expansion import Seed
from blindtune.protocol.multiplication.exactness import exact_method
from blindtune.protocol.multiplication.methods import Method
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.operands import SeededRows
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import backward_products, forward_products

KEY = bytes(range(32))
INTERPRETED = Path(__file__).with_name("interpreted_kernels.py")
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@NEEDS_TRITON
def test_in_the_interpreter_the_kernels_agree_with_the_host_and_with_python_integers() -> None:
    run = subprocess.run(
        [sys.executable, INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(run.stdout.split()) == 5


# Sizes as they come, not known to be divisible by anything.
COMPILED = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from blindtune.protocol.multiplication import cuda_product
from blindtune.protocol.multiplication.cuda_expansion import LANES
from blindtune.protocol.parameters import Q31

integers = dict.fromkeys(["rows", "columns", "first", "padded", "plane"], "i32")
pointers = {"seed": "*i32", "x": "*i32", "sums": "*i32", "out": "*i32", "limbs": "*i8"}
constants = {"Q31.modulus": Q31.modulus, "BLOCK": 1024, "LANES": LANES}
for kernel, warps in ((cuda_product._split, 4), (cuda_product._expand, 1), (cuda_product._recombine, 4)):
    signature = {n: "constexpr" if n in constants else (integers | pointers)[n] for n in kernel.arg_names}
    source = ASTSource(kernel, signature, {n: v for n, v in constants.items() if n in signature})
    made = triton.compile(source, GPUTarget("cuda", int(sys.argv[1]), 32), {"num_warps": warps})
    assert made.asm["cubin"]
"""


@NEEDS_TRITON
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_gpus_that_are_not_there(capability: int, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", COMPILED, str(capability)],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"},
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="module")
def method() -> Iterator[Method]:
    from blindtune.protocol.multiplication.cuda_product import TritonInt8Product

    yield TritonInt8Product(Q31, torch.device("cuda"))


@pytest.mark.cuda
@NEEDS_GPU
def test_on_a_gpu_the_fused_product_and_its_expansion_are_chosen_without_a_word() -> None:
    said: list[str] = []
    chosen = exact_method([64, 576, 2053, 8192], Q31, "cuda", said.append)
    assert chosen.name == "int8-triton" and chosen.expand is not None and not said


@pytest.mark.cuda
@NEEDS_GPU
@pytest.mark.parametrize(
    ("row", "rows", "columns", "first"),
    [
        (0, 1, 1, 0),
        (74_000, 300, 4096, 0),
        (2**32 - 500, 1024, 8192, 0),
        (2**40 + 2**31 + 5, 37, 2053, 17),
        (2**63 - 1024, 1024, 576, 152_000),
        (5, 3, 32_768, 32_768),
    ],
)
def test_on_a_gpu_limbs_of_a_seed_are_those_of_its_expansion(
    method: Method, row: int, rows: int, columns: int, first: int
) -> None:
    assert method.expand is not None
    operand = SeededRows(Seed(KEY, Q31, row), rows, columns, first)
    limbs, counted = method.expand(operand)
    expected, _ = method.prepare(operand.residues())
    assert counted == rows and torch.equal(limbs, expected)


@pytest.mark.cuda
@NEEDS_GPU
def test_on_a_gpu_seeds_are_multiplied_as_their_expansion_by_threads_at_once(method: Method) -> None:
    generator = np.random.default_rng(4)
    layers = {
        name: torch.from_numpy(generator.integers(-127, 128, shape, dtype=np.int8)).cuda()
        for name, shape in {"a": (1024, 2048), "b": (250, 2048), "c": (1030, 2048)}.items()
    }
    held = Multiplier(layers, method)
    products = [
        forward_products(list(layers), 2048)[0],
        backward_products([(name, len(layer)) for name, layer in layers.items()])[0],
    ]
    operands = [
        (product, SeededRows(Seed(KEY, Q31, row), rows, product.contraction))
        for product in products
        for row, rows in ((74_100, 100), (2**33 - 600, 1500), (2**50, 1))
    ]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda asked: held.multiply(*asked, Q31), operands))
    for (product, operand), result in zip(operands, results, strict=True):
        assert np.array_equal(result, held.multiply(product, operand.residues(), Q31))
