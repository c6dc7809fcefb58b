"""How precise is one private product?

    python -m benchmarks.protocol.precision [--model FOLDER ...] [--json FILE]

Multiplies rows by the int8 weights of a layer, in each masking and parameter set and with all of the
protocol's steps but the network, and prints the relative error against float64 with the same integer weights;
and, to compare, the errors of int8 weights themselves and of rounding the input to bf16. Rows are Gaussian,
heavy-tailed (Student's t with three degrees of freedom), or Gaussian with four features of 1,000 times the
rest. The head is the backward pass of one with 128,256 tokens, which is cut into spans. Certified parameter
sets scale as after sixteen steps of such rows.

With --model, the same for the layers of a checkpoint with the activations and gradients of a text (this one):
the median over its layers, and the worst.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from math import isqrt, log2, sqrt
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from blindtune.protocol.certificate.scales import certified_budget, first_level, level_above
from blindtune.protocol.fixed_point import square_budget
from blindtune.protocol.lattice.hint import hint_request, pack_rows, packed_shape
from blindtune.protocol.lattice.parameters import LATTICE_PARAMETER_SETS, LatticeParameters
from blindtune.protocol.lattice.source import LatticeSource
from blindtune.protocol.masks import MaskSource
from blindtune.protocol.multiplication.exactness import exact_method
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import PARAMETER_SETS
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
WAYS = ("q31", "q24", "mlwe1280", "mlwe1280-q24", "mlwe1024-q24")
_SEED = bytes(range(32))


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
        methods = (exact_method(lengths, x) for x in PARAMETER_SETS.values())
        self.multiplier = Multiplier({"w": self.layer.integers}, *methods)

    def matrix(self, product: Product) -> torch.Tensor:
        """The product's integers, int8 [contraction, outputs]."""
        span = product.spans[0]
        if self.direction is Direction.FORWARD:
            return self.layer.integers[:, span.start : span.stop].t()
        return self.layer.integers[span.start : span.stop]

    def source(self, way: str) -> MaskSource:
        """Of shares by one of their parameter sets, or of a lattice."""
        if way in PARAMETER_SETS:
            return ShareSource(2, PARAMETER_SETS[way])
        lattice = LATTICE_PARAMETER_SETS[way]
        hints = {product: self._hint(lattice, product) for product in self.products}
        return LatticeSource(lattice, _SEED, hints.__getitem__)

    def _hint(self, lattice: LatticeParameters, product: Product) -> Centred:
        """H = A M."""
        residues = lattice.residues
        packed = np.empty(packed_shape(lattice, self.multiplier.outputs(product)), np.int32)
        for first in range(0, lattice.dimension, 256):
            share = hint_request(residues, _SEED, product, first, 256)
            pack_rows(self.multiplier.multiply(product, share.residues, residues), packed, first, residues)
        return packed

    def private(self, x: np.ndarray, way: str) -> np.ndarray:
        """The product as a client gets it, from operands [rows, contraction]."""
        source, total, column = self.source(way), 0.0, 0
        for product in self.products:
            columns = slice(column, column + product.contraction)
            column = columns.stop
            total = total + self._private(np.ascontiguousarray(x[:, columns]), columns, product, source)
        return np.asarray(total)

    def _private(self, x: np.ndarray, columns: slice, product: Product, source: MaskSource) -> np.ndarray:
        forward = self.direction is Direction.FORWARD
        magnitudes = self.matrix(product).to(torch.int32).abs()
        square, noise = int(magnitudes.square().sum(0).max()), source.noise(int(magnitudes.sum(0).max()))

        def integers(budget: int) -> tuple[Centred, np.ndarray]:
            scales = None if forward else np.ascontiguousarray(self.layer.scales[columns])
            masked, row_scales = source.hide_reals(x, product, budget, scales)
            answers = [
                self.multiplier.multiply(product, share.residues, source.parameters)
                for share in masked.shares
            ]
            return masked.reveal_integers(answers), row_scales

        if not source.parameters.certified:
            y, row_scales = integers(square_budget(source.parameters, square, noise))
        else:
            budget_of = partial(certified_budget, source.parameters, square, noise=source.largest_noise)
            budget = budget_of(first_level(product.contraction))
            norm = isqrt(budget) - sqrt(product.contraction)
            largest = int(np.abs(integers(budget)[0].astype(np.int64)).max())
            y, row_scales = integers(budget_of(level_above(largest / (norm * sqrt(square)))))
        real = y / row_scales[:, None]
        return np.where(np.isfinite(real), real, 0.0) * (self.layer.scales.astype(float) if forward else 1.0)

    def plain(self, x: np.ndarray, quantized: bool = True) -> np.ndarray:
        """The product in float64, with integer weights or the original ones."""
        weight = self.weight.double().numpy()
        if quantized:
            weight = self.layer.integers.double().numpy() * self.layer.scales[:, None].astype(float)
        return x.astype(float) @ (weight.T if self.direction is Direction.FORWARD else weight)

    def errors(self, x: np.ndarray) -> dict[str, float]:
        """log2 of each way's relative error."""
        expected = self.plain(x)
        rounded = torch.from_numpy(x).bfloat16().float().numpy()
        return {
            **{way: relative(self.private(x, way), expected) for way in WAYS},
            "int8 weights": relative(expected, self.plain(x, quantized=False)),
            "bf16 input": relative(self.plain(rounded), expected),
        }


