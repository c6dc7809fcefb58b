"""Products of layers that are kept as four-bit codes: those of their integers, in every way and direction."""

import numpy as np
import pytest
import torch

from blindtune.protocol.kernels import four_bits
from blindtune.protocol.multiplication import four_bit_matrix
from blindtune.protocol.multiplication.exactness import int8_methods
from blindtune.protocol.multiplication.four_bit_matrix import FourBitMatrix
from blindtune.protocol.multiplication.methods import FloatProduct, Method
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import PARAMETER_SETS
from blindtune.protocol.products import Direction, Product, Span
from blindtune.protocol.weights import SCHEMES, kept_bytes

CPU = torch.device("cpu")
SHAPES = {"a": (1200, 192), "b": (100, 192), "c": (70, 100)}
PRODUCTS = [
    Product(Direction.FORWARD, (Span("a", 0, 192), Span("b", 0, 192))),
    Product(Direction.FORWARD, (Span("b", 5, 133),)),
    Product(Direction.FORWARD, (Span("c", 0, 100),)),
    Product(Direction.BACKWARD, (Span("a", 0, 1200), Span("b", 0, 100))),
    Product(Direction.BACKWARD, (Span("a", 333, 1111),)),
    Product(Direction.BACKWARD, (Span("c", 1, 70),)),
]
METHODS = [
    method
    for parameters in PARAMETER_SETS.values()
    for method in (*int8_methods(parameters, CPU), FloatProduct(parameters, CPU))
]


def matrices(scheme: str) -> tuple[dict[str, torch.Tensor], dict[str, FourBitMatrix]]:
    """Integers, and the codes that give them."""
    generator = torch.Generator().manual_seed(0)
    layers = {
        name: SCHEMES[scheme].quantize(torch.randn(shape, generator=generator) * 0.05)
        for name, shape in SHAPES.items()
    }
    codes = {}
    for name, layer in layers.items():
        assert layer.four_bit is not None
        codes[name] = FourBitMatrix(layer.four_bit, layer.scales, CPU)
    return {name: layer.integers for name, layer in layers.items()}, codes


@pytest.mark.parametrize("scheme", ["nf4", "nf4-double"])
@pytest.mark.parametrize("method", METHODS, ids=lambda x: f"{x.name}-{x.parameters.name}")
def test_products_are_those_of_the_integers(
    scheme: str, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(four_bit_matrix, "PIECE_BYTES", 1 << 16)
    integers, codes = matrices(scheme)
    generator = np.random.default_rng(1)
    for product in PRODUCTS:
        for rows in (1, 40, 1030):
            shape = rows, product.contraction
            operand = generator.integers(0, method.parameters.modulus, shape, dtype=np.uint32)
            expected = Multiplier(integers, method).multiply(product, operand, method.parameters)
            found = Multiplier(codes, method).multiply(product, operand, method.parameters)
            assert np.array_equal(found, expected), (product.label, rows)
            mixed = Multiplier(integers | {"b": codes["b"]}, method)
            assert np.array_equal(mixed.multiply(product, operand, method.parameters), expected)


@pytest.mark.parametrize("scheme", ["nf4", "nf4-double"])
def test_parts_are_those_of_the_matrix_and_of_the_operations_for_gpus(scheme: str) -> None:
    integers, codes = matrices(scheme)
    for name, (outputs, features) in SHAPES.items():
        for rows in (slice(0, outputs), slice(3, outputs - 2)):
            for columns in (slice(0, features), slice(64, features), slice(1, features - 7)):
                expected = integers[name][rows, columns]
                assert torch.equal(codes[name].integers(rows, columns), expected)
                assert torch.equal(codes[name]._on_device(rows, columns), expected)


def test_looking_up_one_byte_at_a_time_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on processors without the instruction: the function as Python, which the kernel is compiled from."""
    integers, codes = matrices("nf4")
    monkeypatch.setattr(four_bits, "_TOGETHER", False)

    def fill(table, scale, divisor, found):  # type: ignore[no-untyped-def]
        found[:] = np.clip(np.rint(table * np.float32(scale) / np.float32(divisor)), -127, 127)

    monkeypatch.setattr(four_bits, "_fill", fill)
    monkeypatch.setattr(four_bits, "_scale_of", four_bits._scale_of.py_func)
    matrix, out = codes["b"], np.empty(SHAPES["b"], np.int8)
    four_bits._integers.py_func(
        matrix._codes.numpy(),
        matrix._stored.numpy(),
        None,
        np.float32(0),
        four_bit_matrix.TABLE.numpy(),
        four_bit_matrix.TABLE.numpy(),
        matrix._scales.numpy(),
        192,
        (0, 0),
        out,
        0,
        100,
    )
    assert np.array_equal(out, integers["b"].numpy())


@pytest.mark.parametrize("scheme", ["nf4", "nf4-double"])
def test_a_layer_takes_what_is_estimated_for_it(scheme: str) -> None:
    _, codes = matrices(scheme)
    for name, (outputs, features) in SHAPES.items():
        constant = 4 if scheme == "nf4-double" else 0
        assert codes[name].nbytes == kept_bytes(outputs, features, SCHEMES[scheme]) + constant
    assert kept_bytes(2048, 2048, SCHEMES["int8"]) == 1 << 22
    assert kept_bytes(2048, 2048, SCHEMES[scheme]) < 0.6 * kept_bytes(2048, 2048, SCHEMES["int8"])
