"""The product in tile registers or vectors, beyond what every method is tested for: sums, edges, memory."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from blindtune.protocol.kernels.compiled import kernel
from blindtune.protocol.kernels.dot_products import have_dot_products, multiply_rows, start_sums
from blindtune.protocol.kernels.tiles import are_usable
from blindtune.protocol.kernels.vectors import store
from blindtune.protocol.multiplication import exactness, tile_product
from blindtune.protocol.multiplication.exactness import exact_method, int8_methods
from blindtune.protocol.multiplication.methods import Int8Product
from blindtune.protocol.multiplication.tile_product import (
    TileProduct,
    VectorProduct,
    _residues_of_sums,
    _split,
)
from blindtune.protocol.parameters import PARAMETER_SETS, Q31, ParameterSet

EACH_SET = pytest.mark.parametrize("parameters", PARAMETER_SETS.values(), ids=PARAMETER_SETS)
MOST = 32 * 64 * 128 * 127  # of a sum's magnitude
needs_tiles = pytest.mark.skipif(not are_usable(), reason="this processor has no int8 tiles")
needs_vectors = pytest.mark.skipif(not have_dot_products(), reason="this processor has no AVX-512 VNNI")
Kind = type[TileProduct | VectorProduct]
EACH_KIND = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(TileProduct, marks=needs_tiles, id="tiles"),
        pytest.param(VectorProduct, marks=needs_vectors, id="vectors"),
    ],
)


@kernel
def residues(sums, numbers, factor, q, out):  # type: ignore[no-untyped-def]
    for i in range(0, out.shape[0], 16):
        store(out, i, _residues_of_sums(sums, 2 * i * len(numbers), numbers, factor, q))


def assert_reduced(sums: np.ndarray, parameters: ParameterSet) -> None:
    limbs, out = parameters.limbs, np.empty(sums.shape[1], np.uint32)
    # Of sixteen columns, each limb's sums lie two tiles behind the one before.
    apart = np.zeros((len(out) // 16, limbs, 2, 16, 16), np.int32)
    apart[:, :, 0, 0] = sums.reshape(limbs, -1, 16).transpose(1, 0, 2)
    numbers, factor = tuple(range(limbs)), np.float32(256.0 ** (limbs - 1) / parameters.modulus)
    for some, to in zip(apart, out.reshape(-1, 16), strict=True):
        residues(some.reshape(-1), numbers, factor, parameters.q, to)
    total = sum(sums[k].astype(np.int64) << (8 * k) for k in range(limbs))
    assert np.array_equal(out, total % parameters.modulus)


@EACH_SET
def test_random_and_extreme_sums_are_reduced_exactly(parameters: ParameterSet) -> None:
    generator, shape = np.random.default_rng(1), (parameters.limbs, 1 << 15)
    assert_reduced(generator.integers(-MOST, MOST + 1, shape), parameters)
    extremes = [-MOST, 1 - MOST, -1, 0, 1, 255, 256, MOST - 1, MOST]
    assert_reduced(generator.choice(extremes, shape), parameters)


@EACH_SET
@pytest.mark.parametrize("halves", [0, 1, -1], ids=["multiple of q", "half more", "half less"])
def test_sums_near_multiples_of_q_and_halfway_between_are_reduced_exactly(
    halves: int, parameters: ParameterSet
) -> None:
    generator = np.random.default_rng(2)
    # Lower sums are as large as they may be; the rest of the value, if it can be had, is the highest one.
    most = MOST * 256 ** (parameters.limbs - 1) // parameters.modulus // 2
    multiples = generator.integers(-most, most, 1 << 15) * parameters.modulus + halves * parameters.half
    multiples += generator.integers(-300, 301, len(multiples))
    sums = np.empty((parameters.limbs, len(multiples)), np.int64)
    rest = multiples
    for k in range(parameters.limbs - 1):
        digit = rest & 255
        sums[k] = digit + 256 * generator.integers(-(MOST >> 8) + 1, (MOST >> 8) - 1, len(rest))
        rest = (rest - sums[k]) >> 8
    sums[-1] = rest
    assert (np.abs(sums) <= MOST).all()
    assert_reduced(sums, parameters)


@EACH_SET
@pytest.mark.parametrize("kind", [TileProduct, VectorProduct])
def test_limbs_are_the_balanced_digits_of_residues_around_every_carry(
    parameters: ParameterSet, kind: Kind
) -> None:
    q, most = parameters.modulus, parameters.limbs
    edges = [k * 2**shift for shift in (7, 8, 15, 16, 22, 23, 24, 30) for k in (-1, 1)]
    edges += [0, parameters.half, parameters.half + 1, parameters.lift, parameters.lift - q]
    found = np.array([(e + d) % q for e in edges for d in range(-300, 301)], np.int64)
    lifted = np.where(found > parameters.lift, found - q, found)
    steps = -(-len(found) // 64)
    tiles = np.full((1, steps, most, 16, 64), 99, np.int8)
    numbers, lift, flip = tuple(range(most)), np.uint32(parameters.lift), np.uint32(kind.flip)
    flat = tiles.reshape(1, steps, -1)
    _split(found.astype(np.uint32)[None], len(found), numbers, lift, parameters.q, flip, flat, 0, 1)
    limbs = tiles[0].transpose(1, 2, 0, 3).reshape(most, 16, -1)
    if kind is VectorProduct:  # limbs plus 128, without a sign
        limbs = limbs.view(np.uint8).astype(np.int64) - 128
    total = sum(limbs[k].astype(np.int64) << (8 * k) for k in range(most))
    assert np.array_equal(total[0, : len(found)], lifted)
    assert not limbs[:, 1:].any() and not limbs[:, :, len(found) :].any()


@EACH_KIND
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("adding", [False, True])
def test_only_the_products_columns_are_written(adding: bool, transposed: bool, kind: Kind) -> None:
    generator = np.random.default_rng(3)
    method = kind(Q31)
    for rows, contraction, outputs, column in (
        (1, 1, 1, 0),
        (17, 65, 33, 5),
        (33, 2100, 530, 16),
        (64, 64, 32, 1),
    ):
        operand = generator.integers(0, Q31.modulus, (rows, contraction), dtype=np.uint32)
        shape = (outputs, contraction) if transposed else (contraction, outputs)
        stored = torch.from_numpy(generator.integers(-127, 128, shape, dtype=np.int8))
        matrix = stored.t() if transposed else stored
        out = generator.integers(0, Q31.modulus, (rows, column + outputs + 19), dtype=np.uint32)
        expected = out.copy()
        product = operand.astype(np.int64) @ matrix.numpy().astype(np.int64)  # below 2^31 * 2^7 * 2^12
        before = out[:, column : column + outputs].astype(np.int64) if adding else 0
        expected[:, column : column + outputs] = (product + before) % Q31.modulus
        method.multiply_into(out, column, method.prepare(operand), matrix, adding=adding)
        assert np.array_equal(out, expected), (rows, contraction, outputs)


@EACH_KIND
@EACH_SET
def test_groups_of_columns_are_exact_with_any_number_of_threads(parameters: ParameterSet, kind: Kind) -> None:
    generator = np.random.default_rng(4)
    operand = generator.integers(0, parameters.modulus, (200, 130), dtype=np.uint32)
    matrix = torch.from_numpy(generator.integers(-127, 128, (130, 1111), dtype=np.int8))
    expected = operand.astype(np.int64) @ matrix.numpy().astype(np.int64) % parameters.modulus
    method, before = kind(parameters), torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 20, 100):
            torch.set_num_threads(threads)
            assert np.array_equal(method.multiply(method.prepare(operand), matrix), expected)
    finally:
        torch.set_num_threads(before)


AT_THE_END = """
import ctypes, mmap
import numpy as np, torch
from blindtune.protocol.parameters import Q31
from blindtune.protocol.multiplication.exactness import int8_methods

