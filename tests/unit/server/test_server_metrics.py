"""What a worker counts, and who may read it."""

import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from blindtune.client.tls.certs import issue_operator_certificates
from blindtune.errors import ConfigurationError, VerificationError
from blindtune.proto import PROTOCOL_VERSION, worker_pb2, worker_pb2_grpc
from blindtune.protocol.parameters import Q31, ParameterSet
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Residues
from blindtune.protocol.weights import IntegerLayer
from blindtune.server.admission import refusals
from blindtune.server.admission.limits import Limits
from blindtune.server.daemon import RunningWorker, serve
from blindtune.server.metrics import WorkerMetrics, rejection_reason
from blindtune.server.metrics_page import open_page
from blindtune.server.store import LayerStore
from blindtune.server.transport import Endpoint, TlsFiles

PATIENCE = 60
Message = worker_pb2.MultiplyRequest


@pytest.fixture(scope="module")
def store() -> LayerStore:
    integers = np.random.default_rng(3).integers(-127, 128, (24, 16), dtype=np.int8)
    layer = IntegerLayer(torch.from_numpy(integers), np.ones(24, np.float32))
    return LayerStore.from_layers(iter([("q", layer)]), model="tiny")


def request(store: LayerStore, rows: int, direction: int = worker_pb2.FORWARD) -> list[Message]:
    """A request in two messages, of zeros."""
    columns = 16 if direction == worker_pb2.FORWARD else 24
    header = worker_pb2.MultiplyHeader(
        protocol_version=PROTOCOL_VERSION,
        fingerprint=store.fingerprint,
        parameter_set=Q31.name,
        product=worker_pb2.Product(
            direction=direction,  # type: ignore[arg-type]
            spans=[worker_pb2.Span(layer="q", start=0, stop=columns)],
        ),
        rows=rows,
        columns=columns,
    )
    return [Message(header=header), Message(residues=bytes(4 * rows * columns))]


class Asked:
    """A worker with limits of one request and 50 rows, and a connection to it."""

    def __init__(self, running: RunningWorker) -> None:
        self.running = running
        self.channel = grpc.insecure_channel(running.address)
        self.stub = worker_pb2_grpc.WorkerStub(self.channel)

    def ask(self, messages: list[Message]) -> grpc.StatusCode:
        try:
            list(self.stub.Multiply(iter(messages), timeout=PATIENCE))
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    def figure(self, name: str, **labels: str) -> float | None:
        return self.running.metrics.registry.get_sample_value(f"blindtune_worker_{name}", labels)

    def settles(self, name: str, value: float, **labels: str) -> bool:
        """Whether a figure takes a value; it does so just after the client has its answer."""
        deadline = time.monotonic() + PATIENCE
        while self.figure(name, **labels) != value and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.figure(name, **labels) == value


class Held:
    """A multiplier that waits until it is let go."""

    def __init__(self, store: LayerStore) -> None:
        self._honest = store.multiplier()
        self.entered = threading.Event()
        self.let_go = threading.Event()
        self.let_go.set()

    def outputs(self, product: Product) -> int:
        return self._honest.outputs(product)

    def multiply(self, product: Product, operand: Residues, parameters: ParameterSet) -> Residues:
        self.entered.set()
        assert self.let_go.wait(PATIENCE)
        return self._honest.multiply(product, operand, parameters)


@pytest.fixture
def multiplier(store: LayerStore) -> Held:
    return Held(store)


@pytest.fixture
def worker(store: LayerStore, multiplier: Held) -> Iterator[Asked]:
    limits = Limits(max_rows=50, max_concurrent=1, max_waiting=1)
    endpoint = Endpoint.parse("127.0.0.1:0", insecure=True)
    asked = Asked(serve(store, endpoint, limits=limits, multiplier=multiplier))
    yield asked
    multiplier.let_go.set()
    asked.channel.close()
    asked.running.stop(drain_seconds=0)


