"""Operators for tests: worker processes on loopback, each operator at an address of its own.

The processes are forked from one that has imported and compiled everything, since importing takes
longer than most tests.
"""

import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blindtune.client.config.blind_config import Operator
from blindtune.client.tls.certs import issue_operator_certificates
from blindtune.server.admission.limits import Limits
from support.worker import WorkerSpec, run_worker

__all__ = [
    "PATIENCE",
    "RunningOperator",
    "RunningOperators",
    "RunningWorker",
    "forkserver",
    "running_operators",
    "worker_environment",
]

PATIENCE = 60
_ENVIRONMENT = {
    "BLINDTUNE_TEST_WORKERS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    # The process that workers are forked from finds `support` by this alone.
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
}


def forkserver() -> multiprocessing.context.ForkServerContext:
    """Forks processes that have imported and compiled everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.worker"])
    return context


@contextmanager
def worker_environment() -> Iterator[None]:
    """The environment that such processes start with."""
    before = dict(os.environ)
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class RunningWorker:
    """A worker in a process of its own."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        context = forkserver()
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=run_worker, args=(spec, theirs), daemon=True)
        with worker_environment():
            self.process.start()
        theirs.close()
        self._addresses: dict[str, str] | None = None

    @property
    def addresses(self) -> dict[str, str]:
        """Where it serves each model; waits until it does."""
        if self._addresses is None:
            self._addresses = self._reply()
        return self._addresses

    @property
    def log(self) -> str:
        """What it logged so far."""
        return self.spec.log.read_text()

    def lie(self, model: str, lie: str | None, at: int = 1, times: int = 1) -> None:
        """Makes it lie at the ``at``-th answer from now; ``None`` makes it honest."""
        self._command("lie", model, lie, at, times)

    def lies_told(self, model: str) -> int:
        """Wrong answers since `lie` was last called."""
        return int(self._command("told", model))

    def record(self, folder: Path | None) -> None:
        """Makes it write down all that it receives, or stop doing so."""
        self._command("record", folder)

    def kill(self) -> None:
        """Ends it as a crash would."""
        self.process.kill()
        self.process.join(PATIENCE)

    def stop(self) -> None:
        """Ends it."""
        self._pipe.close()
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.kill()

    def _command(self, *command: Any) -> Any:
        assert self.addresses
        self._pipe.send(command)
        return self._reply()

    def _reply(self) -> Any:
        try:
            assert self._pipe.poll(PATIENCE), "the worker process does not reply"
            return self._pipe.recv()
        except EOFError:
            raise AssertionError(f"the worker process ended: {self.log}") from None


@dataclass(frozen=True)
class RunningOperator:
    """An operator's workers and certificates."""

    name: str
    workers: Sequence[RunningWorker]
    certificates: Path

    def operator(self, model: str, workers: Sequence[int] | None = None) -> Operator:
        """The operator as a client names it, with all of its workers or some."""
        chosen = self.workers if workers is None else [self.workers[i] for i in workers]
        return Operator(
            self.name,
            [worker.addresses[model] for worker in chosen],
            ca=self.certificates / "ca.pem",
            cert=self.certificates / "client.pem",
            key=self.certificates / "client-key.pem",
        )


class RunningOperators(tuple[RunningOperator, ...]):
    """Operators in the order of the shares: the last one gets residues, all others seeds."""

    @property
    def workers(self) -> list[RunningWorker]:
        return [worker for operator in self for worker in operator.workers]

    def operators(self, model: str, workers: Sequence[int] | None = None) -> list[Operator]:
        """All of them as a client names them."""
        return [operator.operator(model, workers) for operator in self]


@contextmanager
def running_operators(
    folder: Path,
    models: Mapping[str, Path],
    workers: Sequence[int] = (1, 1),
    *,
    secure: bool = True,
    limits: Limits | None = None,
    quantization: str = "int8",
) -> Iterator[RunningOperators]:
    """Starts operators alpha, beta, ... with so many workers each, and stops them in the end."""
    started: list[RunningOperator] = []
    try:
        for index, count in enumerate(workers):
            name, host = ("alpha", "beta", "gamma", "delta")[index], f"127.0.0.{index + 1}"
            certificates = issue_operator_certificates(folder, name, [host]).ca.parent
            processes = [
                RunningWorker(
                    WorkerSpec(
                        models,
                        host,
                        certificates if secure else None,
                        certificates / f"worker-{number}.log",
                        limits or Limits(),
                        quantization,
                    )
                )
                for number in range(count)
            ]
            started.append(RunningOperator(name, processes, certificates))
        yield RunningOperators(started)
    finally:
        for operator in started:
            for worker in operator.workers:
                worker.stop()
