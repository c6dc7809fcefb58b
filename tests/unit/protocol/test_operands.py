"""Rows of a seed as an operand: cut like the array that they stand for, and multiplied like it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blindtune.protocol.expansion import Seed
from blindtune.protocol.multiplication.exactness import exact_method
from blindtune.protocol.multiplication.methods import FloatProduct, Method
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.operands import SeededRows
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Direction, Product, Span, backward_products, forward_products
from blindtune.protocol.residues import Residues

KEY = bytes(range(7, 39))
SHAPES = {"a": (90, 70), "b": (33, 70), "c": (7, 70)}
PRODUCTS = [
    forward_products(["a"], 70)[0],
    forward_products(["a", "b", "c"], 70)[0],
    Product(Direction.FORWARD, (Span("a", 11, 60), Span("b", 11, 60))),
    backward_products([("a", 90)])[0],
    backward_products([("a", 90), ("b", 33), ("c", 7)])[0],
    Product(Direction.BACKWARD, (Span("a", 5, 41), Span("c", 1, 7), Span("b", 0, 20))),
]


def whole(rows: int = 12, columns: int = 50, offset: int = 2**40) -> SeededRows:
    return SeededRows(Seed(KEY, Q31, offset), rows, columns)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.data())
def test_a_part_of_a_part_is_that_of_the_array(data: st.DataObject) -> None:
    part, array = whole(), whole().residues()
    for _ in range(3):
        a, b = sorted(data.draw(st.tuples(st.integers(0, 14), st.integers(0, 14))))
        c, d = sorted(data.draw(st.tuples(st.integers(0, 55), st.integers(0, 55))))
        part, array = part[a:b], array[a:b]
        assert len(part) == len(array) and part.shape == array.shape
        part, array = part[:, c:d], array[:, c:d]
        assert part.shape == array.shape
        assert np.array_equal(part.residues(), array)


@pytest.mark.parametrize("key", [slice(None, None, 2), (slice(None), slice(None, None, -1))], ids=str)
def test_what_is_no_part_of_a_seed_is_refused(key: slice | tuple[slice, slice]) -> None:
    with pytest.raises(ValueError, match="one after another"):
        whole()[key]


def test_no_key_is_shown() -> None:
    rows = SeededRows(Seed(b"never shown, of thirty-two bytes", Q31), 3, 4)
    assert "never shown" not in repr(rows) + str(rows) + repr(rows[1:])


def held(method: Method | None = None) -> tuple[Multiplier, dict[str, np.ndarray]]:
    generator = np.random.default_rng(3)
    layers = {name: generator.integers(-127, 128, shape, dtype=np.int8) for name, shape in SHAPES.items()}
    tensors = {name: torch.from_numpy(w) for name, w in layers.items()}
    lengths = {len(span) for product in PRODUCTS for span in product.spans}
    return Multiplier(tensors, method or exact_method(lengths, Q31)), layers


def expected(product: Product, layers: dict[str, np.ndarray], operand: Residues) -> np.ndarray:
    forward = product.direction is Direction.FORWARD
    parts = [(layers[s.layer].T if forward else layers[s.layer])[s.start : s.stop] for s in product.spans]
    return (operand.astype(object) @ np.concatenate(parts, axis=int(forward)).astype(object)) % Q31.modulus


@pytest.mark.parametrize("rows", [0, 1, 40, 300, 1030])
@pytest.mark.parametrize("product", PRODUCTS, ids=lambda p: p.label)
def test_rows_of_a_seed_are_multiplied_as_their_expansion(product: Product, rows: int) -> None:
    multiplier, layers = held()
    seeded = whole(rows, product.contraction)
    result = multiplier.multiply(product, seeded, Q31)
    assert result.dtype == np.uint32
    assert np.array_equal(result, multiplier.multiply(product, seeded.residues(), Q31))
    chosen = [row for row in (0, 1, 39, 299, 1023, 1024, 1029) if row < rows]
    assert np.array_equal(result[chosen], expected(product, layers, seeded.residues()[chosen]))


def test_a_seed_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="50"):
        held()[0].multiply(PRODUCTS[0], whole(), Q31)


class Device(FloatProduct):
    """A method that expands seeds itself, and remembers which."""

    def __init__(self) -> None:
        super().__init__(Q31, torch.device("cpu"))
        self.expanded: list[SeededRows] = []
        self.expand = self._expand

    def _expand(self, rows: SeededRows) -> torch.Tensor:
        self.expanded.append(rows)
        return self.prepare(rows.residues())


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda p: p.label)
def test_a_method_that_expands_seeds_gets_each_element_of_them_once(product: Product) -> None:
    device = Device()
    multiplier, layers = held(device)
    seeded = whole(40, product.contraction)
    result = multiplier.multiply(product, seeded, Q31)
    assert np.array_equal(result, expected(product, layers, seeded.residues()))
    seen = np.concatenate([part.residues() for part in device.expanded], axis=1)
    assert np.array_equal(seen, seeded.residues())


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda p: p.label)
def test_the_host_expands_rows_once_and_not_for_each_layer(
    product: Product, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int, int]] = []
    original = Seed.expand

    def expand(self: Seed, rows: int, columns: int) -> Residues:
        asked.append((self.row_offset, rows, columns))
        return original(self, rows, columns)

    monkeypatch.setattr(Seed, "expand", expand)
    held()[0].multiply(product, whole(1030, product.contraction, 5), Q31)
    assert asked == [(5, 1024, product.contraction), (1029, 6, product.contraction)]