def test_answers_are_counted_with_their_rows_bytes_and_times(worker: Asked, store: LayerStore) -> None:
    messages = request(store, 5)
    assert worker.ask(messages) is grpc.StatusCode.OK
    assert worker.ask(request(store, 7, worker_pb2.BACKWARD)) is grpc.StatusCode.OK
    forward, backward = ({"direction": x, "operand": "rows"} for x in ("forward", "backward"))
    assert worker.settles("requests_total", 1, **forward, status="OK")
    assert worker.settles("requests_total", 1, **backward, status="OK")
    assert worker.figure("rows_total", **forward) == 5
    assert worker.figure("rows_total", **backward) == 7
    bytes_in = sum(x.ByteSize() for x in messages + request(store, 7, worker_pb2.BACKWARD))
    assert worker.figure("received_bytes_total") == bytes_in
    payload = 4 * (5 * 24 + 7 * 16)
    assert payload < (worker.figure("sent_bytes_total") or 0) < payload + 32
    assert worker.figure("request_seconds_count", **forward) == 1
    assert worker.figure("product_seconds_count", direction="forward") == 1
    whole = worker.figure("request_seconds_sum", **forward)
    product = worker.figure("product_seconds_sum", direction="forward")
    assert whole is not None and product is not None and 0 < product < whole


def test_every_way_to_be_turned_away_is_counted_by_its_reason(worker: Asked, store: LayerStore) -> None:
    no_residues = Message(residues=Q31.modulus.to_bytes(4, "little") * 32)
    other_model = request(store, 1)
    other_model[0].header.fingerprint = "0" * 64
    other_layer = request(store, 1)
    other_layer[0].header.product.spans[0].layer = "v"
    for reason, messages in (
        ("over_limit", request(store, 51)),
        ("malformed_request", request(store, 3)[:1]),
        ("malformed_request", []),
        ("not_residues", [request(store, 2)[0], no_residues]),
        ("other_contract", other_model),
        ("layer_not_held", other_layer),
    ):
        before = worker.figure("rejected_total", reason=reason)
        assert before is not None, "a series that begins with its first event hides it from rate()"
        assert worker.ask(messages) is not grpc.StatusCode.OK
        assert worker.settles("rejected_total", before + 1, reason=reason), reason
    # A header that is refused says nothing that could be relied on.
    unread = {"direction": "unknown", "operand": "unknown"}
    assert worker.settles("requests_total", 1, **unread, status="INVALID_ARGUMENT")
    assert worker.settles("requests_total", 1, **unread, status="NOT_FOUND")
    read = {"direction": "forward", "operand": "rows"}
    assert worker.settles("requests_total", 2, **read, status="INVALID_ARGUMENT")
    assert worker.figure("rows_total", direction="forward", operand="rows") is None


def test_a_full_worker_shows_itself_as_full_and_counts_whom_it_refuses(
    worker: Asked, store: LayerStore, multiplier: Held
) -> None:
    assert worker.figure("capacity") == 1
    assert worker.figure("requests_in_progress") == 0
    multiplier.let_go.clear()
    held = threading.Thread(target=worker.ask, args=[request(store, 2)])
    held.start()
    assert multiplier.entered.wait(PATIENCE)
    assert worker.figure("requests_in_progress") == 1
    waits = threading.Thread(target=worker.ask, args=[request(store, 2)])
    waits.start()
    assert worker.settles("requests_waiting", 1)
    assert worker.ask(request(store, 2)) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert worker.settles("rejected_total", 1, reason="busy")
    multiplier.let_go.set()
    held.join(PATIENCE)
    waits.join(PATIENCE)
    assert worker.settles("requests_in_progress", 0)
    assert worker.figure("requests_waiting") == 0
    assert worker.figure("waiting_seconds_count") == 2


def test_every_refusal_has_a_reason_of_its_own() -> None:
    kinds = [getattr(refusals, name) for name in refusals.__all__ if name != "Refusal"]
    reasons = {rejection_reason(kind("why")) for kind in kinds}
    others = {rejection_reason(x) for x in (VerificationError("x"), MemoryError(), OSError("x"))}
    assert len(reasons) == len(kinds)
    assert others == {"not_residues", "out_of_memory", "internal_error"}
    assert not reasons & others
    assert rejection_reason(torch.OutOfMemoryError("x")) == "out_of_memory"


def test_two_workers_in_a_process_count_for_themselves(store: LayerStore) -> None:
    one, other = (
        WorkerMetrics(2, lambda: 0, lambda: 0, torch.device("cpu"), {"version": "1"}) for _ in range(2)
    )
    one.rejected(MemoryError())
    name, labels = "blindtune_worker_rejected_total", {"reason": "out_of_memory"}
    assert one.registry.get_sample_value(name, labels) == 1
    assert other.registry.get_sample_value(name, labels) == 0


