"""operand . M mod q against Python integers, by every method, and the check that picks a method."""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blindtune.protocol.kernels.dot_products import have_dot_products
from blindtune.protocol.kernels.tiles import are_usable
from blindtune.protocol.multiplication import exactness
from blindtune.protocol.multiplication import multiplier as multiplier_module
from blindtune.protocol.multiplication.exactness import _test_operands, exact_method, is_exact
from blindtune.protocol.multiplication.layer_memory import LayerMemory
from blindtune.protocol.multiplication.methods import (
    FloatProduct,
    Int8Product,
    Method,
    TorchInt8Product,
    _recombine,
    _split,
)
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.multiplication.tile_product import TileProduct, VectorProduct
from blindtune.protocol.parameters import PARAMETER_SETS, Q31, ParameterSet
from blindtune.protocol.products import (
    MAX_CONTRACTION,
    Direction,
    Product,
    Span,
    backward_products,
    forward_products,
)

HALF = (Q31.modulus - 1) // 2
EACH_SET = pytest.mark.parametrize("parameters", PARAMETER_SETS.values(), ids=PARAMETER_SETS)
CPU = torch.device("cpu")


def _int8_product_is_exact() -> bool:
    """Whether torch's int8 product is right here, which takes VNNI instructions on x86."""
    generator = np.random.default_rng(0)
    for contraction in (64, 1000):
        a = torch.from_numpy(generator.integers(-128, 128, (40, contraction), dtype=np.int8))
        b = torch.from_numpy(generator.integers(-127, 128, (contraction, 40), dtype=np.int8))
        if not torch.equal(torch._int_mm(a, b), (a.double() @ b.double()).to(torch.int32)):
            return False
    return True


INT8_IS_EXACT = _int8_product_is_exact()
NEEDS_INT8 = pytest.mark.skipif(not INT8_IS_EXACT, reason="torch's int8 product is wrong on this processor")
METHODS = [
    pytest.param(Int8Product(Q31), id="int8", marks=NEEDS_INT8),
    pytest.param(TorchInt8Product(Q31, CPU), id="int8-torch", marks=NEEDS_INT8),
    pytest.param(FloatProduct(Q31, CPU), id="float64"),
]
if are_usable():
    METHODS.append(pytest.param(TileProduct(Q31), id="int8-amx"))
if have_dot_products():
    METHODS.append(pytest.param(VectorProduct(Q31), id="int8-vnni"))
if torch.cuda.is_available():
    from blindtune.protocol.multiplication.cuda_product import TritonInt8Product

    METHODS += [
        pytest.param(TritonInt8Product(Q31, torch.device("cuda")), id="int8-triton", marks=pytest.mark.cuda),
        pytest.param(
            TorchInt8Product(Q31, torch.device("cuda")), id="int8-torch-cuda", marks=pytest.mark.cuda
        ),
        pytest.param(FloatProduct(Q31, torch.device("cuda")), id="float64-cuda", marks=pytest.mark.cuda),
    ]
EACH_METHOD = pytest.mark.parametrize("method", METHODS)


def constant_limbs(limbs: Sequence[int]) -> int:
    """The residue whose balanced base-256 digits, lowest first, are these."""
    value = sum(digit * 256**k for k, digit in enumerate(limbs))
    assert abs(value) <= HALF
    return value % Q31.modulus


# 63 is the highest top digit, and -63 the lowest, that three full digits below leave in range; with a top
# digit of 64 or -64 the digits below must bring the value back.
EXTREMES = [
    0,
    1,
    Q31.modulus - 1,
    HALF,
    HALF + 1,
    constant_limbs([-128, -128, -128, -63]),
    constant_limbs([127, 127, 127, 63]),
    constant_limbs([127, -128, 127, -63]),
    constant_limbs([-128, 127, -128, 63]),
    constant_limbs([-128, 0, 0, 0]),
    constant_limbs([-128, -128, 0, 0]),
    constant_limbs([-128, -128, -128, 0]),
    constant_limbs([127, 127, -3, 64]),
    constant_limbs([-128, -128, 3, -64]),
]


