"""Training runs over a link, in a process of their own, so that it can live in a network namespace.

    python -m benchmarks.network.network_client

Reads a line of JSON for each run: the file of its ``recipe``, and ``watched``, the ids of processes by name.
Prints one with the samples at the ends of its steps: the monotonic time, the bytes of payload to and from all
operators so far, and the core-seconds so far of this process and of the watched ones.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before torch is imported: threads that spin while they wait would take the workers' cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import psutil
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from blindtune.client.cli.progress import JsonObserver
from blindtune.client.cli.quiet import quiet_libraries
from blindtune.client.recipe import load_recipe
from blindtune.client.runs.run import train_recipe
from blindtune.client.training.figures import Figures


class Steps(TrainerCallback):
    """Takes a sample at the end of each step."""

    def __init__(
        self, so_far: Callable[[], Figures], others: dict[str, Sequence[int]], samples: list[dict[str, Any]]
    ) -> None:
        self._so_far = so_far
        self._samples = samples
        self._others = {name: [psutil.Process(x) for x in pids] for name, pids in others.items()}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        figures = self._so_far()
        cores = {name: sum(map(_core_seconds, found)) for name, found in self._others.items()}
        sample = {
            "time": time.monotonic(),
            "up": figures.bytes_up,
            "down": figures.bytes_down,
            "rounds": figures.rounds,
            "cores": {"client": time.process_time()} | cores,
            # All that runs on this machine, since what else does takes cores from the run.
            "busy": _busy(),
        }
        self._samples.append(sample)


def _core_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _busy() -> float:
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


class Watching(JsonObserver):
    """Shows nothing, and keeps samples of the steps."""

    def __init__(self, others: dict[str, Sequence[int]]) -> None:
        self.samples: list[dict[str, Any]] = []
        self._others = others

    def say(self, message: str) -> None: ...
    def data(self, data: Any) -> None: ...
    def steps(self, so_far: Callable[[], Figures]) -> TrainerCallback:
        return Steps(so_far, self._others, self.samples)


def main() -> None:
    quiet_libraries()
    for line in sys.stdin:
        wanted = json.loads(line)
        observer = Watching(wanted["watched"])
        train_recipe(load_recipe(Path(wanted["recipe"])), observer)
        print(json.dumps(observer.samples), flush=True)


if __name__ == "__main__":
    main()
