"""A worker that tallies what it receives, and lies once when it gets SIGUSR1.

It is the daemon's own server with the two hooks it has for this: an observer and a multiplier.
"""

import json
import signal
import sys
import threading
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chisquare

from blindtune.checkpoint import Checkpoint
from blindtune.protocol.expansion import Seed
from blindtune.protocol.operands import Operand
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Residues
from blindtune.server.daemon import serve
from blindtune.server.hooks import Multiplying
from blindtune.server.memory import usable_device
from blindtune.server.store import LayerStore
from blindtune.server.transport import Endpoint, TlsFiles
from blindtune.server.wire import Request

__all__ = ["LyingMultiplier", "Tally", "main"]

_BINS = 256


class Tally:
    """How the values that a worker receives are distributed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._expected = np.zeros(_BINS)
        self._residues = np.zeros(_BINS, np.int64)
        self._key_bytes = np.zeros(_BINS, np.int64)

    def operand(self, request: Request, part: Residues | Seed) -> None:
        """Counts a block of residues, or the bytes of a seed's key."""
        q = request.parameters.modulus
        if isinstance(part, Seed):
            counts = np.bincount(np.frombuffer(part.key, np.uint8), minlength=_BINS)
        else:
            bins = part.astype(np.uint64).ravel() * np.uint64(_BINS) // np.uint64(q)
            counts = np.bincount(bins.astype(np.int64), minlength=_BINS)
        with self._lock:
            if isinstance(part, Seed):
                self._key_bytes += counts
            else:
                self._residues += counts
                self._expected += _sizes_of_bins(q) * (part.size / q)

    def report(self) -> dict[str, object]:
        """The p-value of a chi-square test against the uniform distribution, and the sample's size."""
        with self._lock:
            if self._residues.any():
                total = int(self._residues.sum())
                test = chisquare(self._residues, self._expected)
                return {"received": "residues", "values": total, "uniformity_p": float(test.pvalue)}
            total = int(self._key_bytes.sum())
            p = float(chisquare(self._key_bytes).pvalue) if total else None
            return {"received": "seeds", "values": total, "uniformity_p": p}


@cache
def _sizes_of_bins(q: int) -> NDArray[np.int64]:
    """How many residues x have floor(256 x / q) = b; they differ by one at most."""
    return np.diff([-(-b * q // _BINS) for b in range(_BINS + 1)])


class LyingMultiplier:
    """Answers right, but for one residue of one answer after each call of `lie_once`."""

    def __init__(self, honest: Multiplying) -> None:
        self._honest = honest
        self._lie = threading.Event()

    def lie_once(self) -> None:
        """Makes the next answer wrong."""
        self._lie.set()

    def outputs(self, product: Product) -> int:
        return self._honest.outputs(product)

    def multiply(self, product: Product, operand: Operand, parameters: ParameterSet) -> Residues:
        answer = self._honest.multiply(product, operand, parameters)
        if self._lie.is_set():
            self._lie.clear()
            answer[0, 0] = (int(answer[0, 0]) + 1) % parameters.modulus
        return answer


def main(model: str, certificates: Path, report: Path) -> None:
    """Serves a model on a free loopback port until SIGTERM, then writes the report.

    Args:
        model: checkpoint folder.
        certificates: the operator's folder, made by ``blindtune certs``.
        report: file for the tally.
    """
    tls = TlsFiles(certificates / "worker.pem", certificates / "worker-key.pem", certificates / "ca.pem")
    store = LayerStore.load(Checkpoint.open(model), usable_device("cpu"))
    multiplier, tally = LyingMultiplier(store.multiplier()), Tally()
    stop = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: multiplier.lie_once())
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker = serve(store, Endpoint.parse("127.0.0.1:0", tls), multiplier=multiplier, observer=tally)
    print(json.dumps({"event": "listening", "address": worker.address}), flush=True)
    stop.wait()
    worker.stop(drain_seconds=10)
    report.write_text(json.dumps(tally.report()))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
