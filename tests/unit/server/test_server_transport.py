"""Who can connect to a worker: mutual TLS over a real connection, and plaintext on loopback alone."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from support.tiny_layer import tiny_store

from blindtune.client.tls.certs import OperatorCertificates, issue_operator_certificates
from blindtune.errors import ConfigurationError
from blindtune.proto import worker_pb2, worker_pb2_grpc
from blindtune.server.admission.limits import Limits
from blindtune.server.daemon import RunningWorker, serve
from blindtune.server.store import LayerStore
from blindtune.server.transport import Endpoint, TlsFiles


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OperatorCertificates]:
    folder = tmp_path_factory.mktemp("certificates")
    return {name: issue_operator_certificates(folder, name) for name in ("alpha", "beta")}


@pytest.fixture(scope="module")
def store() -> LayerStore:
    return tiny_store()


def tls_files(operator: OperatorCertificates) -> TlsFiles:
    return TlsFiles(operator.worker, operator.worker_key, operator.ca)


@pytest.fixture(scope="module")
def worker(store: LayerStore, certificates: dict[str, OperatorCertificates]) -> Iterator[RunningWorker]:
    running = serve(store, Endpoint.parse("127.0.0.1:0", tls_files(certificates["alpha"])))
    yield running
    running.stop(drain_seconds=0)


def model_seen_by(channel: grpc.Channel) -> str:
    """Asks for the manifest once, without waiting for a connection that never comes."""
    with channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        return stub.GetManifest(worker_pb2.GetManifestRequest(), timeout=60).model


def as_client(operator: OperatorCertificates, trusted: OperatorCertificates) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        trusted.ca.read_bytes(), operator.client_key.read_bytes(), operator.client.read_bytes()
    )


def test_a_client_of_the_pinned_ca_is_let_in(
    worker: RunningWorker, certificates: dict[str, OperatorCertificates]
) -> None:
    credentials = as_client(certificates["alpha"], trusted=certificates["alpha"])
    assert model_seen_by(grpc.secure_channel(worker.address, credentials)) == "tiny"


def test_a_client_of_another_ca_is_kept_out(
    worker: RunningWorker, certificates: dict[str, OperatorCertificates]
) -> None:
    credentials = as_client(certificates["beta"], trusted=certificates["alpha"])
    with pytest.raises(grpc.RpcError) as caught:
        model_seen_by(grpc.secure_channel(worker.address, credentials))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_client_without_a_certificate_is_kept_out(
    worker: RunningWorker, certificates: dict[str, OperatorCertificates]
) -> None:
    credentials = grpc.ssl_channel_credentials(certificates["alpha"].ca.read_bytes())
    with pytest.raises(grpc.RpcError) as caught:
        model_seen_by(grpc.secure_channel(worker.address, credentials))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_plaintext_client_gets_nothing_from_a_tls_worker(worker: RunningWorker) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        model_seen_by(grpc.insecure_channel(worker.address))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_tls_files_that_are_unusable_are_named(
    tmp_path: Path, certificates: dict[str, OperatorCertificates]
) -> None:
    alpha, beta = certificates["alpha"], certificates["beta"]
    text = tmp_path / "text.pem"
    text.write_text("not a certificate\n")
    absent = tmp_path / "absent.pem"
    for files, message in [
        (TlsFiles(absent, alpha.worker_key, alpha.ca), f"cannot read {absent}"),
        (TlsFiles(alpha.worker, beta.worker_key, alpha.ca), "cannot be used together"),
        (TlsFiles(text, alpha.worker_key, alpha.ca), "cannot be used together"),
        (TlsFiles(alpha.worker, alpha.worker_key, text), f"{text} holds no CA certificate"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            files.credentials()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "localhost", "[::1]"])
def test_plaintext_is_possible_on_loopback(host: str) -> None:
    endpoint = Endpoint.parse(f"{host}:7100", insecure=True)
    assert (endpoint.tls, endpoint.port) == (None, 7100)
    assert endpoint.address(7100) == f"{host}:7100"


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "[::]", "192.0.2.7", "[2001:db8::1]", "name-that-does-not-exist.invalid"]
)
def test_plaintext_beyond_loopback_is_refused(host: str) -> None:
    with pytest.raises(ConfigurationError, match="--insecure needs a loopback address"):
        Endpoint.parse(f"{host}:7100", insecure=True)


@pytest.mark.parametrize("listen", ["", "7100", "127.0.0.1", "127.0.0.1:", ":7100", "h:65536", "h:-1", "h:x"])
def test_what_is_no_address_is_refused(listen: str) -> None:
    with pytest.raises(ConfigurationError, match="give HOST:PORT"):
        Endpoint.parse(listen, insecure=True)


def test_tls_and_plaintext_exclude_each_other_and_one_is_needed() -> None:
    files = TlsFiles(Path("a"), Path("b"), Path("c"))
    with pytest.raises(ConfigurationError, match="not both"):
        Endpoint.parse("127.0.0.1:0", files, insecure=True)
    with pytest.raises(ConfigurationError, match="--tls-cert"):
        Endpoint.parse("127.0.0.1:0")


def test_a_second_worker_on_a_port_is_refused(store: LayerStore) -> None:
    first = serve(store, Endpoint.parse("127.0.0.1:0", insecure=True))
    try:
        with pytest.raises(ConfigurationError, match=f"cannot listen at {first.address}"):
            serve(store, Endpoint.parse(first.address, insecure=True))
    finally:
        first.stop(drain_seconds=0)


@pytest.mark.parametrize("field", ["max_rows", "max_operand_bytes", "max_concurrent"])
def test_limits_that_are_not_positive_are_refused(field: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{field} is 0"):
        Limits(**{field: 0})
