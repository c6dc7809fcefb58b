"""Rounding with the error diffused: within the proof's bound, the same everywhere, and without a bias."""

from math import isqrt, sqrt

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.assets import asset, json_lines

from blindtune.protocol.fixed_point import dequantize_rows, quantize_rows, square_budget
from blindtune.protocol.masks import MaskSource
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import (
    DIFFUSED_CONTRACTION,
    Direction,
    Product,
    Span,
    backward_products,
    forward_products,
)
from blindtune.protocol.shares.source import ShareSource
from blindtune.protocol.shares.unmasked import UnmaskedSource
from blindtune.protocol.weights import quantize_int8

LANES = 16
Reals = NDArray[np.float64]


def gradients(rows: int, columns: int, seed: int = 0) -> NDArray[np.float32]:
    """As a softmax leaves them: many columns far below a row's step, of one sign, and one large one."""
    generator = np.random.default_rng(seed)
    logits = 3 * generator.standard_normal((rows, columns))
    x = np.exp(logits - logits.max(axis=1, keepdims=True))
    x /= x.sum(axis=1, keepdims=True)
    x[np.arange(rows), generator.integers(0, columns, rows)] -= 1
    return (x * 10.0 ** generator.integers(-30, 30, (rows, 1))).astype(np.float32)


def one_by_one(row: Reals, scale: float) -> list[int]:
    """The definition, for each column by itself."""
    integers, carry = [], [0.0] * LANES
    for i, value in enumerate(row.tolist()):
        wanted = value * scale + carry[i % LANES]
        integers.append(round(wanted))
        carry[i % LANES] = wanted - integers[-1]
    return integers


def rounding_errors(x: NDArray[np.float32], integers: NDArray[np.int32], scales: Reals) -> Reals:
    return np.asarray(integers - x.astype(np.float64) * scales[:, np.newaxis])


@pytest.mark.parametrize("columns", [2, 15, 16, 17, 31, 40, 4097])
def test_what_a_column_leaves_goes_to_the_next_one_of_its_lane(columns: int) -> None:
    x = gradients(3, columns, columns)
    scale = np.random.default_rng(1).uniform(1e-3, 2, columns).astype(np.float32)
    integers, scales = quantize_rows(x, 10**9 * columns, scale, diffused=True)
    values = x.astype(np.float64) * scale
    assert integers.tolist() == [one_by_one(*row) for row in zip(values, scales.tolist(), strict=True)]


@pytest.mark.parametrize("kind", ["softmax", "ones", "halves", "small budget"])
@pytest.mark.parametrize("columns", [2, 16, 37, 5000])
def test_rows_keep_their_budget_and_each_lane_its_sum(kind: str, columns: int) -> None:
    x = gradients(4, columns) if kind == "softmax" else np.ones((4, columns), np.float32)
    if kind == "halves":
        x[:, ::2] = 0.5
    budget = 30 * columns + 50 if kind == "small budget" else 10**13
    integers, scales = quantize_rows(x, budget, diffused=True)
    squares = [sum(int(z) ** 2 for z in row) for row in integers]
    assert max(squares) <= budget
    # Aimed at sqrt(S) - sqrt(d), and rounding moves a row by at most sqrt(d) from there.
    assert min(squares) >= max(0, isqrt(budget) - 2 * sqrt(columns) - 1) ** 2
    slack = 2.0**-20 * columns
    errors = rounding_errors(x, integers, scales)
    assert np.abs(errors).max() <= 1 + 2.0**-20
    lanes = np.pad(errors, ((0, 0), (0, -columns % LANES))).reshape(len(x), -1, LANES)
    assert np.abs(lanes.sum(axis=1)).max() <= 0.5 + slack


def test_a_row_has_the_same_integers_alone_and_among_others_in_threads() -> None:
    x = np.concatenate([gradients(300, 4099), np.zeros((1, 4099), np.float32)])
    order = np.random.default_rng(3).permutation(len(x))
    integers, scales = quantize_rows(x, 10**13, diffused=True)
    shuffled, same = quantize_rows(x[order], 10**13, diffused=True)
    assert np.array_equal(shuffled, integers[order]) and np.array_equal(same, scales[order])
    for row in (0, 17, 299):
        alone, scale = quantize_rows(x[row : row + 1], 10**13, diffused=True)
        assert np.array_equal(alone[0], integers[row]) and scale[0] == scales[row]
    assert not integers[300].any() and np.isinf(scales[300])


