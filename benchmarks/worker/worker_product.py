"""How close is a worker's product to four int8 passes?

    python -m benchmarks.worker.worker_product [--device cuda] [--models 1b 8b 70b] [--direction backward]
        [--rows 64 256 1024 4096] [--each-method] [--json FILE]

Times operand . M mod q for the layer groups of Llama models, from uint32 rows in the host's memory to
uint32 rows in the host's memory, as a worker does it, with layers that it loaded one after another, against

- limit: `torch._int_mm` on four times the rows, both operands contiguous, written to memory that is there
  already. The product cannot do without these four passes. limit / product is 1 where nothing is lost, and
  0.85 is wanted from 1024 rows on.
- bf16 and fp32 products of the same shape.

All four take turns in one process, and the figures are medians. Before anything is timed, rows of the product
are compared with 64-bit integers. Weights are random. Where the layers of a group contract more than a
product may, backward, one product is timed.

With --each-method, all ways to multiply int8 that are exact here take turns instead, and the figures are
core-seconds relative to the library's. To hold the library to AVX-512 VNNI on a processor with AMX, set
ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI; OMP_WAIT_POLICY=PASSIVE keeps its threads from spinning, as in a worker.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.measuring import in_turns, machine, print_table, write_json
from blindtune.protocol.kernels.allocator import keep_freed_memory
from blindtune.protocol.multiplication.exactness import int8_methods, is_exact
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Direction, Product, backward_products, forward_products
from blindtune.protocol.residues import Residues
from blindtune.protocol.weights import IntegerLayer
from blindtune.server.daemon import KEPT_BYTES
from blindtune.server.store import LayerStore

# Hidden size, features of k and v, features of gate and up.
MODELS = {"1b": (2048, 512, 8192), "8b": (4096, 1024, 14336), "70b": (8192, 1024, 28672)}
ROWS = (64, 256, 1024, 4096)
_CHECKED_ROWS = 3


def groups(model: str) -> dict[str, tuple[int, list[int]]]:
    """Input features of each layer group, and the output features of its layers."""
    hidden, kv, inner = MODELS[model]
    return {
        "q,k,v": (hidden, [hidden, kv, kv]),
        "o": (hidden, [hidden]),
        "gate,up": (hidden, [inner, inner]),
        "down": (inner, [hidden]),
    }


def product_of(direction: Direction, in_features: int, out_features: list[int]) -> Product:
    """The group's product, or the first of them where it takes several."""
    names = [str(i) for i in range(len(out_features))]
    if direction is Direction.FORWARD:
        return forward_products(names, in_features)[0]
    return backward_products(zip(names, out_features, strict=True))[0]