def product_mod_q(operand: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """operand . matrix mod q in Python integers."""
    return (operand.astype(object) @ matrix.astype(object)) % Q31.modulus


def operands(rows: int, columns: int, seed: int) -> list[np.ndarray]:
    """Random residues, random extremes, and one row for each extreme."""
    generator = np.random.default_rng(seed)
    return [
        generator.integers(0, Q31.modulus, (rows, columns), dtype=np.uint32),
        generator.choice(np.array(EXTREMES, np.uint32), (rows, columns)),
        np.repeat(np.array(EXTREMES, np.uint32)[:, None], columns, axis=1),
    ]


def weights(out_features: int, in_features: int, seed: int) -> list[np.ndarray]:
    """Random weights, random extremes, and each extreme alone."""
    generator = np.random.default_rng(seed)
    shape = (out_features, in_features)
    return [
        generator.integers(-127, 128, shape, dtype=np.int8),
        generator.choice(np.array([-127, 127], np.int8), shape),
        np.full(shape, 127, np.int8),
        np.full(shape, -127, np.int8),
    ]


def matrix_of(product: Product, layers: dict[str, np.ndarray]) -> np.ndarray:
    if product.direction is Direction.FORWARD:
        return np.concatenate([layers[s.layer][:, s.start : s.stop].T for s in product.spans], axis=1)
    return np.concatenate([layers[s.layer][s.start : s.stop] for s in product.spans])


def multiplier(method: Method, layers: dict[str, np.ndarray]) -> Multiplier:
    device = getattr(method, "device", CPU)
    return Multiplier({name: torch.from_numpy(w).to(device) for name, w in layers.items()}, method)


def assert_exact(
    method: Method, layers: dict[str, np.ndarray], product: Product, operand: np.ndarray
) -> None:
    result = multiplier(method, layers).multiply(product, operand, Q31)
    assert result.dtype == np.uint32
    assert np.array_equal(result, product_mod_q(operand, matrix_of(product, layers)))


@EACH_METHOD
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 7, 5), (5, 9, 17), (4, 64, 40), (2, 130, 33)])
def test_products_of_random_and_extreme_values_are_those_of_python_integers(
    method: Method, sizes: tuple[int, int, int]
) -> None:
    rows, contraction, outputs = sizes
    for stored in weights(outputs, contraction, seed=1):
        for operand in operands(rows, contraction, seed=2):
            assert_exact(method, {"a": stored}, forward_products(["a"], contraction)[0], operand)
            transposed = {"a": np.ascontiguousarray(stored.T)}
            assert_exact(method, transposed, backward_products([("a", contraction)])[0], operand)


@EACH_METHOD
@settings(derandomize=True, deadline=None, max_examples=40)
@given(data=st.data())
def test_grouped_spans_of_any_size_are_exact_in_both_directions(method: Method, data: st.DataObject) -> None:
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rows = data.draw(st.integers(1, 40))
    shared = data.draw(st.integers(1, 70))
    widths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    layers = {
        f"layer{i}": generator.integers(-127, 128, (width, shared), dtype=np.int8)
        for i, width in enumerate(widths)
    }
    start = data.draw(st.integers(0, shared - 1))
    stop = data.draw(st.integers(start + 1, shared))
    forward = Product(Direction.FORWARD, tuple(Span(name, start, stop) for name in layers))
    spans = []
    for name, width in zip(layers, widths, strict=True):
        first = data.draw(st.integers(0, width - 1))
        spans.append(Span(name, first, data.draw(st.integers(first + 1, width))))
    backward = Product(Direction.BACKWARD, tuple(spans))
    for product in (forward, backward):
        operand = generator.integers(0, Q31.modulus, (rows, product.contraction), dtype=np.uint32)
        assert_exact(method, layers, product, operand)


@EACH_METHOD
@pytest.mark.parametrize("rows", [1, 4, 5, 16, 17, 1023, 1024, 1025, 4097])
def test_any_number_of_rows_is_exact(method: Method, rows: int) -> None:
    generator = np.random.default_rng(rows)
    layers = {"a": weights(9, 11, seed=rows)[0], "b": weights(3, 11, seed=rows + 1)[1]}
    for product in (forward_products(["a", "b"], 11)[0], backward_products([("a", 9), ("b", 3)])[0]):
        operand = generator.integers(0, Q31.modulus, (rows, product.contraction), dtype=np.uint32)
        operand[-1] = HALF
        assert_exact(method, layers, product, operand)


@EACH_METHOD
def test_no_rows_give_no_rows(method: Method) -> None:
    layers = {"a": weights(9, 11, seed=0)[0]}
    operand = np.empty((0, 11), np.uint32)
    result = multiplier(method, layers).multiply(forward_products(["a"], 11)[0], operand, Q31)
    assert result.shape == (0, 9)


@EACH_METHOD
def test_rows_large_enough_for_threads_and_blocks_are_exact_and_do_not_depend_on_each_other(
    method: Method,
) -> None:
    generator = np.random.default_rng(7)
    layers = {"a": weights(160, 150, seed=8)[0]}
    product = forward_products(["a"], 150)[0]
    operand = generator.integers(0, Q31.modulus, (1500, 150), dtype=np.uint32)
    held = multiplier(method, layers)
    result = held.multiply(product, operand, Q31)
    chosen = [0, 1, 749, 750, 1023, 1024, 1499]
    assert np.array_equal(result[chosen], product_mod_q(operand[chosen], layers["a"].T))
    for row in chosen:
        assert np.array_equal(held.multiply(product, operand[row : row + 1], Q31), result[row : row + 1])


