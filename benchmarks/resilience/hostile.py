"""What can a hostile client cost a worker, and the clients beside it?

    python -m benchmarks.resilience.hostile [--model FOLDER] [--requests 1000] [--only TEXT] [--json FILE]

Starts a real worker (mutual TLS, then another one with a low rate, and one with tokens) and sends so many
malformed or hostile requests of each kind to it, while an honest client with a certificate or token of its
own keeps asking for verified products. Before each kind there is a quiet time, in which the honest client is
alone. For each kind it prints

    core ms      the worker's processor time for a hostile request, without what the honest client's cost
    peak, kept   memory of the worker, above what it had before: at most, and a second later
    ok, retries  the honest client's verified answers, and how often it was told to try again
    latency      its median latency, as a multiple of that in the quiet times before and after

and ends with 1 if the worker died, grew beyond a bound, or failed the honest client once.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common.worker_processes import HONEST, WorkerProcess, reissued
from benchmarks.resilience.hostile_calls import CALLS, FLOODS, STRANGERS_CALLS, Attack, Target
from benchmarks.resilience.hostile_sockets import SOCKETS, STRANGERS_SOCKETS
from blindtune.checkpoint import Checkpoint
from blindtune.client.tls.certs import OperatorCertificates, issue_operator_certificates
from blindtune.proto import MAX_MESSAGE_BYTES
from blindtune.server.admission.limits import Limits
from blindtune.server.admission.tokens import add_token

HOST = "127.0.0.1"
QUIET_SECONDS = 2.0
SETTLING_SECONDS = 1.0
PAUSE_SECONDS = 0.03
# Lowered, so that a thousand clients that keep a worker waiting take minutes and not hours.
OPTIONS = {"patience-seconds": 2, "handshake-seconds": 2}
LOW_RATE = {"max-requests-per-second": 50}
# Connections that an attack has at a time, and what TLS and HTTP/2 may hold for each.
_CONNECTIONS, _CONNECTION_BYTES = 300, 512 << 10
# Other calls of one client, and what a block of 1,024 rows of the layer that is asked for takes.
_OTHER_CALLS = 6
_BLOCK_BYTES = 32 * 1024 * (704 + 256)


class Honest:
    """The honest client's process, and what it told so far."""

    def __init__(self, settings: Mapping[str, Any], folder: Path) -> None:
        path = folder / "honest.json"
        path.write_text(json.dumps(dict(settings), default=str))
        self.told: list[dict[str, Any]] = []
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("honest_client.py")), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.told.append(json.loads(line))

    def between(self, begin: float, end: float) -> list[dict[str, Any]]:
        """The requests that began in that time."""
        return [x for x in self.told if begin <= x["at"] < end]

    def wait_until_it_asks(self) -> None:
        """Waits for its first answer."""
        while not self.told:
            if self._process.poll() is not None:
                raise RuntimeError("the honest client ended")
            time.sleep(0.1)

    def stop(self) -> None:
        """Ends it, after the request under way."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._reader.join()
        self._process.wait()


class Memory(threading.Thread):
    """Looks at a process's memory all the time."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._process = process
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def stop(self) -> None:
        self._done.set()
        self.join()


@dataclass
class Window:
    """What happened between two moments.

    Attributes:
        begin, end: monotonic seconds.
        core_seconds: of the worker.
    """

    begin: float
    end: float
    core_seconds: float


@dataclass
class Outcome:
    """What one kind of attack did.

    Attributes:
        kind: its name.
        access: how the worker lets clients in: with certificates, the same at a low rate, or with tokens.
        requests: how many.
        seconds: that they took.
        statuses: that the attacker saw.
        alive: whether the worker lives.
        core_ms: of the worker for each request, without the honest client's.
        before, peak, after: bytes of the worker's memory.
        honest_answers, honest_failures, honest_retries: of the honest client during the attack.
        honest_longest: seconds of its longest request.
        latency_ratio: of its medians, during the attack and around it.
    """

    kind: str
    access: str
    requests: int
    seconds: float
    statuses: dict[str, int]
    alive: bool
    core_ms: float
    before: int
    peak: int
    after: int
    honest_answers: int
    honest_failures: int
    honest_retries: int
    honest_longest: float
    latency_ratio: float