def require_exact(result: Residues, operand: Residues, matrix: torch.Tensor) -> None:
    """Compares some rows with products of 64-bit integers.

    Raises:
        SystemExit: they differ, so no figure of this product means anything.
    """
    for row in np.linspace(0, len(operand) - 1, _CHECKED_ROWS, dtype=int):
        x = torch.from_numpy(operand[row : row + 1].astype(np.int64))
        x[x > Q31.modulus // 2] -= Q31.modulus
        for start in range(0, matrix.shape[1], 1024):  # in parts, since int64 takes eight times the memory
            part = matrix[:, start : start + 1024].cpu().to(torch.int64)
            expected = torch.remainder(x @ part, Q31.modulus)[0].numpy()
            if not np.array_equal(expected, result[row, start : start + 1024]):
                raise SystemExit("the product is wrong")


def loaded(
    direction: Direction, shape: tuple[int, list[int]], device: torch.device
) -> tuple[Product, Multiplier, torch.Tensor]:
    """A group's product, a worker's multiplier for it, and its matrix [contraction, outputs], all random."""
    generator = np.random.default_rng(0)
    wanted = product_of(direction, *shape)
    layers = []
    for span, width in zip(wanted.spans, shape[1], strict=False):
        integers = torch.from_numpy(generator.integers(-127, 128, (width, shape[0]), dtype=np.int8))
        layers.append((span.layer, IntegerLayer(integers, np.ones(width, np.float32))))
    store = LayerStore.from_layers(layers, device, model="random")
    stacked = torch.cat([store.layers[name].integers for name, _ in layers])
    matrix = stacked.t().contiguous() if direction is Direction.FORWARD else stacked
    return wanted, store.multiplier(), matrix


def random_rows(rows: int, columns: int) -> Residues:
    """An operand."""
    return np.random.default_rng(1).integers(0, Q31.modulus, (rows, columns), dtype=np.uint32)


def four_passes(rows: int, matrix: torch.Tensor) -> Callable[[], object]:
    """The int8 product that nothing can do without."""
    limbs = torch.randint(-128, 128, (Q31.limbs * rows, len(matrix)), dtype=torch.int8, device=matrix.device)
    sums = torch.zeros((len(limbs), matrix.shape[1]), dtype=torch.int32, device=matrix.device)
    return lambda: torch._int_mm(limbs, matrix, out=sums)


def plain_product(rows: int, matrix: torch.Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """The same product of floating-point numbers."""
    x = torch.randn(rows, len(matrix), device=matrix.device).to(dtype)
    return partial(torch.matmul, x, matrix.to(dtype))


def cases(
    models: Iterable[str], names: Iterable[str], directions: Iterable[Direction], each_rows: Sequence[int]
) -> Iterator[tuple[dict[str, Any], Direction, tuple[int, list[int]]]]:
    """What is timed: how results name it, the direction, and the group's shape."""
    for model, direction, group in itertools.product(models, directions, names):
        for rows in each_rows:
            named = {"model": model, "direction": direction.name.lower(), "group": group, "rows": rows}
            yield named, direction, groups(model)[group]


def measure(
    direction: Direction, shape: tuple[int, list[int]], rows: int, device: torch.device, seconds: float
) -> dict[str, float | str]:
    """Seconds of the worker's product and of what it is compared with."""
    wanted, multiplier, matrix = loaded(direction, shape, device)
    operand = random_rows(rows, wanted.contraction)
    require_exact(multiplier.multiply(wanted, operand, Q31), operand, matrix)
    functions: dict[str, Callable[[], object]] = {
        "product": lambda: multiplier.multiply(wanted, operand, Q31),
        "limit": four_passes(rows, matrix),
        "bf16": plain_product(rows, matrix, torch.bfloat16),
        "fp32": plain_product(rows, matrix, torch.float32),
    }
    settle = partial(torch.cuda.synchronize, device) if device.type == "cuda" else None
    return in_turns(functions, seconds, settle) | {"method": multiplier.methods[Q31.name].name}


def measure_methods(
    direction: Direction, shape: tuple[int, list[int]], rows: int, device: torch.device, seconds: float
) -> dict[str, float]:
    """Core-seconds of the product in each way that is exact, by the way's name, the library's last."""
    wanted, multiplier, matrix = loaded(direction, shape, device)
    operand = random_rows(rows, wanted.contraction)
    functions: dict[str, Callable[[], object]] = {}
    for method in int8_methods(Q31, device):
        if is_exact(method, wanted.contraction, device):
            one = copy(multiplier)
            one.methods = {Q31.name: method}
            require_exact(one.multiply(wanted, operand, Q31), operand, matrix)
            functions[method.name] = partial(one.multiply, wanted, operand, Q31)
    settle = partial(torch.cuda.synchronize, device) if device.type == "cuda" else None
    return in_turns(functions, seconds, settle, time.process_time)


def print_methods(results: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """A table of what `measure_methods` found."""
    headings = ["model", "direction", "layers", "rows"]
    headings += [f"{name} (core-ms)" for name in names] + [f"{name} / {names[-1]}" for name in names[:-1]]
    print_table(
        headings,
        [
            [r["model"], r["direction"], r["group"], r["rows"]]
            + [f"{1000 * r[name]:.2f}" for name in names]
            + [f"{r[name] / r[names[-1]]:.2f}" for name in names[:-1]]
            for r in results
        ],
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["1b"])
    parser.add_argument("--groups", nargs="+", choices=groups("1b"), default=list(groups("1b")))
    parser.add_argument("--direction", choices=["forward", "backward", "both"], default="both")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each shape; five rounds at least")
    parser.add_argument("--each-method", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    keep_freed_memory(KEPT_BYTES)  # as a worker does
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    directions = [x for x in Direction if options.direction in ("both", x.name.lower())]
    if options.each_method:
        found = [
            (named, measure_methods(direction, shape, named["rows"], device, options.seconds))
            for named, direction, shape in cases(options.models, options.groups, directions, options.rows)
        ]
        print_methods([named | times for named, times in found], list(found[0][1]))
        if options.json:
            write_json(options.json, [named | times for named, times in found], device=str(device))
        return
    results = [
        named | measure(direction, shape, named["rows"], device, options.seconds)
        for named, direction, shape in cases(options.models, options.groups, directions, options.rows)
    ]
    table = [
        [r["model"], r["direction"], r["group"], r["rows"], r["method"], f"{r['limit'] / r['product']:.2f}"]
        + [f"{r['product'] / r[name]:.2f}" for name in ("bf16", "fp32")]
        for r in results
    ]
    print_table(
        [
            "model",
            "direction",
            "layers",
            "rows",
            "method",
            "limit / product",
            "product / bf16",
            "product / fp32",
        ],
        table,
    )
    if options.json:
        write_json(options.json, results, device=str(device))


if __name__ == "__main__":
    main()
