"""What does a private training step cost, next to the same step in the clear?

    python -m benchmarks.steps.step --work DIR [--model FOLDER ...] [--tokens 64 512] [--turns 3]
        [--ways local unmasked shares lattice] [--json FILE]

A step is forward, loss, backward and optimizer of a LoRA adapter of rank 16 on all linear layers, in bfloat16
on batches of four sequences of random tokens, in four ways:

    local       stock transformers and PEFT on the whole model
    unmasked    the protocol without masks, one worker (in this benchmark alone: see unmasked.py)
    shares      two operators with a worker each
    lattice     one operator

A way may name a parameter set and a quantization scheme, too: shares:q31, lattice:mlwe1536, shares+nf4.

Without --model it takes a random model of Llama-3.2-1B's shape, made once, as are kit and hints, in --work
(2.5, 0.6 and 3.1 GB). Workers are real daemons over mutual TLS; clients, workers and local are processes of
their own on this machine, which stay while the ways take turns. A turn is so many steps that a lattice block
of 256 rows is used up, since its cost comes with its first rows; figures are medians over turns.

Core-seconds count all threads of a process. Memory is anonymous memory (RssAnon), which nothing can write
back to a file: its peak from the process's start to the end of its steps with so many tokens.
"""

import argparse
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmarks.common.measuring import machine, print_table, write_json
from benchmarks.common.random_llama import llama_1b, write
from benchmarks.common.ways import Way, way_among
from benchmarks.common.worker_processes import HONEST, WorkerProcess
from blindtune.client.tls.certs import issue_operator_certificates
from blindtune.protocol.lattice.parameters import DEGREE

# Operators of each masking.
MASKINGS = {"local": (), "unmasked": ("alpha",), "shares": ("alpha", "beta"), "lattice": ("alpha",)}
parsed_way = way_among(MASKINGS)
SEQUENCES = 4
RANK = 16
# One encrypted step of Llama-3.2-1B with 64 tokens on a CPU, from the notebook of Concrete ML's private LoRA.
PUBLISHED_SECONDS = 5321.8
WANTED = {
    "step": 400.0,  # times faster than published, at least
    "client": {"shares": 1.5, "lattice": 3.0},  # times the unmasked client's core-seconds, at most
    "worker": 1.1,  # times the unmasked worker's
    "traffic": {"shares": 3.1, "lattice": 2.1},  # times bfloat16 in the clear
    "memory": 1.5e9,  # bytes of the client's anonymous memory with shares
}
_SAMPLE_SECONDS = 0.01
_MEMORY = ("RssAnon", "RssFile")
_BYTES = ("bytes_up", "bytes_down", "clear_bytes")
_TIMES = ("parts", "beside", "threads")
_HEADINGS = {
    "parts": "client's main thread (ms a step)",
    "beside": "client's other threads (ms a step)",
    "threads": "client's threads (core-ms a step)",
}


def workers_of(way: Way) -> list[str]:
    """Names of the workers that are asked, in the order of the operators."""
    return [x if way.scheme == "int8" else f"{x}-{way.scheme}" for x in MASKINGS[way.masking]]


class PeakMemory:
    """Watches how much memory a process has.

    Attributes:
        peak: most bytes so far of each kind, "RssAnon" and "RssFile".
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stop = threading.Event()
        self.peak = dict.fromkeys(_MEMORY, 0)
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.is_set():
            for kind, size in resident_bytes(self._pid).items():
                self.peak[kind] = max(self.peak[kind], size)
            self._stop.wait(_SAMPLE_SECONDS)

    def stop(self) -> None:
        """Ends it."""
        self._stop.set()
        self._thread.join()


def resident_bytes(pid: int) -> dict[str, int]:
    """Memory of a process of each kind; nothing once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    return {kind: int(fields[kind].split()[0]) * 1024 for kind in _MEMORY if kind in fields}