class Experiment:
    """A worker, an honest client, and one attack after the other."""

    def __init__(self, worker: WorkerProcess, honest: Honest, target: Target, access: str) -> None:
        self._worker = worker
        self._honest = honest
        self._target = target
        self._access = access
        self._process = psutil.Process(worker.process.pid)
        self._quiet: list[Window] = []
        self._found: list[tuple[Outcome, Window]] = []

    def _core_seconds(self) -> float:
        times = self._process.cpu_times()
        return times.user + times.system

    def quiet(self, seconds: float = QUIET_SECONDS) -> None:
        """A time in which the honest client is alone."""
        begin, cores = time.monotonic(), self._core_seconds()
        time.sleep(seconds)
        self._quiet.append(Window(begin, time.monotonic(), self._core_seconds() - cores))

    def attack(self, kind: str, attack: Attack, count: int) -> None:
        """One kind of attack, after a quiet time."""
        self.quiet()
        before = self._process.memory_info().rss
        memory = Memory(self._process)
        memory.start()
        begin, cores = time.monotonic(), self._core_seconds()
        statuses = attack(self._target, count)
        end = time.monotonic()
        # What still runs for the attacker is part of its cost.
        time.sleep(SETTLING_SECONDS)
        memory.stop()
        alive = self._worker.is_running
        outcome = Outcome(
            kind, self._access, count, end - begin, dict(statuses), alive, 0.0, before, memory.peak, before,
            0, 0, 0, 0.0, 0.0,
        )  # fmt: skip
        if not alive:
            self._found.append((outcome, Window(begin, end, 0.0)))
            raise RuntimeError(f"the worker died of {kind}: {self._worker.log.read_text()[-2000:]}")
        outcome.after = self._process.memory_info().rss
        window = Window(begin, time.monotonic(), self._core_seconds() - cores)
        self._found.append((outcome, window))
        print(f"  {kind}: {outcome.seconds:.1f} s, {outcome.statuses}", file=sys.stderr, flush=True)

    def outcomes(self) -> list[Outcome]:
        """All of them, once the honest client has ended."""
        quiet = [self._honest.between(x.begin, x.end) for x in self._quiet]
        each = sum(x.core_seconds for x in self._quiet) / max(1, sum(map(len, quiet)))
        for index, (outcome, window) in enumerate(self._found):
            asked = self._honest.between(window.begin, window.end)
            # Others use this machine as well: only the quiet times beside it are like it.
            around = [x["seconds"] for x in quiet[index] + quiet[index + 1]]
            outcome.core_ms = 1e3 * (window.core_seconds - each * len(asked)) / outcome.requests
            outcome.honest_answers = sum(not x["error"] for x in asked)
            outcome.honest_failures = sum(bool(x["error"]) for x in asked)
            outcome.honest_retries = sum(x["retries"] for x in asked)
            outcome.honest_longest = max((x["seconds"] for x in asked), default=0.0)
            during = [
                x["seconds"] for x in self._honest.between(window.begin, window.begin + outcome.seconds)
            ]
            if during and around:
                outcome.latency_ratio = statistics.median(during) / statistics.median(around)
        return [outcome for outcome, _ in self._found]


