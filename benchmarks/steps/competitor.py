"""One private product, next to Concrete ML's encrypted one.

    python -m benchmarks.steps.competitor --environment DIR [--features 768 2048] [--rows 8 1] [--json FILE]

Multiplies rows by a square matrix of int8 weights: with the package concrete-ml-extensions, which encrypts
the rows for one server (GLWE), and with Blindtune's two ways to mask. No network on either side. Ours
includes the fixed point, the mask, the worker's product, the check of its answer, which the other lacks, and
unmasking; ``lattice`` is taken over a whole block of 256 rows, whose cost comes with its first.

The package goes into a virtual environment of its own, made once in DIR from the package index. Only its
public functions are called. Key generation is left out, and so is the hint of ``lattice``.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import venv
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.measuring import machine, print_table, write_json
from blindtune.protocol.fixed_point import dequantize_rows, quantize_rows, square_budget
from blindtune.protocol.lattice.hint import hint_request, pack_rows, packed_shape
from blindtune.protocol.lattice.parameters import DEGREE, MLWE1280
from blindtune.protocol.lattice.source import LatticeSource
from blindtune.protocol.masks import MaskSource
from blindtune.protocol.multiplication.exactness import exact_method
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Direction, forward_products
from blindtune.protocol.residues import Centred
from blindtune.protocol.shares.source import ShareSource
from blindtune.protocol.verification import CheckVectors, check_vectors, secret_vectors
from blindtune.protocol.weights import quantize_int8

PACKAGE = "concrete_ml_extensions==0.2.0"


class Competitor:
    """A process in the other package's environment."""

    def __init__(self, environment: Path) -> None:
        python = environment / "bin" / "python"
        if not python.exists():
            venv.create(environment, with_pip=True)
            command = [str(python), "-m", "pip", "install", "--quiet", PACKAGE, "numpy"]
            subprocess.run(command, check=True, stdout=sys.stderr)
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name("competitor_product.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )
        self.keys = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {PACKAGE} ended")
        return json.loads(line)

    def product(self, features: int, rows: int) -> dict[str, Any]:
        """Figures of one product."""
        assert self._process.stdin is not None
        print(json.dumps({"features": features, "rows": rows}), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()


class Ours:
    """A square layer, and a client and a worker for it in this process."""

    def __init__(self, features: int, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._layer = quantize_int8(torch.randn((features, features), generator=generator) * 0.02)
        self._x = torch.randn((rows, features), generator=generator).numpy()
        (self._product,) = forward_products(["w"], features)
        self._worker = Multiplier({"w": self._layer.integers}, exact_method({features}, Q31))
        s = secret_vectors(os.urandom(32), "w", Direction.FORWARD, features, Q31)
        self._check = CheckVectors(s, check_vectors(self._layer.integers, s, Direction.FORWARD, Q31), Q31)
        public = os.urandom(32)
        hint = self._hint(public)
        self._sources: dict[str, MaskSource] = {
            "shares": ShareSource(2, Q31),
            "lattice": LatticeSource(MLWE1280, public, lambda product: hint),
        }

    def _hint(self, public: bytes) -> Centred:
        packed = np.empty(packed_shape(MLWE1280, len(self._layer.integers)), np.int32)
        for first in range(0, MLWE1280.dimension, DEGREE):
            share = hint_request(Q31, public, self._product, first, DEGREE)
            pack_rows(self._worker.multiply(self._product, share.residues, Q31), packed, first, Q31)
        return packed

    def product(self, masking: str) -> dict[str, Any]:
        """Figures of one product with these rows, from as many of them as use up a block."""
        source = self._sources[masking]
        magnitudes = self._layer.integers.to(torch.int32).abs()
        noise = source.noise(int(magnitudes.sum(1).max()))
        budget = square_budget(Q31, int(magnitudes.square().sum(1).max()), noise)
        # The first one compiles.
        self._once(source, budget, Counter(), Counter())
        seconds, core_seconds = Counter[str](), Counter[str]()
        count = -(-DEGREE // len(self._x))
        for _ in range(count):
            y, up = self._once(source, budget, seconds, core_seconds)
        expected = self._x.astype(float) @ (self._layer.integers.double().numpy().T * self._layer.scales)
        return {
            "seconds": {k: v / count for k, v in seconds.items()},
            "core_seconds": {k: v / count for k, v in core_seconds.items()},
            "bytes_up": up,
            "bytes_down": source.operators * 4 * y.size,
            "relative_error": float(np.linalg.norm(y - expected) / np.linalg.norm(expected)),
        }

    def _once(
        self, source: MaskSource, budget: int, seconds: Counter[str], core_seconds: Counter[str]
    ) -> tuple[np.ndarray, int]:
        clocks = time.perf_counter, time.process_time

        def lap(part: str, since: list[float]) -> list[float]:
            now = [clock() for clock in clocks]
            seconds[part] += now[0] - since[0]
            core_seconds[part] += now[1] - since[1]
            return now

        since = [clock() for clock in clocks]
        operand, scales = quantize_rows(self._x, budget, None)
        masked = source.hide_integers(operand, self._product)
        since = lap("client", since)
        answers, up = [], 0
        for share in masked.shares:
            # A worker that gets a seed expands it.
            residues = share.seed.expand(*operand.shape) if share.seed else share.residues
            answers.append(self._worker.multiply(self._product, residues, Q31))
            up += len(share.seed.key) if share.seed else share.residues.nbytes
        since = lap("server", since)
        for share, answer in zip(masked.shares, answers, strict=True):
            self._check.verify(share.residues, answer)
        y = dequantize_rows(masked.reveal_integers(answers), scales, self._layer.scales)
        lap("client", since)
        return y, up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--environment", type=Path, required=True, help="folder of the virtual environment")
    parser.add_argument("--features", type=int, nargs="+", default=[768, 2048])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 1], help="for each number of features")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(", ".join(f"{k} {v}" for k, v in machine().items()))
    competitor = Competitor(arguments.environment)
    results, table = [], []
    try:
        for features, rows in zip(arguments.features, arguments.rows, strict=True):
            ours = Ours(features, rows)
            figures = {"shares": ours.product("shares"), "lattice": ours.product("lattice")}
            figures["Concrete ML"] = theirs = competitor.product(features, rows)
            for name, x in figures.items():
                results.append({"features": features, "rows": rows, "way": name} | x)
                both = sum(x["core_seconds"].values())
                table.append(
                    [
                        f"{features} x {features}",
                        rows,
                        name,
                        *(f"{x['core_seconds'][part] / rows:.6f}" for part in ("client", "server")),
                        f"{sum(x['seconds'].values()) / rows:.6f}",
                        f"{sum(theirs['core_seconds'].values()) / both:,.0f}",
                        *(f"{x[way] / rows / features:.1f}" for way in ("bytes_up", "bytes_down")),
                        f"{x['relative_error']:.0e}",
                    ]
                )
    finally:
        competitor.close()
    key = competitor.keys["key_bytes"] / 1e6
    print(f"\n{PACKAGE}, evaluation key {key:.0f} MB. Each figure is for one row.\n")
    print_table(
        [
            "matrix",
            "rows",
            "way",
            "client (core-s)",
            "server (core-s)",
            "seconds",
            "times less than Concrete ML",
            "bytes up a value",
            "bytes down a value",
            "relative error",
        ],
        table,
    )
    if arguments.json:
        write_json(arguments.json, results, package=PACKAGE)


if __name__ == "__main__":
    main()
