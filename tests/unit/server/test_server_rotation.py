"""Certificates that change under a running worker and a running client: nobody is restarted or cut off."""

import shutil
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue

import grpc
import pytest
from support.tiny_layer import tiny_header, tiny_store

from blindtune.client.config.blind_config import Operator
from blindtune.client.operators.policy import Failure
from blindtune.client.operators.transport import GrpcTransport, TransportError
from blindtune.client.tls.certs import OperatorCertificates, issue_operator_certificates
from blindtune.common.reload import Reloaded
from blindtune.errors import ConfigurationError
from blindtune.proto import worker_pb2, worker_pb2_grpc
from blindtune.server.daemon import RunningWorker, serve
from blindtune.server.store import LayerStore
from blindtune.server.transport import Endpoint, TlsFiles

PATIENCE = 60
FILES = ("ca", "worker", "worker_key", "client", "client_key")


@pytest.fixture
def value(tmp_path: Path) -> Path:
    path = tmp_path / "value"
    path.write_text("1")
    return path


def number_in(path: Path) -> Callable[[], int]:
    def load() -> int:
        try:
            return int(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigurationError("no number") from error

    return load


def test_a_value_is_read_again_when_its_file_changes_and_only_then(value: Path) -> None:
    reads: list[int] = []

    def load() -> int:
        reads.append(1)
        return number_in(value)()

    reloaded = Reloaded("number", [value], load)
    assert [reloaded.get() for _ in range(3)] == [1, 1, 1]
    value.write_text("22")
    assert [reloaded.get() for _ in range(3)] == [22, 22, 22]
    assert len(reads) == 2


def test_a_link_that_is_turned_is_a_change(value: Path, tmp_path: Path) -> None:
    other, link = tmp_path / "other", tmp_path / "link"
    other.write_text("2")
    link.symlink_to(value)
    reloaded = Reloaded("number", [link], number_in(link))
    assert reloaded.get() == 1
    (tmp_path / "turned").symlink_to(other)
    (tmp_path / "turned").replace(link)
    assert reloaded.get() == 2


def test_what_can_no_longer_be_used_changes_nothing_and_is_logged_once_a_change(
    value: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reloaded = Reloaded("number", [value], number_in(value))
    for broken in ("x", "xyz", None):
        if broken is None:
            value.unlink()
        else:
            value.write_text(broken)
        assert [reloaded.get() for _ in range(4)] == [1] * 4
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 3
    value.write_text("333")
    assert reloaded.get() == 333


class Rotating:
    """One operator's files, which are exchanged in place."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._issues = 0
        self.files = self.issue()
        self.live = OperatorCertificates(
            *(folder / f"live-{name}.pem" for name in ("ca", "ca_key", *FILES[1:]))
        )
        self.install(self.files)

    def issue(self) -> OperatorCertificates:
        """Certificates of a new authority."""
        self._issues += 1
        return issue_operator_certificates(self._folder / str(self._issues), "alpha", ["127.0.0.1"])

    def install(self, files: OperatorCertificates, *names: str) -> None:
        """Exchanges files, each as a whole."""
        for name in names or FILES:
            target: Path = getattr(self.live, name)
            fresh = target.with_suffix(".new")
            shutil.copyfile(getattr(files, name), fresh)
            fresh.replace(target)

    @property
    def tls(self) -> TlsFiles:
        return TlsFiles(self.live.worker, self.live.worker_key, self.live.ca)

    def operator(self, address: str) -> Operator:
        return Operator("alpha", [address], ca=self.live.ca, cert=self.live.client, key=self.live.client_key)


@pytest.fixture(scope="module")
def store() -> LayerStore:
    return tiny_store()


@pytest.fixture
def rotating(tmp_path: Path) -> Rotating:
    return Rotating(tmp_path)


@pytest.fixture
def worker(store: LayerStore, rotating: Rotating) -> Iterator[RunningWorker]:
    worker = serve(store, Endpoint.parse("127.0.0.1:0", rotating.tls))
    yield worker
    worker.stop(drain_seconds=0)


def model_over(worker: RunningWorker, ours: OperatorCertificates, trusted: OperatorCertificates) -> str:
    """What a new connection with a client's certificate gets to see."""
    credentials = grpc.ssl_channel_credentials(
        trusted.ca.read_bytes(), ours.client_key.read_bytes(), ours.client.read_bytes()
    )
    with grpc.secure_channel(worker.address, credentials) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        return stub.GetManifest(worker_pb2.GetManifestRequest(), timeout=PATIENCE).model


def is_kept_out(worker: RunningWorker, ours: OperatorCertificates, trusted: OperatorCertificates) -> bool:
    with pytest.raises(grpc.RpcError) as caught:
        model_over(worker, ours, trusted)
    return caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_new_connections_get_the_certificates_that_are_there_now(
    worker: RunningWorker, rotating: Rotating
) -> None:
    old, new = rotating.files, rotating.issue()
    assert model_over(worker, old, old) == "tiny"
    rotating.install(new)
    assert is_kept_out(worker, old, old)
    assert is_kept_out(worker, old, new)
    assert model_over(worker, new, new) == "tiny"


@pytest.mark.parametrize("name", ["ca", "worker", "worker_key"])
@pytest.mark.parametrize("content", [b"", b"not PEM", None])
def test_broken_files_leave_a_worker_as_it_was_and_are_logged_once(
    worker: RunningWorker,
    rotating: Rotating,
    name: str,
    content: bytes | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path: Path = getattr(rotating.live, name)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    for _ in range(3):
        assert model_over(worker, rotating.files, rotating.files) == "tiny"
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert str(path) in vars(errors[0])["error"]
    rotating.install(new := rotating.issue())
    assert model_over(worker, new, new) == "tiny"


def test_a_certificate_without_its_key_yet_is_not_used(worker: RunningWorker, rotating: Rotating) -> None:
    old, new = rotating.files, rotating.issue()
    rotating.install(new, "worker")
    assert model_over(worker, old, old) == "tiny"
    rotating.install(new, "worker_key")
    assert is_kept_out(worker, old, old)
    assert model_over(worker, old, new) == "tiny"


def test_the_private_key_in_force_is_the_new_one(worker: RunningWorker, rotating: Rotating) -> None:
    before = ssl.get_server_certificate(("127.0.0.1", worker.port))
    new = rotating.issue()
    rotating.install(new, "worker", "worker_key")
    after = ssl.get_server_certificate(("127.0.0.1", worker.port))
    assert before.split() == rotating.files.worker.read_text().split()
    assert after.split() == new.worker.read_text().split()


def again(transport: GrpcTransport) -> str:
    """Asks until there is an answer, as an operator's client does; every failure must be a passing one."""
    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            return transport.manifest(PATIENCE).model
        except TransportError as error:
            assert error.failure is Failure.UNREACHABLE, error
            assert time.monotonic() < give_up, error
            time.sleep(0.05)


@pytest.fixture
def transport(worker: RunningWorker, rotating: Rotating) -> Iterator[GrpcTransport]:
    transport = GrpcTransport(rotating.operator(worker.address), worker.address, insecure=False)
    yield transport
    transport.close()


def test_a_client_follows_a_worker_that_came_back_with_another_authority(
    store: LayerStore, worker: RunningWorker, rotating: Rotating, transport: GrpcTransport
) -> None:
    assert transport.manifest(PATIENCE).model == "tiny"
    worker.stop(drain_seconds=0)
    rotating.install(rotating.issue())
    back = serve(store, Endpoint.parse(worker.address, rotating.tls))
    try:
        assert again(transport) == "tiny"
    finally:
        back.stop(drain_seconds=0)


def test_a_client_whose_files_broke_goes_on_with_those_it_read(
    store: LayerStore,
    worker: RunningWorker,
    rotating: Rotating,
    transport: GrpcTransport,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert transport.manifest(PATIENCE).model == "tiny"
    worker.stop(drain_seconds=0)
    rotating.live.client_key.write_bytes(b"")  # gRPC would end the process
    for _ in range(3):
        with pytest.raises(TransportError):
            transport.manifest(PATIENCE)
    warnings = [record for record in caplog.records if "as they were" in record.getMessage()]
    assert len(warnings) == 1
    back = serve(store, Endpoint.parse(worker.address, rotating.tls))
    try:
        assert again(transport) == "tiny"
    finally:
        back.stop(drain_seconds=0)


def test_a_request_that_runs_while_the_client_changes_its_connection_is_finished(
    store: LayerStore, worker: RunningWorker, rotating: Rotating, transport: GrpcTransport
) -> None:
    header = tiny_header(store.fingerprint, seed=False)
    messages: Queue[worker_pb2.MultiplyRequest | None] = Queue()
    messages.put(worker_pb2.MultiplyRequest(header=header))
    with transport._connected() as connection:
        call = connection.stub.Multiply(iter(messages.get, None), timeout=PATIENCE)
        rotating.install(rotating.issue())
        # Another request fails: its time is up before it began.
        with pytest.raises(TransportError):
            transport.manifest(-1)
        with transport._connected() as fresh:
            assert fresh is not connection
            assert fresh.stub.GetManifest(worker_pb2.GetManifestRequest(), timeout=PATIENCE).model == "tiny"
        messages.put(worker_pb2.MultiplyRequest(residues=bytes(32)))
        messages.put(None)
        assert b"".join(x.residues for x in call) == bytes(16)
    # Its last call has ended, so the old connection is closed.
    with pytest.raises(ValueError, match="closed channel"):
        connection.stub.GetManifest(worker_pb2.GetManifestRequest(), timeout=PATIENCE)


def test_what_is_closed_stays_closed_and_says_so(worker: RunningWorker, transport: GrpcTransport) -> None:
    assert transport.manifest(PATIENCE).model == "tiny"
    with pytest.raises(TransportError, match="was closed"):
        with transport._connected() as connection:
            transport.close()  # another thread does, just before the call
            connection.stub.GetManifest(worker_pb2.GetManifestRequest(), timeout=PATIENCE)
    with pytest.raises(TransportError, match="was closed"):
        transport.manifest(PATIENCE)


def test_closing_ends_calls_on_a_connection_that_was_exchanged_too(
    worker: RunningWorker, rotating: Rotating, transport: GrpcTransport
) -> None:
    messages: Queue[worker_pb2.MultiplyRequest | None] = Queue()
    with pytest.raises(TransportError) as caught:
        with transport._connected() as connection:
            call = connection.stub.Multiply(iter(messages.get, None), timeout=PATIENCE)
            rotating.install(rotating.issue())
            with pytest.raises(TransportError):
                transport.manifest(-1)
            assert transport.manifest(PATIENCE).model == "tiny"
            transport.close()
            next(call)
    assert caught.value.code is grpc.StatusCode.CANCELLED
    messages.put(None)


def test_a_failure_without_a_change_keeps_the_connection(
    worker: RunningWorker, transport: GrpcTransport
) -> None:
    with transport._connected() as before:
        pass
    with pytest.raises(TransportError):
        transport.manifest(-1)
    with transport._connected() as after:
        assert after is before