libc = ctypes.CDLL(None, use_errno=True)
kept = []

def at_the_end(array, gap=0, pages=64):
    # A copy whose last byte is the last one that may be touched; between its rows are so many elements more.
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    start = np.frombuffer(memory, np.uint8)
    end = pages * mmap.PAGESIZE
    assert not libc.mprotect(ctypes.c_void_p(start.ctypes.data + end), mmap.PAGESIZE, 0)
    rows, columns = array.shape
    pitch = columns + gap
    flat = start[end - ((rows - 1) * pitch + columns) * array.itemsize : end].view(array.dtype)
    strides = pitch * array.itemsize, array.itemsize
    copy = np.lib.stride_tricks.as_strided(flat, array.shape, strides)
    copy[:] = array
    kept.append((memory, start))
    return copy

generator = np.random.default_rng(5)
*methods, library = int8_methods(Q31, torch.device("cpu"))
SHAPES = (1, 1, 1), (3, 63, 17), (16, 64, 32), (17, 65, 31), (5, 130, 47), (2, 4, 16)
for rows, contraction, outputs in SHAPES:
    plain = generator.integers(0, Q31.modulus, (rows, contraction), dtype=np.uint32)
    for shape in ((contraction, outputs), (outputs, contraction)):
        weights = generator.integers(-127, 128, shape, dtype=np.int8)
        for gap in (0, 70):
            operand = at_the_end(plain, gap=gap // 14)
            stored = torch.from_numpy(at_the_end(weights, gap=gap))
            matrix = stored if shape[0] == contraction else stored.t()
            expected = (operand.astype(object) @ matrix.numpy().astype(object)) % Q31.modulus
            for method in methods:
                out = at_the_end(np.zeros((rows, outputs), np.uint32))
                method.multiply_into(out, 0, method.prepare(operand), matrix)
                assert np.array_equal(out, expected), (method.name, rows, contraction, outputs, gap)
print("nothing beyond the end was touched")
"""


@needs_vectors
def test_nothing_beyond_the_end_of_an_array_is_read_or_written() -> None:
    run = subprocess.run(
        [sys.executable, "-c", AT_THE_END], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.stdout.strip() == "nothing beyond the end was touched", run.stderr or run.returncode


@needs_vectors
def test_where_tiles_are_not_usable_vectors_multiply_and_else_the_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (exactness, tile_product):
        monkeypatch.setattr(module, "are_usable", lambda: False)
    assert [type(x) for x in int8_methods(Q31, torch.device("cpu"))] == [VectorProduct, Int8Product]
    assert exact_method([64], Q31, "cpu").name == "int8-vnni"
    with pytest.raises(RuntimeError, match="no int8 tiles"):
        TileProduct(Q31)
    for module in (exactness, tile_product):
        monkeypatch.setattr(module, "have_dot_products", lambda: False)
    assert [type(x) for x in int8_methods(Q31, torch.device("cpu"))] == [Int8Product]
    with pytest.raises(RuntimeError, match="no AVX-512 VNNI"):
        VectorProduct(Q31)


@needs_tiles
def test_where_tiles_are_usable_they_come_first() -> None:
    expected = [TileProduct, VectorProduct, Int8Product]
    assert [type(x) for x in int8_methods(Q31, torch.device("cpu"))] == expected


ANOTHER_PROCESSOR = """
from blindtune.protocol.multiplication.exactness import exact_method
from blindtune.protocol.parameters import PARAMETER_SETS
print([exact_method([130], x, "cpu", print).name for x in PARAMETER_SETS.values()])
"""


@needs_vectors
def test_vectors_multiply_where_the_compiler_knows_no_tiles() -> None:
    # It would end the process, were an instruction of tiles left in what it compiles.
    processor = {
        "NUMBA_CPU_NAME": "cascadelake",
        "NUMBA_CPU_FEATURES": "+avx512f,+avx512bw,+avx512vl,+avx512vnni",
    }
    run = subprocess.run(
        [sys.executable, "-c", ANOTHER_PROCESSOR],
        env=os.environ | processor, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.stdout.strip() == str(["int8-vnni"] * len(PARAMETER_SETS)), run.stderr or run.returncode


@kernel
def one_step(limbs, packed, starts, sums):  # type: ignore[no-untyped-def]
    start_sums(packed, 0, 1, starts, 0)
    multiply_rows(limbs, 0, (0, 1, 2), (0, 1), packed, 0, 1, sums, 0)


@needs_vectors
@pytest.mark.parametrize("weight", [127, -127])
def test_sums_wrap_around_and_do_not_saturate(weight: int) -> None:
    limbs, packed = np.full(3 * 1024, -1, np.int8), np.full(2 * 1024, weight, np.int8)  # 255 without a sign
    before = np.full(3 * 2 * 256, 2**31 - 1 if weight > 0 else -(2**31), np.int32)
    sums, starts = before.copy(), np.empty(32, np.int32)
    one_step(limbs, packed.view(np.uint32), starts, sums)
    rows = sums.reshape(6, 16, 16)
    assert np.array_equal(rows[:, 2:], before.reshape(6, 16, 16)[:, 2:])
    expected = np.array(int(before[0]) + 64 * 255 * weight).astype(np.uint32).astype(np.int32)
    assert (rows[:, :2] == expected).all()
    assert (starts == -128 * 64 * weight).all()


def test_tiles_are_not_used_where_the_compiler_was_told_of_another_processor() -> None:
    features = {"NUMBA_CPU_FEATURES": "+amx-tile,+avx512f,+avx512bw"}
    program = "from blindtune.protocol.kernels.tiles import are_usable; print(are_usable())"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | features, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert run.stdout.strip() == "False"


def test_tiles_are_not_used_where_the_system_refuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False, raising=False)
    assert not are_usable()
    monkeypatch.delattr(torch.cpu, "_init_amx")
    assert not are_usable()


@needs_tiles
def test_a_compiler_that_fails_leaves_the_product_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: TileProduct, operand: np.ndarray) -> None:
        raise LookupError("no such instruction\nand a long report")

    said: list[str] = []
    monkeypatch.setattr(TileProduct, "prepare", fails)
    assert exact_method([64], Q31, "cpu", said.append).name in ("int8-vnni", "int8", "float64")
    assert "int8-amx" in said[0] and "no such instruction" in said[0] and "report" not in said[0]


@EACH_KIND
def test_operands_matrices_and_results_that_do_not_fit_are_refused(kind: Kind) -> None:
    method = kind(Q31)
    prepared, matrix = method.prepare(np.zeros((3, 63), np.uint32)), torch.zeros((63, 32), dtype=torch.int8)
    method.multiply_into(np.zeros((3, 40), np.uint32), 8, prepared, matrix)
    with pytest.raises(ValueError, match="63 columns by a matrix of 64 rows"):
        method.multiply(prepared, torch.zeros((64, 32), dtype=torch.int8))
    for out, column in (
        (np.zeros((3, 40), np.uint32), 9),
        (np.zeros((2, 40), np.uint32), 0),
        (np.zeros((3, 80), np.uint32)[:, :40], 0),
    ):
        with pytest.raises(ValueError, match="no room for 3 rows of 32 columns"):
            method.multiply_into(out, column, prepared, matrix)
