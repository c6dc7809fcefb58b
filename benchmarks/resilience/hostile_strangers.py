"""Can strangers without a token keep those who have one from a worker, or its supervisor?

    python -m benchmarks.resilience.hostile_strangers [--model FOLDER] [--seconds 15] [--only TEXT]
        [--before FOLDER] [--json FILE]

Starts a real worker with tokens, and one client that asks it for verified products without a pause. From the
addresses 127.0.0.2 to 127.0.0.5, 24 strangers do one kind of thing at a time, each on a connection of its
own, and begin again as soon as they are refused. Meanwhile `blindtune-worker health` and `GetManifest` with a
valid token are asked for, twice a second each, from 127.0.0.1 as a supervisor on the same machine does.
`--before` names a folder with another version (``pip install --no-deps --target FOLDER ...``), whose worker
is measured first.
"""

import argparse
import socket
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import grpc
import h2.exceptions

from benchmarks.common.crowd import Access, Appetite, Client, Question, small_model, worker
from benchmarks.common.measuring import print_table, write_json
from benchmarks.resilience.hostile_calls import CHECK, MULTIPLY, REFLECTION, WATCH, Target
from benchmarks.resilience.hostile_sockets import Http2
from blindtune.errors import BlindtuneError
from blindtune.proto import worker_pb2, worker_pb2_grpc
from blindtune.server.probe import ProbeTls, probe

ADDRESSES = ("127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5")
STREAMS = 24
PATIENCE_SECONDS = 3.0
HELD_SECONDS = 60.0
# An empty request, and the beginning of one that never comes to its end.
WHOLE, HALF = b"\0\0\0\0\0", b"\0\0\0\0\x64half"


def _call(method: str, *frames: bytes, calls: int = 1) -> Callable[[Target, threading.Event], None]:
    """So many calls on one connection, each with these bytes and no end; waits until the worker ends one."""

    def one(target: Target, over: threading.Event) -> None:
        connection = Http2(target)
        try:
            for _ in range(calls):
                stream = connection.begin(method)
                for frame in frames:
                    connection.state.send_data(stream, frame)
            connection.flush()
            held = time.monotonic() + HELD_SECONDS
            while not over.is_set() and time.monotonic() < held:
                if connection.ending(0.5) != "kept":
                    return
        finally:
            connection.close()

    return one


def _idle_connection(target: Target, over: threading.Event) -> None:
    """TLS stands, and nothing is asked."""
    connection = Http2(target)
    over.wait(HELD_SECONDS)
    connection.close()


def _half_a_handshake(target: Target, over: threading.Event) -> None:
    host, _, port = target.address.rpartition(":")
    with socket.create_connection((host, int(port)), 30, (target.source, 0)) as plain:
        plain.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100))
        plain.settimeout(0.5)
        while not over.is_set():
            try:
                if not plain.recv(1024):
                    return
            except TimeoutError:
                continue


KINDS: dict[str, Callable[[Target, threading.Event], None] | None] = {
    "nobody": None,
    "health, never asked": _call(CHECK),
    "health, half a request": _call(CHECK, HALF),
    "health watched": _call(WATCH, WHOLE),
    "100 health checks at a time": _call(CHECK, WHOLE, calls=100),
    "products without a token": _call(MULTIPLY),
    "reflection without a token": _call(REFLECTION),
    "connections that ask nothing": _idle_connection,
    "half a handshake": _half_a_handshake,
}


@dataclass
class Outcome:
    """What happened while strangers did one thing.

    Attributes:
        kind, version: which thing, and which worker.
        begun: how often they began it.
        health, manifests: whether each attempt succeeded.
        longest: seconds of the longest of them.
        products: a second, of the client.
        retries: of its requests.
        errors: products that there were none of.
    """

    kind: str
    version: str
    begun: int = 0
    health: list[bool] = field(default_factory=list)
    manifests: list[bool] = field(default_factory=list)
    longest: float = 0.0
    products: float = 0.0
    retries: int = 0
    errors: int = 0


