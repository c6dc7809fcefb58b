"""The daemon as a process: it ends whatever hangs, and its log quotes nobody."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from blindtune.proto import PROTOCOL_VERSION, worker_pb2, worker_pb2_grpc

pytestmark = pytest.mark.hf

PATIENCE = 120
# A device that takes a product and never gives it back, which no thread can be woken from, and an interpreter
# that takes longer to end than such a thread is given.
HANGING = """
import atexit
import threading
import time
from blindtune.server import cli
from blindtune.server.store import LayerStore

cli._CLOSING_SECONDS = 2.0

atexit.register(time.sleep, 3.0)

class Hanging:
    def __init__(self, multiplier):
        self.outputs = multiplier.outputs

    def multiply(self, product, operand, parameters):
        print("hangs", flush=True)
        threading.Event().wait()

multiplier = LayerStore.multiplier
LayerStore.multiplier = lambda store: Hanging(multiplier(store))
cli.main()
"""


class Daemon:
    """A worker in plaintext whose device hangs at its first product."""

    def __init__(self, model: Path, log: Path) -> None:
        self.log = log
        options = ("--listen", "127.0.0.1:0", "--insecure", "--threads", "1", "--drain-seconds", "0.5")
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", HANGING, "serve", "--model", str(model), *options],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.port = int(json.loads(self.line())["port"])

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        return line


@pytest.fixture
def daemon(checkpoints: dict[str, Path], tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(checkpoints["llama"], tmp_path / "log")
    yield daemon
    daemon.process.kill()
    daemon.process.communicate()


def test_a_device_that_hangs_does_not_keep_the_process(daemon: Daemon) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{daemon.port}") as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        manifest = stub.GetManifest(worker_pb2.GetManifestRequest(), timeout=PATIENCE)
        layer = manifest.layers[0]
        header = worker_pb2.MultiplyHeader(
            protocol_version=PROTOCOL_VERSION,
            fingerprint=manifest.fingerprint,
            parameter_set="q31",
            product=worker_pb2.Product(
                direction=worker_pb2.FORWARD,
                spans=[worker_pb2.Span(layer=layer.name, start=0, stop=layer.in_features)],
            ),
            rows=1,
            columns=layer.in_features,
        )
        operand = np.zeros((1, layer.in_features), np.uint32).tobytes()
        requests = [
            worker_pb2.MultiplyRequest(header=header),
            worker_pb2.MultiplyRequest(residues=operand),
        ]
        call = stub.Multiply(iter(requests), timeout=PATIENCE)
        assert daemon.line() == "hangs\n"
        daemon.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError):
            next(call)
    assert daemon.process.wait(PATIENCE) == 1
    log = daemon.log.read_text()
    assert "requests were cut off" in log and "in multiply" in log


def test_odd_metadata_and_strangers_leave_nothing_in_the_log_and_a_slow_end_is_a_good_one(
    daemon: Daemon,
) -> None:
    with socket.create_connection(("127.0.0.1", daemon.port), PATIENCE) as connection:
        headers = {
            ":method": b"POST",
            ":scheme": b"http",
            ":path": b"/grpc.health.v1.Health/Check",
            ":authority": b"x",
            "content-type": b"application/grpc",
            "te": b"trailers",
            "authorization": b"Bearer topsecret\xff",
        }
        block = b"".join(
            bytes([0, len(name)]) + name.encode() + bytes([len(value)]) + value
            for name, value in headers.items()
        )
        connection.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b"") + _frame(1, 4, 1, block)
        )
        connection.sendall(_frame(0, 1, 1, bytes(5)))
        answer = b""
        while b"grpc-status" not in answer:
            answer += connection.recv(1 << 16)
    with grpc.insecure_channel(f"127.0.0.1:{daemon.port}") as channel:
        with pytest.raises(grpc.RpcError) as caught:
            health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest(), timeout=PATIENCE)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    log = daemon.log.read_text()
    assert "topsecret" not in log and "Traceback" not in log
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(PATIENCE) == 0, daemon.log.read_text()


def _frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    """A frame of HTTP/2 (RFC 9113, section 4.1)."""
    return len(content).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + content
