"""Clients that are let in, and strangers who may ask for the health alone, beside each other."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.tiny_layer import tiny_store

from blindtune.client.certs import OperatorCertificates, issue_operator_certificates
from blindtune.proto import worker_pb2, worker_pb2_grpc
from blindtune.server.daemon import RunningWorker, serve
from blindtune.server.tokens import add_token
from blindtune.server.transport import Endpoint, TlsFiles

PATIENCE = 60
CHECK = "/grpc.health.v1.Health/Check"
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> OperatorCertificates:
    return issue_operator_certificates(tmp_path_factory.mktemp("certificates"), "alpha")


@pytest.fixture
def tokens(operator: OperatorCertificates, tmp_path: Path) -> dict[str, list[tuple[str, str]]]:
    file = tmp_path / "tokens"
    return {name: [("authorization", f"Bearer {add_token(file, name)}")] for name in ("alice", "bob")}


@pytest.fixture
def worker(
    operator: OperatorCertificates, tokens: dict[str, list[tuple[str, str]]], tmp_path: Path
) -> Iterator[RunningWorker]:
    tls = TlsFiles(operator.worker, operator.worker_key, None)
    endpoint = Endpoint.parse("127.0.0.1:0", tls, tokens=tmp_path / "tokens")
    worker = serve(tiny_store(8), endpoint)
    yield worker
    worker.stop(drain_seconds=0)


@pytest.fixture
def channel(worker: RunningWorker, operator: OperatorCertificates) -> Iterator[grpc.Channel]:
    credentials = grpc.ssl_channel_credentials(operator.ca.read_bytes())
    with grpc.secure_channel(worker.address, credentials) as channel:
        yield channel


@pytest.mark.parametrize("who", ["alice", "a stranger"])
def test_one_who_keeps_many_calls_open_takes_no_place_from_others(
    who: str, channel: grpc.Channel, tokens: dict[str, list[tuple[str, str]]]
) -> None:
    over = threading.Event()

    def nothing() -> Iterator[bytes]:
        over.wait(PATIENCE)
        yield from ()

    silent = [
        channel.stream_stream(CHECK)(nothing(), timeout=PATIENCE, metadata=tokens.get(who)) for _ in range(40)
    ]
    # All but those that have a place are refused at once, while those wait for their client.
    give_up = time.monotonic() + PATIENCE
    while sum(call.is_active() for call in silent) > 6:
        assert time.monotonic() < give_up
        time.sleep(0.02)
    manifest = worker_pb2_grpc.WorkerStub(channel).GetManifest(
        worker_pb2.GetManifestRequest(), timeout=PATIENCE, metadata=tokens["bob"]
    )
    assert manifest.model == "tiny"
    asked = health_pb2.HealthCheckRequest()
    assert (
        health_pb2_grpc.HealthStub(channel).Check(asked, timeout=PATIENCE, metadata=tokens["bob"]).status
        == SERVING
    )
    assert sum(call.is_active() for call in silent) == 6
    over.set()


def test_a_name_that_somebody_made_up_is_not_watched(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    # The library remembers every name that was ever watched.
    for name in ("made up", "x" * 100_000):
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.Watch(health_pb2.HealthCheckRequest(service=name), timeout=PATIENCE))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="blindtune.v1.Worker"), timeout=PATIENCE)
    assert next(watch).status == SERVING
    watch.cancel()
