"""Does a training survive workers that crash, lie, and get new certificates?

    python -m benchmarks.resilience.chaos --model FOLDER [--minutes 5] [--seed 0] [--json FILE]
    python -m benchmarks.resilience.chaos --model FOLDER --rolling

Two operators with two workers each, real daemons over mutual TLS, and ``blindtune train`` as one process that
is never started again. Every few seconds a random worker is killed with SIGKILL, and comes back at the same
port after a pause. One worker of each operator lies in all its answers from a random moment on, and goes
on lying whenever it comes back, so that in the end each operator has a single worker left that can help, and
that one is killed as well.

With ``--rolling`` all workers are drained and started again, one after the other; then worker certificates
are renewed, both operators change to another authority with an overlap, and the client's certificates change
too; and all workers are restarted once more, so that every connection is made anew.

In the end the training is told to stop after its step, and the adapter of the checkpoint that it then saves
must be the one that as many steps with masking ``reference`` give, bit for bit. It ends with 1 if it isn't.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks.common.worker_processes import HONEST, LIAR, WorkerProcess, reissued, replace_file
from blindtune.client.tls.certs import issue_operator_certificates

NAMES = ("alpha", "beta")
ADAPTER = "adapter_model.safetensors"
# Longer than a worker takes to come back, even where many of them start at once on few cores.
PATIENCE_SECONDS = 240.0
KILL_SECONDS = (3.0, 9.0)
PAUSE_SECONDS = (0.5, 3.0)
_END_SECONDS = 1800.0
_INTERRUPTED = 130


@dataclass
class Report:
    """What happened to a training.

    Attributes:
        steps: that it took, each of them once.
        seconds: from its first step to its last.
        kills: how often each worker was killed.
        restarts: how often each worker was drained and started again.
        liars: workers that lied.
        lies: wrong answers that the client caught.
        requests, repeated: to workers, and those of them that had no verified answer.
        exchanges: files of certificates that were replaced.
        identical: whether the adapter is that of the reference, bit for bit.
    """

    steps: int = 0
    seconds: float = 0.0
    kills: dict[str, int] = field(default_factory=dict)
    restarts: dict[str, int] = field(default_factory=dict)
    liars: list[str] = field(default_factory=list)
    lies: int = 0
    requests: int = 0
    repeated: int = 0
    exchanges: list[str] = field(default_factory=list)
    identical: bool = False


class Training:
    """``blindtune train`` as a process of its own."""

    def __init__(self, recipe: Path, output: Path, *settings: str) -> None:
        self.output = output
        self.steps: list[tuple[int, float]] = []
        self._log = output.with_suffix(".log")
        options = [x for setting in (*settings, f"output.dir={output}") for x in ("--set", setting)]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "blindtune.client.cli", "train", str(recipe), "--json", *options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={"BLINDTUNE_CACHE": str(output.parent / "cache")}
                | dict(os.environ)
                | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line)
            if event["event"] == "step":
                self.steps.append((event["step"], time.monotonic()))

    @property
    def is_running(self) -> bool:
        """Whether it goes on."""
        return self.process.poll() is None

    def wait_for_steps(self, count: int) -> None:
        """Waits until it has taken so many more steps, or has ended."""
        wanted = len(self.steps) + count
        give_up = time.monotonic() + _END_SECONDS
        while len(self.steps) < wanted and self.is_running:
            if time.monotonic() > give_up:
                raise RuntimeError(f"no step in {_END_SECONDS:g} s: {self.log()}")
            time.sleep(0.05)

    def finish(self) -> Path:
        """Waits for its end; the adapter.

        Raises:
            RuntimeError: it failed, or lost a step or took one twice.
        """
        return self._ended(0)

    def interrupt(self) -> Path:
        """Ends it after the step under way; the checkpoint.

        Raises:
            RuntimeError: it failed, or lost a step or took one twice.
        """
        if self.is_running:
            self.process.send_signal(signal.SIGTERM)
        self._ended(_INTERRUPTED)
        checkpoint = self.output / "checkpoints" / f"checkpoint-{len(self.steps)}"
        if not checkpoint.is_dir():
            raise RuntimeError(f"there is no {checkpoint.name} after {len(self.steps)} steps")
        return checkpoint

    def _ended(self, expected: int) -> Path:
        code = self.process.wait(_END_SECONDS)
        self._reader.join()
        if code != expected:
            raise RuntimeError(f"the training ended with {code}: {self.log()}")
        if [step for step, _ in self.steps] != list(range(1, len(self.steps) + 1)):
            raise RuntimeError(f"steps were lost or repeated: {self.steps}")
        return self.output

    def log(self) -> str:
        """The end of what it said."""
        return self._log.read_text()[-3000:]

    def stop(self) -> None:
        """Ends it, if it still runs."""
        if self.is_running:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        if self.process.stdout is not None:
            self.process.stdout.close()


@dataclass
class Fleet:
    """Two operators and their workers.

    Attributes:
        folder: an operator's certificates are in a folder of its name there.
        workers: of each operator.
    """

    folder: Path
    workers: dict[str, list[WorkerProcess]]

    @property
    def all(self) -> list[WorkerProcess]:
        """The workers of both."""
        return [worker for workers in self.workers.values() for worker in workers]

    def sections(self) -> list[dict[str, Any]]:
        """The operators as a recipe names them."""
        return [
            {
                "name": name,
                "workers": [x.address for x in workers],
                "ca": str(self.folder / name / "workers-ca.pem"),
                "cert": str(self.folder / name / "client.pem"),
                "key": str(self.folder / name / "client-key.pem"),
            }
            for name, workers in self.workers.items()
        ]


@contextmanager
def fleet(folder: Path, model: Path, programs: Sequence[Sequence[tuple[str, ...]]]) -> Iterator[Fleet]:
    """Starts workers, and ends them."""
    started: dict[str, list[WorkerProcess]] = {}
    for index, (name, kinds) in enumerate(zip(NAMES, programs, strict=True)):
        host = f"127.0.0.{index + 2}"
        own = issue_operator_certificates(folder, name, [host]).ca.parent
        # Each side has a file of its own, so that they can change at different times.
        for file in ("workers-ca.pem", "clients-ca.pem"):
            replace_file(own / file, (own / "ca.pem").read_bytes())
        options = [
            *("--model", str(model), "--threads", "1", "--tls-client-ca", str(own / "clients-ca.pem")),
            *("--tls-cert", str(own / "worker.pem"), "--tls-key", str(own / "worker-key.pem")),
        ]
        started[name] = [
            WorkerProcess(kind, options, host, own / f"worker-{number}.log")
            for number, kind in enumerate(kinds)
        ]
    running = Fleet(folder, started)
    try:
        for worker in running.all:
            worker.start()
        for worker in running.all:
            worker.wait_until_listening()
        yield running
    finally:
        for worker in running.all:
            if worker.starts:
                worker.kill()


class Killer:
    """Kills workers and brings them back, and makes liars of some, until it is told to stop."""

    def __init__(
        self,
        running: Fleet,
        liars: Sequence[WorkerProcess],
        lie_at: Sequence[float],
        generator: random.Random,
    ) -> None:
        self.kills: dict[str, int] = {worker.address: 0 for worker in running.all}
        self._up = list(running.all)
        self._liars = list(zip(liars, lie_at, strict=True))
        self._generator = generator
        self._lock = threading.Lock()
        self._returning: list[threading.Thread] = []

    def run(self, seconds: float, is_over: Callable[[], bool]) -> None:
        """Does so for a time, and then waits until all workers are back."""
        begun = time.monotonic()
        next_kill = begun + self._generator.uniform(*KILL_SECONDS)
        while time.monotonic() < begun + seconds and not is_over():
            for worker, at in list(self._liars):
                if time.monotonic() >= begun + at:
                    self._liars.remove((worker, at))
                    self._corrupt(worker)
            if time.monotonic() >= next_kill:
                self._kill_one()
                next_kill = time.monotonic() + self._generator.uniform(*KILL_SECONDS)
            time.sleep(0.05)
        for thread in self._returning:
            thread.join()

    def _corrupt(self, worker: WorkerProcess) -> None:
        with self._lock:
            worker.environment["BLINDTUNE_LIES"] = "1"
            # One that is down comes back as a liar.
            if worker in self._up:
                worker.signal(signal.SIGUSR1)
        print(f"{worker.address} lies from now on", file=sys.stderr, flush=True)

    def _kill_one(self) -> None:
        with self._lock:
            if not self._up:
                return
            worker = self._generator.choice(self._up)
            self._up.remove(worker)
        worker.kill()
        self.kills[worker.address] += 1
        print(f"{worker.address} killed", file=sys.stderr, flush=True)
        pause = self._generator.uniform(*PAUSE_SECONDS)
        thread = threading.Thread(target=self._bring_back, args=(worker, pause))
        self._returning.append(thread)
        thread.start()

    def _bring_back(self, worker: WorkerProcess, pause: float) -> None:
        time.sleep(pause)
        worker.start()
        worker.wait_until_listening()
        with self._lock:
            self._up.append(worker)
            # It may have been corrupted between its start and now.
            if worker.environment.get("BLINDTUNE_LIES") == "1":
                worker.signal(signal.SIGUSR1)
        print(f"{worker.address} is back", file=sys.stderr, flush=True)


def write_recipe(folder: Path, model: Path, operators: Sequence[dict[str, Any]]) -> Path:
    """A training of small steps on sums, without an end of its own and with steps that don't depend on it."""
    generator = random.Random(0)
    records = []
    for _ in range(64):
        a, b = generator.randrange(1000), generator.randrange(1000)
        records.append({"prompt": f"What is {a} + {b}?", "completion": f"It is {a + b}."})
    (folder / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))
    recipe = {
        "model": {"name": str(model)},
        "masking": {"mode": "shares", "allow_one_machine": True, "retry_seconds": PATIENCE_SECONDS},
        "operators": list(operators),
        "adapter": {"r": 4, "target_modules": "all-linear"},
        "data": {"task": "instructions", "train": str(folder / "train.jsonl"), "max_length": 64},
        "training": {
            "max_steps": 1_000_000,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
        },
        "output": {"dir": str(folder / "output")},
    }
    with (folder / "recipe.yaml").open("w") as file:
        YAML(typ="safe").dump(recipe, file)
    return folder / "recipe.yaml"