@contextmanager
def experiment(
    folder: Path, model: Path, certificates: OperatorCertificates, foreign: Path, access: str
) -> Iterator[Experiment]:
    """A worker and an honest client, each in a process of its own."""
    ca, own = certificates.ca, certificates.ca.parent
    with_tokens = access == "tokens"
    lets_in = ["--tls-client-ca", str(ca)]
    honest: dict[str, Any] = {"cert": own / "client.pem", "key": own / "client-key.pem"}
    attacker: dict[str, Any] = {"cert": own / "hostile.pem", "key": own / "hostile-key.pem", "token": None}
    if with_tokens:
        lets_in = ["--tokens", str(folder / "tokens")]
        (folder / "honest.token").touch(0o600)
        (folder / "honest.token").write_text(add_token(folder / "tokens", "honest"))
        honest = {"token": folder / "honest.token"}
        attacker = {"cert": None, "key": None, "token": None}
    else:
        cert, key = reissued(certificates.client, ca, certificates.ca_key)
        attacker["cert"].write_bytes(cert)
        attacker["key"].touch(0o600)
        attacker["key"].write_bytes(key)
    limits = OPTIONS | (LOW_RATE if access == "low rate" else {})
    lowered = [x for name, value in limits.items() for x in (f"--{name}", str(value))]
    files = ["--tls-cert", str(certificates.worker), "--tls-key", str(certificates.worker_key)]
    log = folder / f"worker-{access.replace(' ', '-')}.log"
    worker = WorkerProcess(HONEST, ["--model", str(model), *files, *lets_in, *lowered], HOST, log)
    worker.start()
    client = None
    try:
        announced = worker.wait_until_listening()
        layer = next(x for x in Checkpoint.open(str(model)).layers if x.name.endswith("down_proj.weight"))
        target = Target(
            address=worker.address,
            ca=ca,
            foreign=foreign,
            fingerprint=announced["fingerprint"],
            layer=layer.name,
            columns=layer.in_features,
            outputs=layer.out_features,
            **attacker,
        )
        settings = {"address": worker.address, "model": model, "pause": PAUSE_SECONDS, "ca": ca, **honest}
        client = Honest(settings, folder)
        client.wait_until_it_asks()
        yield Experiment(worker, client, target, access)
    finally:
        if client is not None:
            client.stop()
        worker.kill()


def memory_bound() -> int:
    """Bytes that a worker may grow by: a block for each request of the attacker that runs and one of the
    honest client, a message in and out for each call that does not wait, what those hold that do, and
    connections."""
    limits = Limits()
    running = limits.max_concurrent_per_client + 1
    messages = (running + _OTHER_CALLS) * 2 * MAX_MESSAGE_BYTES
    waiting = limits.max_waiting_bytes_per_client
    return running * _BLOCK_BYTES + messages + waiting + _CONNECTIONS * _CONNECTION_BYTES


def _row(x: Outcome) -> str:
    statuses = ", ".join(f"{count} {name}" for name, count in Counter(x.statuses).most_common())
    return (
        f"{x.access[:8]:8} {x.kind:34}{x.core_ms:>9.2f}{(x.peak - x.before) / 2**20:>8.0f}"
        f"{(x.after - x.before) / 2**20:>7.0f}{x.honest_answers:>6}{x.honest_retries:>6}"
        f"{x.honest_failures:>6}{x.honest_longest:>9.2f}{x.latency_ratio:>9.1f}  {statuses}"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder of a small model")
    parser.add_argument("--requests", type=int, default=1000, help="of each kind")
    parser.add_argument("--only", default="", help="kinds whose name contains this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # So that the workers end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    found: list[Outcome] = []
    died = ""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        certificates = issue_operator_certificates(folder, "alpha", [HOST])
        foreign = issue_operator_certificates(folder, "foreign", [HOST]).ca.parent
        for access, kinds in (
            ("certificates", CALLS | SOCKETS),
            ("low rate", FLOODS),
            ("tokens", STRANGERS_CALLS | STRANGERS_SOCKETS),
        ):
            chosen = {name: attack for name, attack in kinds.items() if options.only in name}
            if not chosen:
                continue
            with experiment(folder, options.model, certificates, foreign, access) as running:
                try:
                    for name, attack in chosen.items():
                        running.attack(name, attack, options.requests)
                    running.quiet()
                except RuntimeError as error:
                    died = str(error)
                    running.quiet(0)
            found += running.outcomes()
    bound = memory_bound()
    print(f"{options.requests} requests of each kind; memory may grow by {bound / 2**20:.0f} MiB")
    print(
        f"{'':8} {'kind':34}{'core ms':>9}{'peak':>8}{'kept':>7}{'ok':>6}{'retr.':>6}{'fail':>6}"
        f"{'longest':>9}{'latency':>9}  statuses"
    )
    for outcome in found:
        print(_row(outcome))
    if options.json:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        content = {
            "machine": machine,
            "options": OPTIONS,
            "bound": bound,
            "kinds": [asdict(x) for x in found],
        }
        options.json.write_text(json.dumps(content, indent=1))
    wrong = [x.kind for x in found if not x.alive or x.honest_failures or not x.honest_answers]
    grown = [x.kind for x in found if x.peak - x.before > bound]
    if died or wrong or grown:
        sys.exit(f"the worker or the honest client suffered: {died} {wrong} {grown}")


if __name__ == "__main__":
    main()