def _strangers(
    kind: Callable[[Target, threading.Event], None], target: Target, over: threading.Event, outcome: Outcome
) -> list[threading.Thread]:
    def again_and_again(source: str) -> None:
        mine = Target(**vars(target) | {"source": source})
        while not over.is_set():
            outcome.begun += 1
            try:
                kind(mine, over)
            except (OSError, ssl.SSLError, h2.exceptions.ProtocolError):
                time.sleep(0.01)

    return [
        threading.Thread(target=again_and_again, args=(ADDRESSES[i % len(ADDRESSES)],))
        for i in range(STREAMS)
    ]


def _supervise(target: Target, over: threading.Event, outcome: Outcome) -> None:
    tls = ProbeTls(target.ca)
    credentials = grpc.ssl_channel_credentials(target.ca.read_bytes())
    while not over.wait(0.5):
        asked = time.monotonic()
        try:
            probe(target.address, tls, False, PATIENCE_SECONDS)
            outcome.health.append(True)
        except BlindtuneError as error:
            outcome.health.append(False)
            print(f"{time.monotonic() - asked:.2f} s: {error}", file=sys.stderr, flush=True)
        alone = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.secure_channel(target.address, credentials, alone) as channel:
            try:
                worker_pb2_grpc.WorkerStub(channel).GetManifest(
                    worker_pb2.GetManifestRequest(), timeout=PATIENCE_SECONDS, metadata=target.metadata()
                )
                outcome.manifests.append(True)
            except grpc.RpcError:
                outcome.manifests.append(False)
        outcome.longest = max(outcome.longest, time.monotonic() - asked)


def measured(kind: str, version: str, target: Target, client: Client, token: str, seconds: float) -> Outcome:
    """What one kind of thing does."""
    outcome, over = Outcome(kind, version), threading.Event()
    known = Target(**vars(target) | {"token": token})
    threads = [threading.Thread(target=_supervise, args=(known, over, outcome))]
    attack = KINDS[kind]
    if attack is not None:
        threads += _strangers(attack, target, over, outcome)
    for thread in threads:
        thread.start()
    begin = time.monotonic() + 2.0
    client.work(lambda: time.monotonic() >= begin + seconds)
    over.set()
    for thread in threads:
        thread.join()
    told = client.tell(begin, begin + seconds)
    outcome.products, outcome.retries = len(told.waits) / seconds, told.retries
    outcome.errors = len(told.errors)
    return outcome


HEADINGS = (
    "strangers", "worker", "begun", "health", "manifest", "longest, s", "products a second", "retries",
    "errors",
)  # fmt: skip


def _row(x: Outcome) -> tuple[object, ...]:
    health, manifests = (f"{sum(found)} of {len(found)}" for found in (x.health, x.manifests))
    return (
        x.kind, x.version, x.begun, health, manifests, f"{x.longest:.2f}", f"{x.products:.1f}", x.retries,
        x.errors,
    )  # fmt: skip


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint folder; a small random one unless given")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--only", default="", help="kinds whose name contains this")
    parser.add_argument("--before", type=Path, help="folder where another version is installed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    versions = {"this": None} if options.before is None else {"before": options.before, "this": None}
    found: list[Outcome] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = options.model or small_model(folder / "model")
        question = Question(model)
        for version, code in versions.items():
            access = Access(folder / version, 2, with_certificates=False)
            with worker(model, access, folder, [], code) as (running, _):
                target = Target(
                    running.address, access.certificates.ca, None, None, folder, None, question.fingerprint,
                    "", 0, 0,
                )  # fmt: skip
                token = access.clients[1]["token"].read_text().strip()
                for kind in (kind for kind in KINDS if options.only in kind):
                    client = Client(question, running.address, access.clients[0], Appetite())
                    found.append(measured(kind, version, target, client, token, options.seconds))
                    print_table(HEADINGS, [_row(found[-1])])
    print()
    print_table(HEADINGS, [_row(x) for x in sorted(found, key=lambda x: list(KINDS).index(x.kind))])
    if options.json:
        write_json(options.json, [asdict(x) for x in found], seconds=options.seconds)


if __name__ == "__main__":
    main()
