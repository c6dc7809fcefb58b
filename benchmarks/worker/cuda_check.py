"""Is everything that a worker computes on this GPU exact, and what does it take?

    python -m benchmarks.worker.cuda_check [--device cuda:0] [--models 1b 8b 70b] [--rows 256 1024]
        [--json FILE]

First each method for GPUs is compared, as a worker does before it serves, with 64-bit integers at the
contraction lengths of the models, and its expansion of seeds with the host's; and then, for whole blocks of
rows, so are the limbs of seeds. After that, for layer groups of Llama models in both directions, these take
turns in one process:

- product: from rows in the host's memory to rows in the host's memory, as a worker does it
- limit: `torch._int_mm` on four times the rows, without which there is no product
- bf16: a product of the same shape, all of it on the GPU
- seed and host seed: the product of rows of a seed that the GPU expands, and that the host expands
- expansion and host expansion: of those rows, to limbs on the GPU

Figures are ratios of medians, and the JSON has the seconds. Ends with status 1 if anything was not exact, and
with 2 where there is no GPU.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.measuring import in_turns, machine, print_table, write_json
from benchmarks.worker.worker_product import (
    MODELS,
    cases,
    four_passes,
    groups,
    loaded,
    plain_product,
    random_rows,
    require_exact,
)
from blindtune.protocol.expansion import Seed
from blindtune.protocol.multiplication.exactness import expand_on_host_unless_exact, int8_methods, is_exact
from blindtune.protocol.multiplication.methods import FloatProduct, Method
from blindtune.protocol.operands import SeededRows
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Direction, contraction_lengths

KEY = bytes(range(32))
# Blocks of rows as workers take them, with words that are rejected once and twice; and where 32 bits of the
# row, or the first column of a part, are easily lost.
BLOCKS = (
    SeededRows(Seed(KEY, Q31, 74_000), 1024, 4096),
    SeededRows(Seed(KEY, Q31, 2**32 - 500), 1024, 8192),
    SeededRows(Seed(KEY, Q31, 2**63 - 1000), 1000, 1537, first_column=152_007),
    SeededRows(Seed(KEY, Q31, 2**40), 255, 28_672),
    SeededRows(Seed(KEY, Q31, 3), 8, 512, first_column=15),
)


def checks(device: torch.device, lengths: list[int]) -> Iterator[dict[str, Any]]:
    """What was compared, and how it ended."""
    for method in (*int8_methods(Q31, device), FloatProduct(Q31, device)):
        for length in lengths:
            exact = partial(is_exact, method, length, device)
            yield {"method": method.name, "what": f"product, {length:,} terms", "outcome": outcome(exact)}
        if method.expand is None:
            continue
        expand = method.expand
        yield {"method": method.name, "what": "expansion, probes", "outcome": _probed(method, device)}
        for rows in BLOCKS:
            what = f"expansion, {rows.rows:,} x {rows.columns:,} from row {rows.seed.row_offset:,}"
            equal = partial(_same_limbs, method, expand, rows)
            yield {"method": method.name, "what": what, "outcome": outcome(equal)}


def outcome(check: Callable[[], bool]) -> str:
    try:
        return "exact" if check() else "WRONG"
    except Exception as error:  # all of the table is wanted, whatever a driver or a compiler says
        return f"does not run: {error}".splitlines()[0]


def _probed(method: Method, device: torch.device) -> str:
    said: list[str] = []
    expand_on_host_unless_exact(method, device, said.append)
    return said[0] if said else "exact"


def _same_limbs(method: Method, expand: Callable[[SeededRows], Any], rows: SeededRows) -> bool:
    (limbs, _), (expected, _) = expand(rows), method.prepare(rows.residues())
    return torch.equal(limbs, expected)


def measure(
    direction: Direction, shape: tuple[int, list[int]], rows: int, device: torch.device, seconds: float
) -> dict[str, float | str]:
    """Seconds of everything that takes turns, and the method."""
    product, multiplier, matrix = loaded(direction, shape, device)
    method = multiplier.methods[Q31.name]
    host_method = copy(method)
    host_method.expand = None
    host_multiplier = copy(multiplier)
    host_multiplier.methods = {Q31.name: host_method}
    operand = random_rows(rows, product.contraction)
    seeded = SeededRows(Seed(KEY, Q31, 2**40), rows, product.contraction)
    require_exact(multiplier.multiply(product, operand, Q31), operand, matrix)
    require_exact(multiplier.multiply(product, seeded, Q31), seeded.residues(), matrix)

    functions: dict[str, Callable[[], object]] = {
        "product": lambda: multiplier.multiply(product, operand, Q31),
        "limit": four_passes(rows, matrix),
        "bf16": plain_product(rows, matrix, torch.bfloat16),
        "seed": lambda: multiplier.multiply(product, seeded, Q31),
        "host seed": lambda: host_multiplier.multiply(product, seeded, Q31),
        "host expansion": lambda: method.prepare(seeded.residues()),
    }
    if method.expand is not None:
        functions["expansion"] = partial(method.expand, seeded)
    settle = partial(torch.cuda.synchronize, device)
    return in_turns(functions, seconds, settle) | {"method": method.name}


def _row(result: dict[str, Any]) -> list[str]:
    def ratio(a: str, b: str) -> str:
        return f"{result[a] / result[b]:.2f}" if a in result and b in result else "host only"

    return [
        *(str(result[name]) for name in ("model", "direction", "group", "rows", "method")),
        ratio("limit", "product"),
        ratio("product", "bf16"),
        ratio("seed", "product"),
        ratio("host seed", "seed"),
        ratio("host expansion", "expansion"),
        ratio("expansion", "limit"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["8b"])
    parser.add_argument("--rows", nargs="+", type=int, default=[256, 1024])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each shape; five rounds at least")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type != "cuda" or not torch.cuda.is_available():
        print(f"no CUDA device here ({options.device}, torch {torch.__version__}): nothing was checked")
        sys.exit(2)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))

    shapes = [shape for model in options.models for shape in groups(model).values()]
    lengths = {*contraction_lengths((out, inner) for inner, outs in shapes for out in outs), 1, 7, 2053}
    outcomes = list(checks(device, sorted(lengths)))
    print_table(["method", "what", "outcome"], [list(found.values()) for found in outcomes])
    print()

    results = [
        named | measure(direction, shape, named["rows"], device, options.seconds)
        for named, direction, shape in cases(options.models, groups("8b"), Direction, options.rows)
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
            "seed / product",
            "host seed / seed",
            "host / GPU expansion",
            "expansion / limit",
        ],
        [_row(result) for result in results],
    )
    if options.json:
        write_json(options.json, results, device=str(device), checks=outcomes)
    sys.exit(any(found["outcome"] != "exact" for found in outcomes))


if __name__ == "__main__":
    main()