def test_long_contractions_backward_are_diffused_and_no_others() -> None:
    assert DIFFUSED_CONTRACTION == 4096
    for direction in Direction:
        for columns in (1, 4095, 4096, 32_768):
            expected = direction is Direction.BACKWARD and columns >= 4096
            assert Product(direction, (Span("a", 0, columns),)).diffused is expected
    # Of several layers together, and of the rest of a vocabulary that was cut.
    assert [x.diffused for x in backward_products([("gate", 2048), ("up", 2048)])] == [True]
    assert [x.diffused for x in backward_products([("head", 32_768 + 4095)])] == [True, False]
    assert [x.diffused for x in forward_products(["down"], 32_768 + 4096)] == [False, False]


@pytest.mark.parametrize("source", [ShareSource(2, Q31), UnmaskedSource(Q31)], ids=["shares", "reference"])
@pytest.mark.parametrize("columns", [4095, 4096])
@pytest.mark.parametrize("direction", Direction)
def test_operands_are_rounded_as_their_product_says(
    source: MaskSource, columns: int, direction: Direction
) -> None:
    product = Product(direction, (Span("a", 0, columns),))
    x, v = gradients(5, columns), np.arange(columns, dtype=np.uint32)[None]
    scale = np.random.default_rng(2).uniform(1e-3, 2, columns).astype(np.float32)
    integers, expected = quantize_rows(x, 10**13, scale, product.diffused)
    assert product.diffused != np.array_equal(integers, quantize_rows(x, 10**13, scale)[0])
    masked, scales = source.hide_reals(x, product, 10**13, scale, v)
    total = sum(share.residues.astype(np.int64) for share in masked.shares[-1:]) - sum(
        share.residues.astype(np.int64) for share in masked.shares[:-1]
    )
    assert np.array_equal(total % Q31.modulus, integers % Q31.modulus)
    assert np.array_equal(scales, expected)
    twice, _ = source.hide_reals_twice(x, product, 10**13, scale)
    assert twice.shares[-1].shape == (10, columns)


def relative_errors(x: NDArray[np.float32], layer_scales: NDArray[np.float32], m: Reals) -> list[float]:
    """Of the backward product, log2: rounded to the nearest integers, and with the error diffused."""
    budget = square_budget(Q31, int((m**2).sum(axis=0).max()))
    exact = (x.astype(np.float64) * layer_scales) @ m
    found = []
    for diffused in (False, True):
        integers, scales = quantize_rows(x, budget, layer_scales, diffused)
        y = (integers.astype(np.float64) @ m).astype(np.int32)  # exact: below 2^53
        error = np.linalg.norm(dequantize_rows(y, scales) - exact) / np.linalg.norm(exact)
        found.append(float(np.log2(error)))
    return found


def test_a_softmax_of_8192_classes_loses_no_small_probabilities() -> None:
    generator = np.random.default_rng(5)
    # The columns of a head have a mean, which is all that many small probabilities leave of it.
    m = np.rint(generator.normal(generator.normal(0, 12, 64), 35, (8192, 64))).clip(-127, 127)
    x = gradients(16, 8192)
    nearest, diffused = relative_errors(x, np.ones(8192, np.float32), m)
    assert nearest > -11.5 and diffused < -12.5, (nearest, diffused)
    # Each row's integers add up to what they stand for, but for half a unit in each lane.
    lost = [rounding_errors(x, *quantize_rows(x, 1 << 36, None, how)).sum(axis=1) for how in (False, True)]
    assert np.abs(lost[0]).max() > 100 and np.abs(lost[1]).max() <= LANES / 2


@pytest.mark.hf
def test_the_gradient_of_a_real_head_keeps_its_precision() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = asset("models/tiny-llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = [x["question"] + "\n" + x["rationale"] for x in json_lines("data/gsm8k/train.jsonl", 4)]
    ids = [tokenizer(row, truncation=True, max_length=96)["input_ids"] for row in rows]
    with torch.no_grad():
        logits = [model(torch.tensor([x])).logits[0, :-1] for x in ids]
    targets = torch.cat([torch.tensor(x[1:]) for x in ids])
    gradient = torch.softmax(torch.cat(logits).float(), 1) - torch.nn.functional.one_hot(targets, 8192)
    head = quantize_int8(model.get_output_embeddings().weight)
    m = head.integers.numpy().astype(np.float64)
    nearest, diffused = relative_errors(gradient.numpy(), np.asarray(head.scales), m)
    assert nearest > -10 and diffused < -11.5, (nearest, diffused)