def chaos(folder: Path, model: Path, seconds: float, seed: int) -> Report:
    """Trains while workers crash and lie.

    Args:
        folder: for everything.
        model: checkpoint with a tokenizer.
        seconds: how long workers are killed.
        seed: of what happens when.
    """
    generator = random.Random(seed)
    report = Report()
    # An operator's first worker is asked first. So one liar is caught at once, and the other when the honest
    # worker beside it is killed.
    with fleet(folder, model, ((LIAR, HONEST), (HONEST, LIAR))) as running:
        liars = [running.workers["alpha"][0], running.workers["beta"][1]]
        with training(folder, model, running, report) as run:
            lie_at = [generator.uniform(0.05, 0.3) * seconds for _ in liars]
            killer = Killer(running, liars, lie_at, generator)
            killer.run(seconds, is_over=lambda: not run.is_running)
            report.kills, report.liars = killer.kills, [x.address for x in liars]
    return report


def rolling(folder: Path, model: Path, together: bool = False) -> Report:
    """Trains while workers are restarted gracefully and certificates are exchanged.

    Args:
        folder: for everything.
        model: checkpoint with a tokenizer.
        together: whether both operators do so at the same time, which takes half as long.
    """
    report = Report()
    with fleet(folder, model, ((HONEST, HONEST), (HONEST, HONEST))) as running:
        report.restarts = {worker.address: 0 for worker in running.all}
        with training(folder, model, running, report) as run:
            _restart_all(running, run, report, together)
            _exchange_certificates(running, run, report)
            _restart_all(running, run, report, together)
    return report