@EACH_METHOD
@pytest.mark.parametrize("kind", range(3), ids=["random", "random extremes", "one extreme a row"])
def test_the_longest_contraction_allowed_does_not_overflow(method: Method, kind: int) -> None:
    layers = {"a": weights(2, MAX_CONTRACTION, seed=3)[kind]}
    operand = operands(2, MAX_CONTRACTION, seed=4)[kind]
    assert_exact(method, layers, forward_products(["a"], MAX_CONTRACTION)[0], operand)


@EACH_METHOD
@pytest.mark.parametrize("kind", range(3), ids=["random", "random extremes", "one sign"])
def test_a_backward_product_over_152_000_outputs_is_exact_once_its_parts_are_added(
    method: Method, kind: int
) -> None:
    layers = {"head": weights(152_000, 3, seed=5)[kind]}
    operand = [*operands(2, 152_000, seed=6)[:2], np.full((2, 152_000), HALF, np.uint32)][kind]
    held, total, column = multiplier(method, layers), np.zeros((2, 3), np.int64), 0
    products = backward_products([("head", 152_000)])
    assert len(products) == 5
    for product in products:
        part = np.ascontiguousarray(operand[:, column : column + product.contraction])
        total += held.multiply(product, part, Q31)
        column += product.contraction
    assert np.array_equal(total % Q31.modulus, product_mod_q(operand, layers["head"]))


@EACH_METHOD
def test_a_forward_product_over_152_000_inputs_is_exact_once_its_parts_are_added(method: Method) -> None:
    layers = {"a": weights(3, 152_000, seed=7)[0], "b": weights(2, 152_000, seed=8)[2]}
    operand = operands(2, 152_000, seed=9)[1]
    held, total, column = multiplier(method, layers), np.zeros((2, 5), np.int64), 0
    for product in forward_products(["a", "b"], 152_000):
        part = np.ascontiguousarray(operand[:, column : column + product.contraction])
        total += held.multiply(product, part, Q31)
        column += product.contraction
    whole = np.concatenate([layers["a"].T, layers["b"].T], axis=1)
    assert np.array_equal(total % Q31.modulus, product_mod_q(operand, whole))


@EACH_METHOD
def test_a_wide_span_of_a_wide_layer_that_starts_at_an_odd_column_is_exact(method: Method) -> None:
    layers = {"a": weights(130, 2003, seed=10)[0]}
    product = Product(Direction.FORWARD, (Span("a", 1001, 1999),))
    operand = operands(20, 998, seed=11)[0]
    result = multiplier(method, layers).multiply(product, operand, Q31)
    expected = product_mod_q(operand[[0, 19]], matrix_of(product, layers))
    assert np.array_equal(result[[0, 19]], expected)


@EACH_METHOD
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_an_operand_in_received_bytes_is_multiplied_where_it_lies(method: Method) -> None:
    layers = {"a": weights(9, 11, seed=0)[0]}
    received = operands(6, 11, seed=1)[0].tobytes()
    operand = np.frombuffer(received, np.uint32).reshape(6, 11)
    assert_exact(method, layers, forward_products(["a"], 11)[0], operand)
    assert operand.tobytes() == received


@EACH_METHOD
def test_many_rows_by_many_outputs_are_exact_where_blocks_of_sums_meet(method: Method) -> None:
    # 1024 rows and 272 outputs make one block of sums on a processor.
    spans = (("a", 550), ("b", 7), ("c", 273))
    layers = {name: weights(width, 40, seed=width)[0] for name, width in spans}
    for product in (forward_products([n for n, _ in spans], 40)[0], backward_products(spans)[0]):
        operand = operands(1025, product.contraction, seed=12)[1]
        result = multiplier(method, layers).multiply(product, operand, Q31)
        chosen = [0, 511, 512, 1023, 1024]
        assert np.array_equal(result[chosen], product_mod_q(operand[chosen], matrix_of(product, layers)))


