"""How precise is one private product?

    python -m benchmarks.protocol.precision [--json FILE]

Multiplies Gaussian rows by the int8 weights of a Gaussian layer, under both masks and with all of the
protocol's steps but the network, and prints the relative error against float64 with the same integer
weights; and, to compare, the errors that int8 weights themselves and rounding the input to bf16 make.
The last line is the backward pass of an output head of 128,256 tokens, which is cut into spans.
"""

import argparse
import json
from collections.abc import Sequence
from math import log2
from pathlib import Path

import numpy as np
import torch

from blindtune.protocol.fixed_point import dequantize_rows, quantize_rows, square_budget
from blindtune.protocol.lattice.hint import hint_request, pack_rows, packed_shape
from blindtune.protocol.lattice.parameters import MLWE1280
from blindtune.protocol.lattice.source import LatticeSource
from blindtune.protocol.masks import MaskSource
from blindtune.protocol.multiplication.exactness import exact_method
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import (
    MAX_CONTRACTION,
    Direction,
    Product,
    backward_products,
    forward_products,
)
from blindtune.protocol.residues import Centred
from blindtune.protocol.shares.source import ShareSource
from blindtune.protocol.weights import IntegerLayer, quantize_int8

ROWS = 64
COLUMNS = {"shares": 14, "lattice": 10, "int8 weights": 15, "bf16 input": 13}


class Case:
    """One layer in one direction."""

    def __init__(self, weight: torch.Tensor, direction: Direction) -> None:
        self.layer: IntegerLayer = quantize_int8(weight)
        self.weight = weight
        self.direction = direction
        out_features, in_features = weight.shape
        self.products: Sequence[Product] = (
            forward_products(["w"], in_features)
            if direction is Direction.FORWARD
            else backward_products([("w", out_features)])
        )
        lengths = {product.contraction for product in self.products}
        self.multiplier = Multiplier({"w": self.layer.integers}, exact_method(lengths, Q31))

    def matrix(self, product: Product) -> torch.Tensor:
        """The product's integers, int8 [contraction, outputs]."""
        span = product.spans[0]
        if self.direction is Direction.FORWARD:
            return self.layer.integers[:, span.start : span.stop].t()
        return self.layer.integers[span.start : span.stop]

    def hint(self, seed: bytes, product: Product) -> Centred:
        """H = A M."""
        packed = np.empty(packed_shape(MLWE1280, self.multiplier.outputs(product)), np.int32)
        for first in range(0, MLWE1280.dimension, 256):
            share = hint_request(Q31, seed, product, first, 256)
            pack_rows(self.multiplier.multiply(product, share.residues, Q31), packed, first, Q31)
        return packed

    def private(self, x: np.ndarray, source: MaskSource) -> np.ndarray:
        """The product as a client gets it, from operands [rows, contraction]."""
        forward = self.direction is Direction.FORWARD
        total, column = 0.0, 0
        for product in self.products:
            columns = slice(column, column + product.contraction)
            column = columns.stop
            magnitudes = self.matrix(product).to(torch.int32).abs()
            budget = square_budget(
                Q31, int(magnitudes.square().sum(0).max()), source.noise(int(magnitudes.sum(0).max()))
            )
            part = np.ascontiguousarray(x[:, columns])
            scales = None if forward else np.ascontiguousarray(self.layer.scales[columns])
            operand, row_scales = quantize_rows(part, budget, scales, product.diffused)
            masked = source.hide_integers(operand, product)
            answers = [self.multiplier.multiply(product, share.residues, Q31) for share in masked.shares]
            y = masked.reveal_integers(answers)
            total = total + dequantize_rows(y, row_scales, self.layer.scales if forward else None).astype(
                float
            )
        return np.asarray(total)

    def plain(self, x: np.ndarray, quantized: bool = True) -> np.ndarray:
        """The product in float64, with integer weights or the original ones."""
        weight = self.weight.double().numpy()
        if quantized:
            weight = self.layer.integers.double().numpy() * self.layer.scales[:, None].astype(float)
        return x.astype(float) @ (weight.T if self.direction is Direction.FORWARD else weight)


def relative(result: np.ndarray, expected: np.ndarray) -> float:
    return float(log2(np.linalg.norm(result - expected) / np.linalg.norm(expected)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cases = [(f"forward, d = {d}", (256, d), Direction.FORWARD) for d in (384, 2048, 8192, 28672)]
    cases.append(("head backward, 128,256", (128_256, 256), Direction.BACKWARD))
    figures = {}
    print("log2 of the relative error" + "".join(f"{kind:>{width}}" for kind, width in COLUMNS.items()))
    for name, shape, direction in cases:
        generator = torch.Generator().manual_seed(0)
        case = Case(torch.randn(shape, generator=generator) * 0.02, direction)
        width = shape[1] if direction is Direction.FORWARD else shape[0]
        x = torch.randn((ROWS, width), generator=generator)
        seed = bytes(range(32))
        hints = {product: case.hint(seed, product) for product in case.products}
        expected = case.plain(x.numpy())
        figures[name] = {
            "shares": relative(case.private(x.numpy(), ShareSource(2, Q31)), expected),
            "lattice": relative(
                case.private(x.numpy(), LatticeSource(MLWE1280, seed, hints.__getitem__)), expected
            ),
            "int8 weights": relative(expected, case.plain(x.numpy(), quantized=False)),
            "bf16 input": relative(case.plain(x.bfloat16().float().numpy()), expected),
        }
        row = figures[name]
        print(f"{name:26}" + "".join(f"{row[kind]:{width}.1f}" for kind, width in COLUMNS.items()))
    print(f"spans have at most {MAX_CONTRACTION:,} terms; parameter set {MLWE1280.name}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