class Stepper:
    """A process that takes steps in one of the ways."""

    def __init__(self, way: Way, settings: dict[str, Any], folder: Path) -> None:
        self.way = way
        path = folder / f"{way.name}.json"
        options = {"quantization": way.scheme, "parameter_set": way.parameter_set}
        path.write_text(json.dumps({"way": way.masking, "rank": RANK, "seed": 0, **options, **settings}))
        self._log = path.with_suffix(".log")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.steps.step_client", str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            )
        self._memory = PeakMemory(self._process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._memory.stop()

    def answer(self) -> dict[str, Any]:
        """Its next line.

        Raises:
            RuntimeError: it ended instead.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.way.name} ended: {self._log.read_text()[-3000:]}")
        return json.loads(line)

    def step(self, length: int) -> dict[str, Any]:
        """Takes a step with sequences of some length."""
        assert self._process.stdin is not None
        asked = {"sequences": SEQUENCES, "length": length}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return self.answer()

    @property
    def peak_bytes(self) -> dict[str, int]:
        """Most memory of each kind that it had so far."""
        return dict(self._memory.peak)


@dataclass
class Turns:
    """What the turns of one way gave, each figure for one step."""

    figures: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    parts: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    beside: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    threads: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    peak_bytes: dict[str, int] = field(default_factory=dict)
    not_timed: list[str] = field(default_factory=list)

    def add(self, answers: Sequence[dict[str, Any]], workers: Sequence[Sequence[float]]) -> None:
        """One turn.

        Args:
            answers: of the client, for each step.
            workers: core-seconds of each worker, for each step.
        """
        for name in ("seconds", "core_seconds", "rounds", "requests", "retries", *_BYTES):
            self.figures[name].append(statistics.mean(x[name] for x in answers))
        self.figures["slowest"].append(max(x["seconds"] for x in answers))
        for index, seconds in enumerate(zip(*workers, strict=True)):
            self.figures[f"worker_{index}"].append(statistics.mean(seconds))
        for name in _TIMES:
            for part in {part for x in answers for part in x[name]}:
                seconds = statistics.mean(x[name].get(part, 0.0) for x in answers)
                getattr(self, name)[part].append(seconds)
        self.not_timed = answers[-1]["not_timed"]

    def plain(self) -> dict[str, Any]:
        """Medians."""
        medians = {name: statistics.median(values) for name, values in self.figures.items()}
        return medians | {
            "turns": len(self.figures["seconds"]),
            "each_turn": self.figures["seconds"],
            "peak_bytes": self.peak_bytes,
            "not_timed": self.not_timed,
            **{
                name: {part: statistics.median(values) for part, values in getattr(self, name).items()}
                for name in _TIMES
            },
        }


@contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """Waits until nobody else holds the lock."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepared_kit(model: Path, work: Path, scheme: str) -> Path:
    """The kit of a checkpoint, made as a user makes it."""
    kit = work / f"{model.name}-kit{'' if scheme == 'int8' else f'-{scheme}'}"
    if not kit.exists():
        command = [sys.executable, "-m", "blindtune.client.cli", "prepare", str(model), "-o", str(kit)]
        subprocess.run([*command, "--quantization", scheme], check=True, stdout=sys.stderr)
    return kit


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process so far, those that have ended included."""
    # What clock_getcpuclockid gives; the counts in /proc have steps of 10 ms.
    return time.clock_gettime((~pid << 3) | 2)


def start_workers(
    stack: ExitStack, model: Path, names: dict[str, str], threads: int | None, folder: Path
) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """A worker for each name and its scheme: its process id, and what a client is told of the operator."""
    started: dict[str, WorkerProcess] = {}
    operators = {}
    for index, (name, scheme) in enumerate(names.items()):
        host = f"127.0.0.{index + 2}"
        own = issue_operator_certificates(folder, name, [host]).ca.parent
        options = [
            *("--model", str(model), "--quantization", scheme, "--tls-client-ca", str(own / "ca.pem")),
            *("--tls-cert", str(own / "worker.pem"), "--tls-key", str(own / "worker-key.pem")),
            *([] if threads is None else ["--threads", str(threads)]),
        ]
        started[name] = worker = WorkerProcess(HONEST, options, host, own / "worker.log")
        worker.start()
        stack.callback(worker.kill)
    for name, worker in started.items():
        worker.wait_until_listening()
        own = folder / name
        files = {"ca": "ca.pem", "cert": "client.pem", "key": "client-key.pem"}
        operators[name] = {"name": name, "workers": [worker.address]} | {
            key: str(own / file) for key, file in files.items()
        }
    return {name: x.process.pid for name, x in started.items()}, operators


def measure(model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of all ways with one model, by number of tokens."""
    work: Path = arguments.work
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with alone(arguments.alone):
            kits = {x.scheme: prepared_kit(model, work, x.scheme) for x in arguments.ways if workers_of(x)}
            names = {name: x.scheme for x in arguments.ways for name in workers_of(x)}
            workers, operators = start_workers(stack, model, names, arguments.threads, folder)
            steppers = []
            # One after the other: a client that obtains hints, or a model being read, would slow the others.
            for way in arguments.ways:
                asked = [operators[name] for name in workers_of(way)]
                settings = {"model": str(kits[way.scheme] if asked else model), "operators": asked}
                steppers.append(stack.enter_context(Stepper(way, settings, folder)))
                results["trained"] = steppers[-1].answer()["trained"]
        for tokens in arguments.tokens:
            warm_up = arguments.warm_up  # the first step of a size also takes its memory from the system
            turns = {way.name: Turns() for way in arguments.ways}
            steps = max(arguments.steps, -(-DEGREE // tokens))
            for _ in range(arguments.turns):
                with alone(arguments.alone):
                    for stepper in steppers * warm_up:  # compiles kernels, and opens connections
                        stepper.step(tokens // SEQUENCES)
                    warm_up = 0
                    one_turn(steppers, steps, tokens, workers, turns)
            results[str(tokens)] = figures = {way: x.plain() for way, x in turns.items()}
            show(model.name, tokens, figures)
        results["workers"] = {name: resident_bytes(pid) for name, pid in workers.items()}
    return results


def one_turn(
    steppers: Sequence[Stepper], steps: int, tokens: int, workers: dict[str, int], turns: dict[str, Turns]
) -> None:
    """Has all ways take some steps, one step each at a time, and adds the figures to those so far."""
    answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    used: dict[str, list[list[float]]] = defaultdict(list)
    for _ in range(steps):
        for stepper in steppers:
            asked = [workers[name] for name in workers_of(stepper.way)]
            before = [cpu_seconds(pid) for pid in asked]
            answers[stepper.way.name].append(stepper.step(tokens // SEQUENCES))
            after = [cpu_seconds(pid) for pid in asked]
            used[stepper.way.name].append([x - y for x, y in zip(after, before, strict=True)])
    for stepper in steppers:
        way = stepper.way.name
        turns[way].add(answers[way], used[way])
        turns[way].peak_bytes = stepper.peak_bytes
        seconds = statistics.mean(x["seconds"] for x in answers[way])
        what = f"{way}, {tokens} tokens: {seconds:.3f} s a step, loss {answers[way][-1]['loss']:.4f}"
        print(what, file=sys.stderr, flush=True)


def _operators(name: str) -> int:
    return len(workers_of(parsed_way(name)))


def ratio(figure: float, base: dict[str, Any] | None, name: str) -> str:
    """How many times another way's figure, where that was measured."""
    return f"{figure / base[name]:.2f}" if base and base.get(name) else "-"


def show(name: str, tokens: int, ways: dict[str, dict[str, Any]]) -> None:
    """Tables for one model and number of tokens."""
    local, unmasked = ways.get("local"), ways.get("unmasked")
    rows = []
    for way, x in ways.items():
        workers = [x[f"worker_{i}"] for i in range(_operators(way))]
        traffic = (x["bytes_up"] + x["bytes_down"]) / x["clear_bytes"] if x["clear_bytes"] else 0.0
        rows.append(
            [
                way,
                f"{x['seconds']:.3f}",
                ratio(x["seconds"], local, "seconds"),
                f"{x['core_seconds']:.3f}",
                ratio(x["core_seconds"], unmasked, "core_seconds"),
                " + ".join(f"{s:.3f}" for s in workers) or "-",
                " + ".join(ratio(s, unmasked, "worker_0") for s in workers) or "-",
                f"{x['peak_bytes']['RssAnon'] / 1e6:,.0f}",
                f"{x['peak_bytes']['RssFile'] / 1e6:,.0f}",
                f"{x['bytes_up'] / 1e6:.1f}",
                f"{x['bytes_down'] / 1e6:.1f}",
                f"{traffic:.2f}" if traffic else "-",
                f"{x['rounds']:g}",
            ]
        )
    print(f"\n{name}, {tokens} tokens\n")
    print_table(
        [
            "way",
            "step (s)",
            "x local",
            "client (core-s)",
            "x unmasked",
            "workers (core-s)",
            "x unmasked",
            "client's memory (MB)",
            "mapped files (MB)",
            "up (MB)",
            "down (MB)",
            "x bf16",
            "rounds",
        ],
        rows,
    )
    remote = {way: x for way, x in ways.items() if x["rounds"]}
    for kind, heading in _HEADINGS.items():
        names = sorted(
            {part for x in remote.values() for part in x[kind]},
            key=lambda part: -max(x[kind].get(part, 0.0) for x in remote.values()),
        )
        where = [[part, *(f"{x[kind].get(part, 0.0) * 1e3:.1f}" for x in remote.values())] for part in names]
        if where:
            print()
            print_table([heading, *remote], where)
    for missing in sorted({name for x in remote.values() for name in x["not_timed"]}):
        print(f"\n{missing} is not there, so its time counts to what calls it.")


def verdicts(ways: dict[str, dict[str, Any]]) -> list[list[str]]:
    """What a step of the 1B shape with 64 tokens was to reach, and whether it does."""
    rows: list[list[str]] = []

    def add(what: str, figure: float, limit: float, form: str) -> None:
        rows.append([what, format(figure, form), format(limit, form), "yes" if figure <= limit else "NO"])

    unmasked = ways.get("unmasked")
    for way in ("shares", "lattice"):
        if way not in ways:
            continue
        x = ways[way]
        add(f"{way}: seconds of a step", x["seconds"], PUBLISHED_SECONDS / WANTED["step"], ".2f")
        traffic = (x["bytes_up"] + x["bytes_down"]) / x["clear_bytes"]
        add(f"{way}: traffic, times bf16 in the clear", traffic, WANTED["traffic"][way], ".3f")
        if unmasked:
            client = x["core_seconds"] / unmasked["core_seconds"]
            add(f"{way}: client's core-seconds, times unmasked", client, WANTED["client"][way], ".2f")
            for index, name in enumerate(MASKINGS[way]):
                worker = x[f"worker_{index}"] / unmasked["worker_0"]
                add(f"{way}: {name}'s core-seconds, times unmasked", worker, WANTED["worker"], ".2f")
        if way == "shares":
            add(
                "shares: client's anonymous memory, GB",
                x["peak_bytes"]["RssAnon"] / 1e9,
                WANTED["memory"] / 1e9,
                ".2f",
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made once")
    parser.add_argument("--model", type=Path, nargs="*", default=[], help="checkpoint folders")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--ways", nargs="+", type=parsed_way, default=[parsed_way(x) for x in MASKINGS])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="of a turn, at least")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before the first turn")
    parser.add_argument("--threads", type=int, help="of each worker; as many as cores unless given")
    parser.add_argument("--alone", type=Path, metavar="FILE", help="hold this lock whenever something runs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    shape = arguments.work / "llama-1b-shape"
    if not arguments.model:
        with alone(arguments.alone):
            write(llama_1b(), shape)
    print(", ".join(f"{k} {v}" for k, v in machine().items()))
    results = {}
    for model in arguments.model or [shape]:
        results[model.name] = figures = measure(model.resolve(), arguments)
        memory = ", ".join(f"{k} {v['RssAnon'] / 1e6:,.0f} MB" for k, v in figures["workers"].items())
        print(f"\nAdapter of {figures['trained']:,} parameters. Anonymous memory of workers: {memory or '-'}")
        if model == shape and "64" in figures:
            print("\nWanted of a step with 64 tokens\n")
            print_table(["what", "measured", "at most", "reached"], verdicts(figures["64"]))
        if arguments.json:
            write_json(arguments.json, results, turns=arguments.turns, sequences=SEQUENCES, rank=RANK)


if __name__ == "__main__":
    main()