def test_the_machine_is_shown_as_well(worker: Asked) -> None:
    registry = worker.running.metrics.registry
    assert (registry.get_sample_value("process_resident_memory_bytes") or 0) > 1 << 20
    assert (worker.figure("memory_available_bytes") or 0) > 1 << 20
    text = generate_latest(registry).decode()
    assert "blindtune_worker_build_info{" in text and 'model="tiny"' in text


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_memory_of_a_gpu_is_shown() -> None:
    device = torch.device("cuda", 0)
    held = torch.zeros(1 << 26, dtype=torch.uint8, device=device)
    registry = WorkerMetrics(1, lambda: 0, device, {}).registry
    free, total, reserved = (
        registry.get_sample_value(f"blindtune_worker_device_memory_{x}_bytes", {"device": "cuda:0"})
        for x in ("free", "total", "reserved")
    )
    assert free is not None and total is not None and reserved is not None
    assert held.nbytes <= reserved <= total - free


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Gauge("answer", "", registry=registry).set(42)
    return registry


def fetch(url: str, context: ssl.SSLContext | None = None) -> str:
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    with opener.open(url, timeout=PATIENCE) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_loopback_shows_the_metrics_and_no_other_page(host: str, registry: CollectorRegistry) -> None:
    page = open_page(f"{host}:0", None)
    page.show(registry)
    try:
        assert page.address.startswith(f"{host}:")
        assert "answer 42.0" in fetch(f"http://{page.address}/metrics")
        for path in ("", "/", "/metrics/", "/other", "/..//metrics"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                fetch(f"http://{page.address}{path}")
        with pytest.raises(ConfigurationError, match="cannot listen there.*in use"):
            open_page(page.address, None)
    finally:
        page.close()


def test_other_machines_need_a_certificate_of_the_clients_authority(
    tmp_path: Path, registry: CollectorRegistry
) -> None:
    ours = issue_operator_certificates(tmp_path, "alpha", ["127.0.0.1"])
    others = issue_operator_certificates(tmp_path, "beta", ["127.0.0.1"])
    with pytest.raises(ConfigurationError, match="needs --tls-cert, --tls-key and --tls-client-ca"):
        open_page("0.0.0.0:0", None)
    page = open_page("0.0.0.0:0", TlsFiles(ours.worker, ours.worker_key, ours.ca))
    page.show(registry)
    url = f"https://127.0.0.1:{page.address.rpartition(':')[2]}/metrics"
    try:
        context = ssl.create_default_context(cafile=str(ours.ca))
        for certificates in (None, others):
            if certificates is not None:
                context = ssl.create_default_context(cafile=str(ours.ca))
                context.load_cert_chain(certificates.client, certificates.client_key)
            with pytest.raises(OSError):
                fetch(url, context)
        with pytest.raises(OSError):
            fetch(url.replace("https", "http"))
        context = ssl.create_default_context(cafile=str(ours.ca))
        context.load_cert_chain(ours.client, ours.client_key)
        assert "answer 42.0" in fetch(url, context)
    finally:
        page.close()


def test_who_connects_and_says_nothing_keeps_nobody_waiting(
    tmp_path: Path, registry: CollectorRegistry
) -> None:
    ours = issue_operator_certificates(tmp_path, "alpha", ["127.0.0.1"])
    page = open_page("0.0.0.0:0", TlsFiles(ours.worker, ours.worker_key, ours.ca))
    page.show(registry)
    port = int(page.address.rpartition(":")[2])
    context = ssl.create_default_context(cafile=str(ours.ca))
    context.load_cert_chain(ours.client, ours.client_key)
    try:
        with socket.create_connection(("127.0.0.1", port)):
            assert "answer 42.0" in fetch(f"https://127.0.0.1:{port}/metrics", context)
    finally:
        page.close()


def test_readers_that_hang_use_up_no_threads(registry: CollectorRegistry) -> None:
    page = open_page("127.0.0.1:0", None)
    page.show(registry)
    port = int(page.address.rpartition(":")[2])
    silent = [socket.create_connection(("127.0.0.1", port), PATIENCE) for _ in range(40)]
    try:
        for refused in silent[16:]:
            assert refused.recv(1) == b""
        for waiting in silent[:16]:
            waiting.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            assert b"answer 42.0" in b"".join(iter(lambda: waiting.recv(1 << 16), b""))  # noqa: B023
    finally:
        for connection in silent:
            connection.close()
        page.close()


@pytest.mark.parametrize("listen", ["9464", "127.0.0.1", "127.0.0.1:x", ":9464"])
def test_an_address_that_is_none_is_one_clear_error(listen: str) -> None:
    with pytest.raises(ConfigurationError, match="is no address to listen at"):
        open_page(listen, None)
