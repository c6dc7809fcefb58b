"""Operators of the demo: worker processes on loopback, with mutual TLS and an authority each."""

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from blindtune.client.config.blind_config import Operator
from blindtune.client.process.local_worker import LocalWorker
from blindtune.client.tls.certs import OperatorCertificates, issue_operator_certificates

__all__ = ["DemoWorker", "LocalOperator"]


class DemoWorker(LocalWorker):
    """A worker that can be made to lie, and that reports what it received."""

    def __init__(self, model: str, certificates: Path, folder: Path, number: int) -> None:
        self._report = folder / f"report-{number}.json"
        arguments = [model, str(certificates), str(self._report)]
        super().__init__(["blindtune.client.demo.worker", *arguments], folder / f"worker-{number}.log")

    def lie_once(self) -> None:
        """Makes its next answer wrong."""
        self.process.send_signal(signal.SIGUSR1)

    def report(self) -> dict[str, Any]:
        """What it received until it was stopped; empty if it never served."""
        return json.loads(self._report.read_text()) if self._report.exists() else {}


@dataclass
class LocalOperator:
    """An operator with its workers, which stop when the block ends."""

    name: str
    workers: list[DemoWorker]
    certificates: OperatorCertificates

    @classmethod
    def start(cls, name: str, model: str, workers: int, folder: Path) -> "LocalOperator":
        """Starts the workers' processes without waiting for them."""
        certificates = issue_operator_certificates(folder, name)
        own = certificates.ca.parent
        processes = [DemoWorker(model, own, own, i) for i in range(workers)]
        return cls(name, processes, certificates)

    def operator(self) -> Operator:
        """Waits for the workers, and describes the operator to a client."""
        addresses = [worker.address() for worker in self.workers]
        return Operator(self.name, addresses, **self.certificates.for_clients)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> list[dict[str, Any]]:
        """Stops all workers and returns their reports."""
        for worker in self.workers:
            worker.stop()
        return [worker.report() for worker in self.workers]
