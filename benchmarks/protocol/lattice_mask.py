"""What does a lattice mask cost the client?

    python -m benchmarks.protocol.lattice_mask [--rank6] [--rounds 15] [--json FILE]

Nanoseconds an element for masking an operand, for unmasking its product (as wide as the operand), and
for drawing the noise, which is a part of masking. The machine may be shared, so each figure is a median
over rounds that alternate with a copy of the same matrix, and also comes as a multiple of that copy.
Operands shorter than a block of 256 rows share one: a round is as many operands as fill a block.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from blindtune.protocol.lattice.hint import packed_shape
from blindtune.protocol.lattice.noise import centred_binomial
from blindtune.protocol.lattice.parameters import DEGREE, MLWE1280, MLWE1536, LatticeParameters
from blindtune.protocol.lattice.source import LatticeSource
from blindtune.protocol.masks import MaskedOperand
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import forward_products


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(parameters: LatticeParameters, rows: int, columns: int, rounds: int) -> dict[str, float]:
    """Medians in ns an element."""
    generator = np.random.default_rng(0)
    operand = generator.integers(-(2**20), 2**20, (rows, columns), dtype=np.int32)
    response = generator.integers(0, Q31.modulus, (rows, columns), dtype=np.uint32)
    hint = generator.integers(-(2**30), 2**30, packed_shape(parameters, columns), dtype=np.int32)
    product = forward_products(["layer"], columns)[0]
    source = LatticeSource(parameters, os.urandom(32), lambda product: hint)
    copy = np.empty_like(operand)
    operands = range(max(1, DEGREE // rows))
    masked: list[MaskedOperand] = []
    steps: dict[str, Callable[[], object]] = {
        "copy": lambda: [np.copyto(copy, operand) for _ in operands],
        "noise": lambda: [centred_binomial(bytes(32), 0, rows, columns, parameters.eta) for _ in operands],
        "mask": lambda: masked.extend(source.hide_integers(operand, product) for _ in operands),
        "unmask": lambda: [masked.pop(0).reveal_integers([response]) for _ in operands],
    }
    samples = [{name: seconds(step) for name, step in steps.items()} for _ in range(rounds + 1)]
    elements = len(operands) * rows * columns
    # The first round compiles the kernels and expands A.
    return {name: statistics.median(x[name] for x in samples[1:]) / elements * 1e9 for name in steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rank6", action="store_true", help="the larger parameter set")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    parameters = MLWE1536 if arguments.rank6 else MLWE1280
    print(f"{parameters.name}, {torch.get_num_threads()} threads, {platform.machine()}")
    print("ns an element (times a memory copy)")
    print(f"{'columns':>7} {'rows':>5} {'copy':>6} {'noise':>6} {'mask':>14} {'unmask':>14}")
    table = []
    for columns in (384, 2048, 8192):
        for rows in (64, 256, 1024):
            ns = measure(parameters, rows, columns, arguments.rounds)
            table.append({"columns": columns, "rows": rows, **ns})
            both = [f"{ns[x]:6.2f} ({ns[x] / ns['copy']:4.1f}x)" for x in ("mask", "unmask")]
            print(f"{columns:7} {rows:5} {ns['copy']:6.2f} {ns['noise']:6.2f} {both[0]:>14} {both[1]:>14}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"parameters": parameters.name, "ns": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
