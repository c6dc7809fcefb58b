"""Operators of the demo: worker processes on loopback, with mutual TLS and an authority each."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from blindtune.client.certs import issue_operator_certificates
from blindtune.client.config import Operator
from blindtune.protocol.errors import BlindtuneError

__all__ = ["LocalOperator", "WorkerProcess"]

_STOP_SECONDS = 20


class WorkerProcess:
    """A demo worker in a process of its own."""

    def __init__(self, model: str, certificates: Path, folder: Path, number: int) -> None:
        self._report = folder / f"report-{number}.json"
        self._log = folder / f"worker-{number}.log"
        command = [sys.executable, "-m", "blindtune.client.demo.worker"]
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [*command, model, str(certificates), str(self._report)],
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            )
        self.address = ""

    def wait_until_listening(self) -> None:
        """Waits for the worker's address.

        Raises:
            BlindtuneError: it ended instead.
        """
        if self._process.stdout is None:
            raise BlindtuneError("the worker process has no output to read")
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
            raise BlindtuneError(f"a worker did not start: {''.join(last) or 'it said nothing'}")
        self.address = json.loads(line)["address"]

    def lie_once(self) -> None:
        """Makes the worker's next answer wrong."""
        self._process.send_signal(signal.SIGUSR1)

    def stop(self) -> dict[str, Any]:
        """Stops the worker and returns its report of what it received; empty if it never served."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        return json.loads(self._report.read_text()) if self._report.exists() else {}


@dataclass
class LocalOperator:
    """An operator with its workers, which stop when the block ends."""

    name: str
    workers: list[WorkerProcess]
    certificates: Path

    @classmethod
    def start(cls, name: str, model: str, workers: int, folder: Path) -> "LocalOperator":
        """Starts the workers' processes without waiting for them."""
        certificates = issue_operator_certificates(folder, name).ca.parent
        processes = [WorkerProcess(model, certificates, certificates, i) for i in range(workers)]
        return cls(name, processes, certificates)

    def operator(self) -> Operator:
        """Waits for the workers, and describes the operator to a client."""
        for worker in self.workers:
            worker.wait_until_listening()
        return Operator(
            self.name,
            [worker.address for worker in self.workers],
            ca=self.certificates / "ca.pem",
            cert=self.certificates / "client.pem",
            key=self.certificates / "client-key.pem",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> list[dict[str, Any]]:
        """Stops all workers and returns their reports."""
        return [worker.stop() for worker in self.workers]
