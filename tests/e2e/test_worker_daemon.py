"""The daemon as a process of its own: mutual TLS, its fingerprint, its log, and its end."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from queue import Queue

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from transformers import LlamaConfig, LlamaForCausalLM

from blindtune.checkpoint import Checkpoint
from blindtune.client.tls.certs import OperatorCertificates, issue_operator_certificates
from blindtune.proto import PROTOCOL_VERSION, worker_pb2, worker_pb2_grpc
from blindtune.protocol.parameters import Q31

pytestmark = pytest.mark.hf

COMMAND = [sys.executable, "-m", "blindtune.server"]
PATIENCE = 120
ROWS = 1500


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(5)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> OperatorCertificates:
    return issue_operator_certificates(tmp_path_factory.mktemp("certificates"), "alpha")


class Daemon:
    """A worker process; half of its options come from the environment."""

    def __init__(self, model: Path, operator: OperatorCertificates, log: Path) -> None:
        self.log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [
                    *(*COMMAND, "serve", "--listen", "127.0.0.1:0", "--tls-key", str(operator.worker_key)),
                    *("--tls-cert", str(operator.worker), "--drain-seconds", str(PATIENCE)),
                ],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=log.parent,
                env=os.environ
                | {
                    "BLINDTUNE_WORKER_MODEL": str(model),
                    "BLINDTUNE_WORKER_TLS_CLIENT_CA": str(operator.ca),
                    "BLINDTUNE_WORKER_MAX_ROWS": str(ROWS),
                    "BLINDTUNE_WORKER_THREADS": "1",
                },
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, log.read_text()
        self.listening = json.loads(line)
        credentials = grpc.ssl_channel_credentials(
            operator.ca.read_bytes(), operator.client_key.read_bytes(), operator.client.read_bytes()
        )
        self.channel = grpc.secure_channel(self.listening["address"], credentials)
        self.stub = worker_pb2_grpc.WorkerStub(self.channel)

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def close(self) -> None:
        self.channel.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def daemon(model: Path, operator: OperatorCertificates, tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(model, operator, tmp_path / "worker.log")
    yield daemon
    daemon.close()


def test_a_daemon_states_its_model_multiplies_and_drains_on_sigterm(daemon: Daemon, model: Path) -> None:
    listing = subprocess.run(
        [*COMMAND, "fingerprint", str(model), "--layers"],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
        cwd=model.parent,
    ).stdout.splitlines()
    manifest = daemon.stub.GetManifest(worker_pb2.GetManifestRequest(), timeout=PATIENCE)
    assert listing == [
        f"{manifest.fingerprint}  {model}",
        *(f"{layer.fingerprint}  {layer.name}" for layer in manifest.layers),
    ]
    assert daemon.listening["event"] == "listening"
    assert daemon.listening["fingerprint"] == manifest.fingerprint
    assert (manifest.model, manifest.limits.max_rows) == ("tiny", ROWS)

    # A request that is in the middle of its rows when the signal comes.
    checkpoint = Checkpoint.open(model)
    layer = next(layer for layer in checkpoint.layers if layer.name.endswith("down_proj.weight"))
    with checkpoint.reader() as reader:
        weight = reader.read(layer).integers.numpy().astype(object)
    operand = np.random.default_rng(0).integers(0, Q31.modulus, (ROWS, 48), dtype=np.uint32)
    header = worker_pb2.MultiplyRequest(
        header=worker_pb2.MultiplyHeader(
            protocol_version=PROTOCOL_VERSION,
            fingerprint=manifest.fingerprint,
            parameter_set="q31",
            product=worker_pb2.Product(
                direction=worker_pb2.FORWARD,
                spans=[worker_pb2.Span(layer=layer.name, start=0, stop=48)],
            ),
            rows=ROWS,
            columns=48,
        )
    )
    messages: Queue[worker_pb2.MultiplyRequest | None] = Queue()
    messages.put(header)
    messages.put(worker_pb2.MultiplyRequest(residues=operand[:1100].tobytes()))
    call = daemon.stub.Multiply(iter(messages.get, None), timeout=PATIENCE)
    received = [next(call).residues]

    watch = health_pb2_grpc.HealthStub(daemon.channel).Watch(
        health_pb2.HealthCheckRequest(service="blindtune.v1.Worker"), timeout=PATIENCE
    )
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    daemon.process.send_signal(signal.SIGTERM)
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()
    # Supervisors that signal a process and then its group deliver a second one.
    daemon.process.send_signal(signal.SIGTERM)
    with pytest.raises(grpc.RpcError) as caught:
        list(daemon.stub.Multiply(iter([header]), timeout=PATIENCE))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    messages.put(worker_pb2.MultiplyRequest(residues=operand[1100:].tobytes()))
    messages.put(None)
    received += [response.residues for response in call]
    answer = np.frombuffer(b"".join(received), "<u4").reshape(ROWS, 32)
    assert np.array_equal(answer, (operand.astype(object) @ weight.T) % Q31.modulus)
    assert daemon.process.wait(PATIENCE) == 0

    lines = daemon.lines()
    assert {"listening", "draining", "stopped"} <= {line["event"] for line in lines}
    statuses = [line["status"] for line in lines if line["event"] == "multiply"]
    assert sorted(statuses, key=str) == ["OK", "UNAVAILABLE"]


def test_a_model_that_is_not_there_is_one_line_and_a_non_zero_exit(tmp_path: Path) -> None:
    arguments = ["serve", "--model", str(tmp_path / "gone"), "--listen", "127.0.0.1:0", "--insecure"]
    ended = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path
    )
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr == f"blindtune-worker: there is no checkpoint folder {tmp_path / 'gone'}\n"