@EACH_METHOD
@pytest.mark.parametrize("exact_as_one", [True, False])
def test_layers_are_one_contraction_only_where_its_length_was_seen_to_be_exact(
    method: Method, exact_as_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked, lengths = [], []

    def is_exact(_: Method, contraction: int, device: torch.device) -> bool:
        checked.append(contraction)
        return exact_as_one

    def prepare(self: Method, operand: np.ndarray) -> object:
        lengths.append(operand.shape[1])
        return original(self, operand)

    original = type(method).prepare
    monkeypatch.setattr(multiplier_module, "is_exact", is_exact)
    monkeypatch.setattr(type(method), "prepare", prepare)
    spans = (("a", 90), ("b", 33), ("c", 7))
    layers = {name: weights(width, 70, seed=width)[0] for name, width in spans}
    held = multiplier(method, layers)
    (product,) = backward_products(spans)
    operand = operands(300, 130, seed=16)[1]
    for _ in range(2):
        assert np.array_equal(
            held.multiply(product, operand, Q31), product_mod_q(operand, matrix_of(product, layers))
        )
    assert checked == [130]
    assert lengths == ([130] if exact_as_one else [90, 33, 7]) * 2


@EACH_METHOD
@pytest.mark.parametrize("exact_as_one", [True, False])
@pytest.mark.parametrize("rows", [3, 300])
def test_neighbours_in_memory_are_one_matrix_where_that_is_exact(
    method: Method, exact_as_one: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    original = type(method).prepare

    def prepare(self: Method, operand: np.ndarray) -> object:
        lengths.append(operand.shape[1])
        return original(self, operand)

    monkeypatch.setattr(multiplier_module, "is_exact", lambda *arguments: exact_as_one)
    monkeypatch.setattr(multiplier_module, "_MOST_STACKED", 0)  # nothing is copied
    monkeypatch.setattr(type(method), "prepare", prepare)
    spans = (("a", 90), ("b", 33), ("c", 7))
    layers = {name: weights(width, 70, seed=width)[0] for name, width in spans}
    memory = LayerMemory()
    held = Multiplier({name: memory.keep(torch.from_numpy(w)) for name, w in layers.items()}, method)
    for product, expected in (
        (forward_products(list(layers), 70)[0], [70]),
        (backward_products(spans)[0], [130] if exact_as_one else [90, 33, 7]),
    ):
        lengths.clear()
        operand = operands(rows, product.contraction, seed=16)[1]
        result = held.multiply(product, operand, Q31)
        assert np.array_equal(result, product_mod_q(operand, matrix_of(product, layers)))
        assert lengths == expected


@EACH_METHOD
def test_neighbours_longer_than_a_contraction_may_be_stay_apart(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiplier_module, "MAX_CONTRACTION", 100)
    spans = (("a", 90), ("b", 33))
    layers = {name: weights(width, 70, seed=width)[2] for name, width in spans}
    memory = LayerMemory()
    held = Multiplier({name: memory.keep(torch.from_numpy(w)) for name, w in layers.items()}, method)
    (product,) = backward_products(spans)
    lengths: list[int] = []
    original = type(method).prepare

    def prepare(self: Method, operand: np.ndarray) -> object:
        lengths.append(operand.shape[1])
        return original(self, operand)

    monkeypatch.setattr(type(method), "prepare", prepare)
    operand = operands(3, 123, seed=16)[1]
    assert np.array_equal(
        held.multiply(product, operand, Q31), product_mod_q(operand, matrix_of(product, layers))
    )
    assert lengths == [90, 33]


@EACH_METHOD
def test_a_layer_that_is_named_again_and_again_is_not_copied_as_often(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = {"a": weights(90, 70, seed=13)[0]}
    (product,) = backward_products((("a", 90),) * 3)
    lengths = []
    original = type(method).prepare

    def prepare(self: Method, operand: np.ndarray) -> object:
        lengths.append(operand.shape[1])
        return original(self, operand)

    monkeypatch.setattr(multiplier_module, "_MOST_STACKED", 270 * 70 - 1)
    held, operand = multiplier(method, layers), operands(300, 270, seed=16)[1]
    monkeypatch.setattr(type(method), "prepare", prepare)
    assert np.array_equal(
        held.multiply(product, operand, Q31), product_mod_q(operand, matrix_of(product, layers))
    )
    assert lengths == [90] * 3


@EACH_METHOD
def test_a_length_that_the_library_refuses_goes_layer_by_layer(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object) -> bool:
        raise RuntimeError("not this length")

    layers = {"a": weights(90, 70, seed=13)[0], "b": weights(40, 70, seed=14)[0]}
    (product,) = backward_products((("a", 90), ("b", 40)))
    held, operand = multiplier(method, layers), operands(300, 130, seed=16)[1]
    monkeypatch.setattr(multiplier_module, "is_exact", refused)
    assert np.array_equal(
        held.multiply(product, operand, Q31), product_mod_q(operand, matrix_of(product, layers))
    )


def test_a_single_row_may_be_of_any_strides() -> None:
    operand = operands(2, 90, seed=3)[1][::-1][:1]
    layers = {"a": weights(90, 70, seed=13)[0]}
    (product,) = backward_products((("a", 90),))
    held = multiplier(Int8Product(Q31), layers)
    assert np.array_equal(
        held.multiply(product, operand, Q31), product_mod_q(operand, matrix_of(product, layers))
    )


@EACH_METHOD
def test_products_at_the_same_time_do_not_disturb_each_other(method: Method) -> None:
    layers = {"a": weights(90, 70, seed=13)[0], "b": weights(40, 70, seed=14)[0]}
    product = forward_products(["a", "b"], 70)[0]
    held = multiplier(method, layers)
    wanted = [operands(200, 70, seed)[0] for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda operand: held.multiply(product, operand, Q31), wanted))
    for operand, result in zip(wanted, results, strict=True):
        assert np.array_equal(result, product_mod_q(operand, matrix_of(product, layers)))


@EACH_SET
def test_limbs_are_the_balanced_digits_of_residues_around_every_carry(parameters: ParameterSet) -> None:
    q, most = parameters.modulus, parameters.limbs
    edges = [k * 2**shift for shift in (7, 8, 15, 16, 22, 23, 24, 30) for k in (-1, 1)]
    edges += [0, parameters.half, parameters.half + 1, parameters.lift, parameters.lift - q]
    residues = np.array([(e + d) % q for e in edges for d in range(-300, 301)], np.int64)
    lifted = np.where(residues > parameters.lift, residues - q, residues)
    limbs = np.full((1, most, len(residues)), 99, np.int8)
    _split(
        residues.astype(np.uint32)[None], len(residues), parameters.q, np.uint32(parameters.lift), limbs, 0, 1
    )
    assert np.array_equal(sum(limbs[0, k].astype(np.int64) << (8 * k) for k in range(most)), lifted)


@EACH_SET
@pytest.mark.parametrize("adding", [False, True])
def test_sums_that_are_nearly_multiples_of_q_are_reduced_exactly(
    adding: bool, parameters: ParameterSet
) -> None:
    generator = np.random.default_rng(15)
    values = generator.integers(-(2**21) + 8, 2**21 - 8, 40_000) * parameters.modulus
    values += generator.integers(-300, 301, len(values))
    sums = np.empty((1, parameters.limbs, len(values)), np.int64)
    rest = values
    for k in range(parameters.limbs - 1):
        sums[0, k] = ((rest + 128) & 255) - 128
        rest = (rest - sums[0, k]) >> 8
    sums[0, -1] = rest
    assert np.abs(sums).max() < 2**31
    extremes = np.array(EXTREMES, np.uint32)
    out = generator.choice(extremes[extremes < parameters.modulus], (1, len(values)))
    expected = (values + out[0].astype(np.int64) * adding) % parameters.modulus
    _recombine(sums.astype(np.int32), parameters.q, out, 0, adding, 0, 1)
    assert np.array_equal(out[0], expected)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 9, 17), (5, 64, 40), (17, 24, 33)])
