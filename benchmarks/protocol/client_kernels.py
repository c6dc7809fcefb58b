"""What does a private product cost the client, in both modes?

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.protocol.client_kernels [--quick] [--json FILE]

Without that setting, OpenMP's threads spin after the bf16 product and count as the next step's work.

The client's whole work on one product with as many outputs as inputs: fixed point, masks, verification of
all answers, unmasking, and the way back to float32. Network and workers are left out. ``up`` is from float32
to masked residues and what is expected of answers, ``down`` from verified answers to float32. Times are
medians; all steps take turns with a copy of the same float32 matrix in memory and with the layer that is
handed away, computed here in bf16. ``core-ns`` is processor time of this process, over all its threads.

The second table compares the steps with what bounds them, see `client_bounds`; ``bound`` is the longer of the
two. The third says from which width on handing the layer away saves the client work: its cost of a product,
relative to the local one. All count one direction of one layer.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.measuring import machine, print_table, write_json
from benchmarks.protocol.client_bounds import bounds
from blindtune.protocol.fixed_point import square_budget
from blindtune.protocol.kernels.allocator import keep_freed_memory
from blindtune.protocol.lattice.hint import packed_shape
from blindtune.protocol.lattice.parameters import MLWE1280
from blindtune.protocol.lattice.source import LatticeSource
from blindtune.protocol.masks import MaskSource
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Product, forward_products
from blindtune.protocol.residues import Residues
from blindtune.protocol.shares.source import ShareSource
from blindtune.protocol.verification import CheckVectors

MODES = ("shares", "lattice")
STEPS = ("up", "verify", "down")
_LEAST_ROUNDS = 5
_BOUNDED = (1024, 2048)


class Client:
    """One product of one mode, as a client goes through it.

    The answers are right for a layer of zeros, whose verification vectors v are zeros: a check passes, and
    takes as long as any that does. What comes out of the steps is of no meaning.
    """

    def __init__(self, mode: str, x: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        rows, width = x.shape
        generator = np.random.default_rng(0)
        self.x, self.budget = x, square_budget(Q31, width * 40 * 40)
        (self.product,) = forward_products(["layer"], width)
        self.output_scale = generator.uniform(1e-3, 1e-2, width).astype(np.float32)
        self.source = _source(mode, width, generator)
        s = generator.integers(0, Q31.modulus, (Q31.hint_vectors, width), dtype=np.uint32)
        self.check = CheckVectors(s, np.zeros_like(s), Q31)
        # Written to, because fresh zeros are one page of memory many times over, which no answer is.
        self.answers = [np.empty((rows, width), np.uint32) for _ in range(self.source.operators)]
        for answer in self.answers:
            answer.fill(0)

    def up(self) -> None:
        self.masked, self.scales = self.source.hide_reals(
            self.x, self.product, self.budget, None, self.check.everyday
        )

    def verify(self) -> None:
        for share, answer in zip(self.masked.shares, self.answers, strict=True):
            if share.expected is None:
                self.check.verify(share.residues, answer)
            else:
                self.check.verify_expected(share.expected, answer)

    def down(self) -> None:
        self.y = self.masked.reveal_reals(self.answers, self.scales, self.output_scale)


def _source(mode: str, width: int, generator: np.random.Generator) -> MaskSource:
    if mode == "shares":
        return ShareSource(2, Q31)
    hint = generator.integers(-(2**30), 2**30, packed_shape(MLWE1280, width), dtype=np.int32)

    def hints(product: Product) -> Residues:
        return hint

    return LatticeSource(MLWE1280, os.urandom(32), hints)


def measure(rows: int, width: int, seconds: float) -> dict[str, dict[str, tuple[float, float]]]:
    """Median wall and processor ns an element of steps, of what they are compared with, and of bounds."""
    x = np.random.default_rng(1).standard_normal((rows, width)).astype(np.float32)
    copied = np.empty_like(x)
    activation = torch.from_numpy(x).bfloat16()
    weight = torch.randn(width, width).bfloat16()
    clients = {mode: Client(mode, x) for mode in MODES}
    functions: dict[tuple[str, str], Callable[[], object]] = {
        ("compared", "copy"): lambda: np.copyto(copied, x),
        ("compared", "bf16"): lambda: activation @ weight,
    }
    for mode, client in clients.items():
        functions |= {(mode, step): getattr(client, step) for step in STEPS}
    if (rows, width) == _BOUNDED:
        functions |= bounds(rows, width)
    samples: dict[tuple[str, str], list[tuple[float, float]]] = {name: [] for name in functions}
    begun, rounds = time.perf_counter(), 0
    while rounds <= _LEAST_ROUNDS or time.perf_counter() - begun < seconds:
        for name, function in functions.items():
            wall, core = time.perf_counter(), time.process_time()
            function()
            samples[name].append((time.perf_counter() - wall, time.process_time() - core))
        rounds += 1
    found: dict[str, dict[str, tuple[float, float]]] = {group: {} for group, _ in functions}
    for (group, step), values in samples.items():
        # The first round compiles kernels and expands the lattice's public matrix.
        wall, core = (statistics.median(column) / x.size * 1e9 for column in zip(*values[1:], strict=True))
        found[group][step] = wall, core
    return found


def _lines(rows: int, width: int, found: dict[str, dict[str, tuple[float, float]]]) -> list[list[object]]:
    copy, local = found["compared"]["copy"][0], found["compared"]["bf16"][0]
    lines: list[list[object]] = []
    for mode in MODES:
        steps = found[mode]
        parts = {step: [step] for step in STEPS}
        parts["all"] = list(STEPS)
        for name, members in parts.items():
            wall, core = (sum(steps[x][i] for x in members) for i in range(2))
            figures = f"{wall:.2f}", f"{core:.2f}", f"{wall / copy:.1f}", f"{wall / local:.3f}"
            lines.append([mode, width, rows, name, *figures])
    return lines


def _bound_lines(found: dict[str, dict[str, tuple[float, float]]]) -> list[list[object]]:
    lines: list[list[object]] = []
    for mode in MODES:
        totals = [0.0, 0.0]
        for step in STEPS:
            name = f"{mode} {step}"
            memory, arithmetic = (found[part].get(name, (0.0,))[0] for part in ("memory", "arithmetic"))
            bound, taken = max(memory, arithmetic), found[mode][step][0]
            totals = [totals[0] + bound, totals[1] + taken]
            figures = (f"{x:.2f}" for x in (memory, arithmetic, bound, taken, bound / taken))
            lines.append([mode, step, *figures])
        bound, taken = totals
        lines.append([mode, "all", "", "", f"{bound:.2f}", f"{taken:.2f}", f"{bound / taken:.2f}"])
    return lines


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each shape")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(machine(), flush=True)
    keep_freed_memory()  # as a client does
    shapes = [(rows, width) for width in (384, 2048, 8192) for rows in (64, 256, 1024, 4096)]
    widths: tuple[int, ...] = (384, 1024, 2048, 4096, 8192, 16384)
    if options.quick:
        shapes, widths = [(64, 2048), (256, 2048), (1024, 2048)], (384, 1024, 2048)
    results = []
    lines = []
    bound_lines: list[list[object]] = []
    for rows, width in shapes:
        found = measure(rows, width, options.seconds)
        results.append({"rows": rows, "width": width, "ns": found})
        lines += _lines(rows, width, found)
        if (rows, width) == _BOUNDED:
            bound_lines = _bound_lines(found)
    print("\nns an element of the operand\n")
    print_table(["mode", "width", "rows", "step", "ns", "core-ns", "x copy", "x local bf16"], lines)
    print(f"\n{_BOUNDED[0]} x {_BOUNDED[1]}: ns an element, and what bounds it\n")
    print_table(["mode", "step", "memory", "arithmetic", "bound", "step's ns", "bound / step"], bound_lines)
    crossover = []
    for width in widths:
        found = measure(1024, width, options.seconds)
        local = found["compared"]["bf16"][0]
        ratios = {mode: sum(wall for wall, _ in found[mode].values()) / local for mode in MODES}
        crossover.append({"width": width, **ratios})
    print("\nThe client's work on a product of 1024 rows, relative to computing it here in bf16\n")
    print_table(
        ["width", *MODES],
        [[x["width"], *(f"{x[mode]:.3f}" for mode in MODES)] for x in crossover],
    )
    if options.json:
        write_json(options.json, {"steps": results, "crossover": crossover})


if __name__ == "__main__":
    main()