def relative(result: np.ndarray, expected: np.ndarray) -> float:
    return float(log2(np.linalg.norm(result - expected) / np.linalg.norm(expected)))


def gaussian(generator: torch.Generator, width: int) -> torch.Tensor:
    return torch.randn((ROWS, width), generator=generator)


def heavy_tailed(generator: torch.Generator, width: int) -> torch.Tensor:
    """Student's t with three degrees of freedom."""
    squares = torch.randn((3, ROWS, width), generator=generator).square().mean(0)
    return gaussian(generator, width) / squares.sqrt()


def outliers(generator: torch.Generator, width: int) -> torch.Tensor:
    """Four features are 1,000 times as large as the rest."""
    x = gaussian(generator, width)
    x[:, :4] *= 1000
    return x


_KINDS: dict[str, Callable[[torch.Generator, int], torch.Tensor]] = {
    "Gaussian": gaussian,
    "heavy-tailed": heavy_tailed,
    "1,000-fold features": outliers,
}


def synthetic() -> dict[str, dict[str, float]]:
    """Of random layers."""
    cases = [(f"d = {d:,}", (256, d), Direction.FORWARD) for d in (2048, 8192, 28672)]
    cases.append(("head backward, 128,256", (128_256, 256), Direction.BACKWARD))
    figures = {}
    for name, shape, direction in cases:
        generator = torch.Generator().manual_seed(0)
        case = Case(torch.randn(shape, generator=generator) * 0.02, direction)
        width = shape[1] if direction is Direction.FORWARD else shape[0]
        for kind, rows in _KINDS.items():
            figures[f"{name}, {kind}"] = row(f"{name}, {kind}", case.errors(rows(generator, width).numpy()))
    return figures


def real(folder: Path) -> dict[str, dict[str, float]]:
    """Of a checkpoint's own layers, with what they read and the gradients that they get."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    causal = "CausalLM" in (folder / "config.json").read_text()
    model = (AutoModelForCausalLM if causal else AutoModel).from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer(__doc__, return_tensors="pt", truncation=True, max_length=128)
    seen: dict[str, list[tuple[torch.Tensor, Direction]]] = {}

    def watch(name: str, module: torch.nn.Linear) -> None:
        def forward(_: Any, given: Any, output: torch.Tensor) -> None:
            seen.setdefault(name, []).append(
                (given[0].detach().reshape(-1, module.in_features), Direction.FORWARD)
            )
            output.register_hook(
                lambda g: seen[name].append((g.reshape(-1, module.out_features), Direction.BACKWARD))
            )

        module.register_forward_hook(forward)

    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, module in layers.items():
        watch(name, module)
    found = model(**inputs, labels=inputs["input_ids"]).loss if causal else model(**inputs)[0].square().mean()
    found.backward()
    figures: dict[str, dict[str, float]] = {}
    for direction in Direction:
        errors = [
            Case(layers[name].weight.detach(), direction).errors(np.ascontiguousarray(x.numpy()))
            for name, parts in seen.items()
            for x, of in parts
            if of is direction and x.any()
        ]
        for statistic, of_all in (("median", median), ("worst", max)):
            title = f"{folder.name}, {direction.name.lower()}, {statistic} of {len(errors)}"
            figures[title] = row(title, {way: of_all([x[way] for x in errors]) for way in errors[0]})
    return figures


def row(title: str, errors: dict[str, float]) -> dict[str, float]:
    """Prints a line of the table."""
    print(
        f"{title:44}" + "".join(f"{error:{max(8, len(way) + 2)}.1f}" for way, error in errors.items()),
        flush=True,
    )
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, nargs="*", default=[], help="checkpoint folders")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ways = (*WAYS, "int8 weights", "bf16 input")
    print(f"{'log2 of the relative error':44}" + "".join(f"{way:>{max(8, len(way) + 2)}}" for way in ways))
    figures = synthetic()
    for folder in arguments.model:
        figures |= real(folder)
    print(
        f"spans have at most {MAX_CONTRACTION:,} terms; q31 and q24 are sets of shares, the others of lattice"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