@contextmanager
def training(folder: Path, model: Path, running: Fleet, report: Report) -> Iterator[Training]:
    """A training through workers, from before the block to after it, held against the reference."""
    recipe = write_recipe(folder, model, running.sections())
    run = Training(recipe, folder / "private")
    try:
        run.wait_for_steps(1)
        yield run
        checkpoint = run.interrupt()
    finally:
        run.stop()
    figures = json.loads((checkpoint / "figures.json").read_text())
    report.steps = len(run.steps)
    report.seconds = run.steps[-1][1] - run.steps[0][1]
    report.lies, report.requests = figures["lies"], figures["requests"]
    report.repeated = figures["requests"] - figures["verified_responses"]
    steps = f"training.max_steps={report.steps}"
    reference = Training(recipe, folder / "reference", "masking.mode=reference", steps)
    try:
        expected = reference.finish()
    finally:
        reference.stop()
    report.identical = (expected / ADAPTER).read_bytes() == (checkpoint / ADAPTER).read_bytes()


def _restart_all(running: Fleet, run: Training, report: Report, together: bool) -> None:
    turns = list(zip(*running.workers.values(), strict=True)) if together else [(x,) for x in running.all]
    for turn in turns:
        _restart(turn, report)
        run.wait_for_steps(1)


def _restart(workers: Sequence[WorkerProcess], report: Report) -> None:
    """Drains workers, and waits until they are back."""
    for worker in workers:
        code = worker.drain()
        if code:
            raise RuntimeError(f"{worker.address} ended with {code}: {worker.log.read_text()[-2000:]}")
        worker.start()
    for worker in workers:
        worker.wait_until_listening()
        report.restarts[worker.address] += 1
        print(f"{worker.address} restarted", file=sys.stderr, flush=True)