def test_the_product_for_cuda_hands_over_shapes_that_cuda_takes(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, int]
) -> None:
    rows, contraction, outputs = sizes
    shapes = []

    def int_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.dtype == b.dtype == torch.int8
        shapes.append((a.shape[0], a.shape[1], b.shape[1]))
        return (a.double() @ b.double()).to(torch.int32)

    monkeypatch.setattr(torch, "_int_mm", int_mm)
    layers = {"a": weights(outputs, contraction, seed=1)[0]}
    operand = operands(rows, contraction, seed=2)[0]
    assert_exact(TorchInt8Product(Q31, CPU), layers, forward_products(["a"], contraction)[0], operand)
    for handed_rows, handed_contraction, handed_outputs in shapes:
        assert handed_rows > 16 and handed_contraction % 8 == 0 and handed_outputs % 8 == 0
    assert shapes


# What a multiplier refuses.

LAYERS = {
    "wide": np.ones((4, MAX_CONTRACTION + 8), np.int8),
    "a": np.ones((6, 8), np.int8),
    "b": np.ones((5, 8), np.int8),
    "c": np.ones((6, 9), np.int8),
}


@pytest.mark.parametrize(
    ("direction", "spans", "message"),
    [
        (Direction.FORWARD, [], "no layers"),
        (Direction.FORWARD, [("a", -1, 4)], "does not lie within the 8 input"),
        (Direction.FORWARD, [("a", 0, 9)], "does not lie within the 8 input"),
        (Direction.FORWARD, [("a", 4, 4)], "does not lie within"),
        (Direction.FORWARD, [("a", 5, 4)], "does not lie within"),
        (Direction.BACKWARD, [("a", 0, 7)], "does not lie within the 6 output"),
        (Direction.BACKWARD, [("a", 0, 6), ("b", 0, 6)], "does not lie within the 5 output"),
        (Direction.FORWARD, [("wide", 0, MAX_CONTRACTION + 1)], f"more than {MAX_CONTRACTION}"),
        (Direction.FORWARD, [("a", 0, 8), ("b", 0, 7)], "same features"),
        (Direction.FORWARD, [("a", 0, 4), ("b", 4, 8)], "same features"),
        (Direction.BACKWARD, [("a", 0, 6), ("c", 0, 6)], "same features"),
    ],
)
def test_spans_that_do_not_fit_are_refused(
    direction: Direction, spans: list[tuple[str, int, int]], message: str
) -> None:
    product = Product(direction, tuple(Span(*span) for span in spans))
    with pytest.raises(ValueError, match=message):
        multiplier(FloatProduct(Q31, CPU), LAYERS).outputs(product)


def test_a_layer_that_is_not_held_is_refused_by_name() -> None:
    product = Product(Direction.FORWARD, (Span("a", 0, 8), Span("absent", 0, 8)))
    with pytest.raises(KeyError, match="absent"):
        multiplier(FloatProduct(Q31, CPU), LAYERS).outputs(product)


