"""What the benchmarks share: figures taken in turns, the machine they were taken on, and tables.

A machine is seldom quiet, so no time stands alone: what is compared takes turns in one process, and each
figure is the median over rounds.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from blindtune.client.plan.processor import processor_name

__all__ = ["in_turns", "machine", "print_table", "write_json"]

_VERSIONS = ("torch", "numpy", "numba", "grpcio", "cryptography", "transformers", "peft")
_LEAST_ROUNDS = 5


def machine() -> dict[str, Any]:
    """Processor, cores, memory in GiB, and the versions of what computes."""
    found = {
        "processor": processor_name(),
        "cores": len(psutil.Process().cpu_affinity()),
        "threads": torch.get_num_threads(),
        "memory": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found | {name: version(name) for name in _VERSIONS}


def in_turns(
    functions: Mapping[str, Callable[[], object]],
    seconds: float,
    settle: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each function.

    Args:
        functions: by name; they take turns, and the first round does not count.
        seconds: for all rounds together, about; there are at least five.
        settle: called before and after each, to wait for a device.
        clock: takes their times; `time.process_time` counts core-seconds, whoever else is at work.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    begun = time.perf_counter()
    rounds = 0
    while rounds <= _LEAST_ROUNDS or time.perf_counter() - begun < seconds:
        for name, function in functions.items():
            if settle is not None:
                settle()
            started = clock()
            function()
            if settle is not None:
                settle()
            times[name].append(clock() - started)
        rounds += 1
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table in Markdown, as it goes into the documentation."""
    cells = [[str(x) for x in row] for row in (headings, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    # What is a number in every row stands to the right.
    right = [all(_is_number(row[i]) for row in cells[1:]) for i in range(len(headings))]
    for k, row in enumerate(cells):
        fields = [x.rjust(w) if r else x.ljust(w) for x, w, r in zip(row, widths, right, strict=True)]
        print(f"| {' | '.join(fields)} |")
        if k == 0:
            marks = ["-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)]
            print(f"| {' | '.join(marks)} |", flush=True)


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "", 1).replace("-", "", 1).rstrip("%").isdigit()


def write_json(path: Path, results: object, **settings: object) -> None:
    """Writes results with the machine that they are from."""
    path.write_text(json.dumps({"machine": machine(), **settings, "results": results}, indent=1) + "\n")