def _exchange_certificates(running: Fleet, run: Training, report: Report) -> None:
    """First all of one authority, then those of another one, with an overlap."""

    def put(path: Path, content: bytes) -> None:
        replace_file(path, content)
        report.exchanges.append(f"{path.parent.name}/{path.name}")

    def renew(own: Path, who: str, authority: Path) -> None:
        certificate, key = reissued(own / f"{who}.pem", authority / "ca.pem", authority / "ca-key.pem")
        # Between the two they don't belong together, and the old ones stay in force.
        put(own / f"{who}-key.pem", key)
        put(own / f"{who}.pem", certificate)
        run.wait_for_steps(1)

    for name, workers in running.workers.items():
        own = running.folder / name
        other = issue_operator_certificates(running.folder / "next", name, [workers[0].host]).ca.parent
        renew(own, "worker", own)
        renew(own, "client", own)
        both = (own / "ca.pem").read_bytes() + (other / "ca.pem").read_bytes()
        put(own / "workers-ca.pem", both)
        put(own / "clients-ca.pem", both)
        renew(own, "worker", other)
        # A restart in the middle of it: one replica has the new authority, the other its old connections.
        _restart(workers[:1], report)
        run.wait_for_steps(1)
        renew(own, "client", other)
        put(own / "workers-ca.pem", (other / "ca.pem").read_bytes())
        put(own / "clients-ca.pem", (other / "ca.pem").read_bytes())
        run.wait_for_steps(1)


def _show(report: Report) -> None:
    print(f"steps      {report.steps}, none lost or repeated, in {report.seconds:.0f} s")
    if report.kills:
        each = ", ".join(f"{address} {count}" for address, count in report.kills.items())
        print(f"kills      {sum(report.kills.values())}: {each}")
        print(f"liars      {', '.join(report.liars)}; lies caught: {report.lies}")
    if report.restarts:
        each = ", ".join(f"{address} {count}" for address, count in report.restarts.items())
        print(f"restarts   {sum(report.restarts.values())}: {each}")
        print(f"exchanged  {len(report.exchanges)} files: {', '.join(dict.fromkeys(report.exchanges))}")
    print(f"requests   {report.requests}, of which {report.repeated} had to be repeated")
    print(f"adapter    {'that of the reference, bit for bit' if report.identical else 'ANOTHER ONE'}")


def main() -> None:
    """Prints what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a small checkpoint")
    parser.add_argument("--minutes", type=float, default=5.0, help="how long workers are killed")
    parser.add_argument("--seed", type=int, default=0, help="of what happens when")
    parser.add_argument("--rolling", action="store_true", help="drain and exchange certificates instead")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # So that the workers end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    model = options.model.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        if options.rolling:
            report = rolling(Path(temporary), model)
        else:
            report = chaos(Path(temporary), model, 60 * options.minutes, options.seed)
    _show(report)
    if options.json:
        options.json.write_text(json.dumps(asdict(report), indent=1))
    if not report.identical or (report.liars and not report.lies):
        sys.exit(1)


if __name__ == "__main__":
    main()