def test_outputs_add_up_forward_and_agree_backward() -> None:
    held = multiplier(FloatProduct(Q31, CPU), LAYERS)
    assert held.outputs(Product(Direction.FORWARD, (Span("a", 0, 8), Span("b", 0, 8)))) == 11
    assert held.outputs(Product(Direction.BACKWARD, (Span("a", 2, 6), Span("b", 0, 3)))) == 8


@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.BACKWARD])
def test_an_operand_too_narrow_for_the_product_is_refused(direction: Direction) -> None:
    product = Product(direction, (Span("a", 0, 6),))
    with pytest.raises((ValueError, RuntimeError)):
        multiplier(FloatProduct(Q31, CPU), LAYERS).multiply(product, np.zeros((2, 5), np.uint32), Q31)


def test_a_backward_operand_too_wide_for_the_product_is_refused() -> None:
    product = Product(Direction.BACKWARD, (Span("a", 0, 6),))
    with pytest.raises(ValueError, match="7"):
        multiplier(FloatProduct(Q31, CPU), LAYERS).multiply(product, np.zeros((2, 7), np.uint32), Q31)


# The check that picks a method. These emulate hardware and libraries that are wrong.


class WrongProduct(Method):
    """The limbs of an operand, multiplied by an int8 product that each subclass gets wrong in its way."""

    name = "wrong"

    def __init__(self) -> None:
        super().__init__(Q31)

    def prepare(self, operand: np.ndarray) -> np.ndarray:
        x = operand.astype(np.int64)
        x[x > HALF] -= Q31.modulus
        limbs = []
        for _ in range(4):
            digit = ((x + 128) & 255) - 128
            limbs.append(digit)
            x = (x - digit) >> 8
        return np.stack(limbs)

    def multiply(self, prepared: object, matrix: torch.Tensor) -> np.ndarray:
        assert isinstance(prepared, np.ndarray)
        self.layout = matrix
        _, rows, contraction = prepared.shape
        sums = self.int8(prepared.reshape(4 * rows, contraction), matrix.numpy().astype(np.int64))
        sums = sums.reshape(4, rows, -1)
        total = sum(sums[k].astype(object) << (8 * k) for k in range(4))
        return (total % Q31.modulus).astype(np.uint32)

    def int8(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a @ b


def saturating_pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """x86 without VNNI: (a + 128) b adds up in saturating 16-bit pairs; 128 sum(b) is subtracted."""
    if a.shape[1] % 2:
        a, b = np.pad(a, ((0, 0), (0, 1))), np.pad(b, ((0, 1), (0, 0)))
    total = np.zeros((a.shape[0], b.shape[1]), np.int64)
    for i in range(0, a.shape[1], 2):
        pair = np.outer(a[:, i] + 128, b[i]) + np.outer(a[:, i + 1] + 128, b[i + 1])
        total += np.clip(pair, -(1 << 15), (1 << 15) - 1)
    return total - 128 * b.sum(axis=0)


class SaturatingPairs(WrongProduct):
    def int8(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return saturating_pairs(a, b)


class Float32Sums(WrongProduct):
    """Right until a sum passes 2^24, which random operands never reach and extreme ones do."""

    def int8(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.cumsum(a[:, :, None] * b.astype(np.float32), axis=1, dtype=np.float32)[:, -1].astype(
            np.int64
        )


class SymmetricLimbs(WrongProduct):
    """Right for digits within +-127; -128 comes out as -127."""

    def int8(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.maximum(a, -127) @ b


class WrongForFewRows(WrongProduct):
    def int8(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return saturating_pairs(a, b) if a.shape[0] < 16 else a @ b


class WrongForManyRows(WrongProduct):
    def int8(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return saturating_pairs(a, b) if a.shape[0] > 64 else a @ b


class WrongForHundredsOfRows(WrongProduct):
    def int8(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return saturating_pairs(a, b) if a.shape[0] > 1000 else a @ b


class WrongForOneLayout(WrongProduct):
    """Saturates for matrices of one memory layout and is right for all others."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.name = layout

    def int8(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return saturating_pairs(a, b) if layout_of(self.layout) == self.name else a @ b


def layout_of(matrix: torch.Tensor) -> str:
    whole = matrix.is_contiguous() or matrix.t().is_contiguous()
    kind = "rows" if matrix.stride(1) == 1 else "columns"
    return f"{kind} of the {'whole' if whole else 'span'}"


class WrongInOneElement(WrongProduct):
    def int8(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        sums = a @ b
        sums[-1, -1] += 1
        return sums


LAYOUTS = [f"{kind} of the {part}" for kind in ("rows", "columns") for part in ("whole", "span")]


def test_a_multiplier_hands_over_the_layouts_whose_check_is_tested_here() -> None:
    class Recorder(WrongProduct):
        def int8(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
            self.seen.add(layout_of(self.layout))
            return a @ b

        def __init__(self) -> None:
            super().__init__()
            self.seen: set[str] = set()

    recorder = Recorder()
    for product in (
        Product(Direction.FORWARD, (Span("a", 0, 8),)),
        Product(Direction.FORWARD, (Span("a", 2, 7),)),
        Product(Direction.BACKWARD, (Span("a", 0, 6),)),
        Product(Direction.BACKWARD, (Span("a", 1, 4), Span("b", 0, 3))),
    ):
        operand = operands(3, product.contraction, seed=1)[0]
        assert_exact(recorder, LAYERS, product, operand)
    assert recorder.seen <= set(LAYOUTS) and len(recorder.seen) == 3


def test_a_right_method_of_the_kind_emulated_here_is_accepted() -> None:
    assert is_exact(WrongProduct(), 64, CPU)


@pytest.mark.parametrize(
    ("method", "contraction"),
    [
        (SaturatingPairs(), 64),
        (SaturatingPairs(), 33),
        (SymmetricLimbs(), 64),
        (WrongForFewRows(), 64),
        (WrongForManyRows(), 64),
        (WrongForHundredsOfRows(), 64),
        *((WrongForOneLayout(layout), 64) for layout in LAYOUTS),
        (WrongInOneElement(), 64),
        (Float32Sums(), 1100),
    ],
    ids=lambda value: f"{type(value).__name__} {value.name}" if isinstance(value, Method) else None,
)
def test_a_method_that_is_wrong_somewhere_is_noticed(method: Method, contraction: int) -> None:
    assert not is_exact(method, contraction, CPU)


def _agrees(method: WrongProduct, operand: np.ndarray, matrix: np.ndarray) -> bool:
    result = method.multiply(method.prepare(operand), torch.from_numpy(matrix))
    return bool(np.array_equal(result, product_mod_q(operand, matrix)))


def test_extreme_inputs_alone_would_not_notice_saturation_nor_random_ones_float32_sums() -> None:
    # What the methods above are for: each passes the half of the check that the other fails.
    generator = np.random.default_rng(0)
    lowest = np.full((4, 64), constant_limbs([-128, -128, -128, 0]), np.uint32)
    everywhere = np.full((64, 5), 127, np.int8)
    mixed = generator.integers(-127, 128, (64, 5), dtype=np.int8)
    random = generator.integers(0, Q31.modulus, (4, 64), dtype=np.uint32)
    # The fourth digit is 0, so the emulated unsigned operand is 128 there, and 128 * 127 * 2 fits 16 bits.
    assert _agrees(SaturatingPairs(), lowest, everywhere)
    assert not _agrees(SaturatingPairs(), random, mixed)

    random = generator.integers(0, Q31.modulus, (4, 1100), dtype=np.uint32)
    mixed = generator.integers(-127, 128, (1100, 5), dtype=np.int8)
    highest = np.full((4, 1100), constant_limbs([127, 127, 127, 63]), np.uint32)
    assert _agrees(Float32Sums(), random, mixed)
    assert not _agrees(Float32Sums(), highest, np.full((1100, 5), 127, np.int8))


@NEEDS_INT8
@pytest.mark.parametrize("method", [Int8Product(Q31), TorchInt8Product(Q31, CPU)], ids=lambda m: m.name)
@pytest.mark.parametrize("contraction", [1, 2, 7, 384, 2053])
def test_a_right_int8_product_is_accepted(method: Method, contraction: int) -> None:
    assert is_exact(method, contraction, CPU)


@pytest.mark.parametrize("contraction", [1, 2, 7, 384, 2053])
def test_the_float64_product_is_accepted(contraction: int) -> None:
    assert is_exact(FloatProduct(Q31, CPU), contraction, CPU)


@NEEDS_INT8
def test_the_fast_method_is_chosen_without_a_word_where_it_is_exact() -> None:
    said: list[str] = []
    fast = "int8-amx" if are_usable() else "int8-vnni" if have_dot_products() else "int8"
    assert exact_method([64, 100, 64], Q31, "cpu", said.append).name == fast
    assert not said


@pytest.fixture
def without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor whose int8 product is the library's."""
    monkeypatch.setattr(exactness, "are_usable", lambda: False)
    monkeypatch.setattr(exactness, "have_dot_products", lambda: False)


def _saturating_int_mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    sums = saturating_pairs(a.numpy().astype(np.int64), b.numpy().astype(np.int64))
    return out.copy_(torch.from_numpy(sums))


@pytest.mark.usefixtures("without_tiles")
def test_hardware_that_saturates_gets_the_float64_product_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(torch, "_int_mm", _saturating_int_mm)
    method = exact_method([64], Q31, "cpu", said.append)
    assert method.name == "float64"
    assert len(said) == 1 and "int8" in said[0] and "contraction length 64" in said[0]
    monkeypatch.undo()
    assert_exact(method, LAYERS, forward_products(["a"], 8)[0], operands(3, 8, seed=1)[0])


@pytest.mark.usefixtures("without_tiles")
def test_hardware_that_is_wrong_at_one_length_only_gets_the_float64_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def int_mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if a.shape[1] == 65:
            return _saturating_int_mm(a, b, out)
        return out.copy_(a.double() @ b.double())

    said: list[str] = []
    monkeypatch.setattr(torch, "_int_mm", int_mm)
    assert exact_method([64, 66], Q31, "cpu", said.append).name == "int8"
    assert exact_method([64, 65, 66], Q31, "cpu", said.append).name == "float64"
    assert len(said) == 1 and "contraction length 65" in said[0]


@pytest.mark.usefixtures("without_tiles")
def test_hardware_without_an_int8_product_gets_the_float64_product_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def int_mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        raise RuntimeError("not implemented for this device")

    said: list[str] = []
    monkeypatch.setattr(torch, "_int_mm", int_mm)
    assert exact_method([64], Q31, "cpu", said.append).name == "float64"
    assert "not implemented for this device" in said[0]


@pytest.mark.usefixtures("without_tiles")
def test_hardware_that_is_wrong_by_every_method_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_one(method: FloatProduct, prepared: torch.Tensor, matrix: torch.Tensor) -> np.ndarray:
        return (prepared @ matrix.double() + 1).remainder(Q31.modulus).numpy().astype(np.uint32)

    said: list[str] = []
    monkeypatch.setattr(torch, "_int_mm", _saturating_int_mm)
    monkeypatch.setattr(FloatProduct, "multiply", off_by_one)
    with pytest.raises(RuntimeError, match="no exact modular product on cpu"):
        exact_method([64], Q31, "cpu", said.append)
    assert len(said) == 2


def test_a_contraction_that_was_not_cut_is_refused() -> None:
    with pytest.raises(ValueError, match=f"{MAX_CONTRACTION + 1}"):
        exact_method([64, MAX_CONTRACTION + 1], Q31)


@pytest.mark.parametrize(
    "limb",
    [
        127,
        -128,
    ],
)
@EACH_SET
def test_the_check_tries_operands_whose_lower_limbs_are_all_extreme(
    limb: int, parameters: ParameterSet
) -> None:
    lower = []
    for operand in _test_operands(1, 4, parameters, np.random.default_rng(0)):
        assert operand.max() < parameters.modulus
        limbs = Int8Product(parameters).prepare(operand)[0].numpy()
        lower.append(bool(np.all(limbs[:-1] == limb)))
    assert any(lower)


@pytest.mark.usefixtures("without_tiles")
def test_no_method_is_called_exact_without_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_int_mm", _saturating_int_mm)
    try:
        method = exact_method([], Q31, "cpu", lambda message: None)
    except ValueError:
        return
    assert method.name == "float64"


WITHOUT_VNNI = """
import numpy as np, torch
from blindtune.protocol.multiplication import exactness
from blindtune.protocol.multiplication.exactness import exact_method
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import PARAMETER_SETS, Q31, ParameterSet
from blindtune.protocol.products import backward_products, forward_products

generator = np.random.default_rng(1)
a = torch.from_numpy(generator.integers(-128, 128, (40, 64), dtype=np.int8))
b = torch.from_numpy(generator.integers(-127, 128, (64, 40), dtype=np.int8))
int8_is_exact = torch.equal(torch._int_mm(a, b), (a.double() @ b.double()).to(torch.int32))

said = []
exactness.are_usable = exactness.have_dot_products = lambda: False  # as without VNNI instructions
method = exact_method([7, 64, 133, 1000], Q31, "cpu", said.append)
layers = {name: generator.integers(-127, 128, shape, dtype=np.int8)
          for name, shape in {"a": (64, 133), "b": (7, 133), "c": (3, 1000)}.items()}
held = Multiplier({name: torch.from_numpy(w) for name, w in layers.items()}, method)
for product, matrix in [
    (forward_products(["a", "b"], 133)[0], np.concatenate([layers["a"], layers["b"]]).T),
    (backward_products([("a", 64), ("b", 7)])[0], np.concatenate([layers["a"], layers["b"]])),
    (forward_products(["c"], 1000)[0], layers["c"].T),
]:
    for rows in (1, 33):
        operand = generator.integers(0, Q31.modulus, (rows, matrix.shape[0]), dtype=np.uint32)
        expected = (operand.astype(object) @ matrix.astype(object)) % Q31.modulus
        result = held.multiply(product, operand, Q31)
        assert np.array_equal(result, expected), (method.name, product.label, rows)
print(method.name, int8_is_exact, len(said))
"""


@pytest.mark.parametrize("instructions", ["AVX2"])
def test_a_processor_without_vnni_still_gets_exact_products(instructions: str) -> None:
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_VNNI],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    name, int8_is_exact, said = run.stdout.split()
    if int8_is_exact == "False":
        assert name == "float64" and said == "1"
    else:
        assert name == "int8" and said == "0"
