"""Cuts, groups and labels of products."""

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blindtune.protocol.products import (
    MAX_CONTRACTION,
    Direction,
    Product,
    Span,
    backward_products,
    forward_products,
)


def cuts_of(length: int) -> list[tuple[int, int]]:
    return [(p.spans[0].start, p.spans[0].stop) for p in forward_products(["layer"], length)]


def test_directions_have_the_values_of_the_wire_format() -> None:
    assert (Direction.FORWARD.value, Direction.BACKWARD.value) == (1, 2)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(length=st.integers(1, 200_000))
@example(MAX_CONTRACTION)
@example(MAX_CONTRACTION + 1)
@example(152_000)
def test_cuts_cover_every_feature_once_with_as_few_spans_as_possible(length: int) -> None:
    cuts = cuts_of(length)
    assert cuts[0][0] == 0 and cuts[-1][1] == length
    assert all(left[1] == right[0] for left, right in pairwise(cuts))
    assert all(0 < stop - start <= MAX_CONTRACTION for start, stop in cuts)
    assert len(cuts) == -(-length // MAX_CONTRACTION)


def test_an_int32_accumulator_and_a_float64_sum_hold_every_contraction_that_is_allowed() -> None:
    assert 128 * 128 * MAX_CONTRACTION < 1 << 31
    assert (1 << 30) * 128 * MAX_CONTRACTION <= 1 << 53


def test_forward_products_read_the_same_features_of_every_layer_in_order() -> None:
    products = forward_products(["q", "k", "v"], 40_000)
    assert [p.contraction for p in products] == [32_768, 7_232]
    for product in products:
        assert product.direction is Direction.FORWARD
        assert [span.layer for span in product.spans] == ["q", "k", "v"]
        assert len({(span.start, span.stop) for span in product.spans}) == 1


@settings(derandomize=True, deadline=None, max_examples=150)
@given(widths=st.lists(st.one_of(st.integers(1, 200_000), st.integers(1, 40_000)), min_size=1, max_size=6))
@example([MAX_CONTRACTION])
@example([1, MAX_CONTRACTION, 1])
@example([MAX_CONTRACTION - 1, 1, 1])
@example([152_000, 100])
def test_backward_products_hold_every_output_feature_once_and_in_order(widths: list[int]) -> None:
    layers = [(f"layer{i}", width) for i, width in enumerate(widths)]
    products = backward_products(layers)
    assert all(p.direction is Direction.BACKWARD for p in products)
    assert all(0 < p.contraction <= MAX_CONTRACTION for p in products)
    assert all(p.contraction == sum(len(span) for span in p.spans) for p in products)
    position = {name: 0 for name, _ in layers}
    order = []
    for span in (span for product in products for span in product.spans):
        assert span.start == position[span.layer]
        position[span.layer] = span.stop
        if not order or order[-1] != span.layer:
            order.append(span.layer)
    assert position == dict(layers)
    assert order == [name for name, _ in layers]


def test_backward_products_bundle_layers_that_fit_together() -> None:
    assert len(backward_products([("q", 4096), ("k", 1024), ("v", 1024)])) == 1
    assert len(backward_products([("gate", 16_384), ("up", 16_384)])) == 1
    assert len(backward_products([("gate", 16_384), ("up", 16_385)])) == 2


@settings(derandomize=True, deadline=None, max_examples=100)
@given(widths=st.lists(st.integers(1, 40_000), min_size=2, max_size=8))
def test_no_backward_product_leaves_room_for_the_whole_next_span(widths: list[int]) -> None:
    products = backward_products([(f"layer{i}", width) for i, width in enumerate(widths)])
    for product, following in pairwise(products):
        assert product.contraction + len(following.spans[0]) > MAX_CONTRACTION


def test_products_of_a_model_have_different_labels() -> None:
    products = []
    for block in range(12):
        attention = [f"model.layers.{block}.self_attn.{name}_proj" for name in "qkv"]
        products += forward_products(attention, 40_000)
        products += forward_products(attention[:2], 40_000)
        products += forward_products(attention[::-1], 40_000)
        products += backward_products([(name, 40_000) for name in attention])
        for name in attention:
            products += forward_products([name], 40_000)
            products += backward_products([(name, 30_000)])
    assert len(set(products)) == len(products) > 200
    assert len({product.label for product in products}) == len(products)


def test_layer_names_that_look_like_spans_give_different_labels() -> None:
    two = Product(Direction.FORWARD, (Span("a", 0, 4), Span("b", 0, 4)))
    one = Product(Direction.FORWARD, (Span("a[0:4] b", 0, 4),))
    assert two.label != one.label


@pytest.mark.parametrize("second", [Span("a", 0, 4), Span("a", 4, 8)])
def test_a_forward_product_that_names_a_layer_twice_is_refused(second: Span) -> None:
    with pytest.raises(ValueError, match="twice"):
        Product(Direction.FORWARD, (Span("a", 0, 4), Span("b", 0, 4), second))
    # Backward, the spans of a layer stand for different output features.
    Product(Direction.BACKWARD, (Span("a", 0, 4), Span("b", 0, 4), Span("a", 4, 8)))
