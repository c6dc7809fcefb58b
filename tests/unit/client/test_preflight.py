"""The way to an operator: each thing that can be wrong is found, by name, with what to do about it."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from support.tiny_layer import tiny_store

from blindtune.client import BlindConfig, Operator
from blindtune.client.operators.manifest import Expectations
from blindtune.client.preflight.finding import Finding, problem_of, until_a_problem
from blindtune.client.preflight.network import check_address, check_connection
from blindtune.client.preflight.operators import check_operators
from blindtune.client.preflight.tls import check_tls
from blindtune.client.tls.certs import OperatorCertificates, issue_operator_certificates
from blindtune.errors import IncompatibleWorkerError
from blindtune.protocol.parameters import Q31
from blindtune.server.daemon import serve
from blindtune.server.store import LayerStore
from blindtune.server.transport import Endpoint, TlsFiles

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
HOST = "127.0.0.1"


def problems(findings: Iterable[Finding]) -> list[Finding]:
    return [x for x in findings if x.status == "problem"]


def named(findings: Iterable[Finding], end: str) -> Finding:
    """The one finding whose name ends so."""
    (finding,) = [x for x in findings if x.check.endswith(end)]
    return finding


# Findings


@pytest.mark.parametrize("status", ["warning", "problem"])
def test_nothing_can_be_wrong_without_a_word_on_what_to_do(status: str) -> None:
    with pytest.raises(ValueError, match="does not say what to do"):
        Finding("disk", status, "full")  # type: ignore[arg-type]
    assert Finding("disk", "ok", "empty").fix == ""


def test_no_step_begins_after_a_problem() -> None:
    begun = []

    def step(number: int, status: str) -> Iterator[Finding]:
        begun.append(number)
        yield Finding(f"step {number}", status, "", "fix")  # type: ignore[arg-type]

    found = list(until_a_problem(step(1, "ok"), step(2, "warning"), step(3, "problem"), step(4, "ok")))
    assert [x.status for x in found] == ["ok", "warning", "problem"]
    assert begun == [1, 2, 3]


def test_what_to_do_is_taken_from_an_error_that_says_it() -> None:
    error = IncompatibleWorkerError("it serves model a: b: start it with another")
    assert problem_of("x", error, "ask") == Finding(
        "x", "problem", "it serves model a: b", "start it with another"
    )
    assert problem_of("x", IncompatibleWorkerError("no"), "ask") == Finding("x", "problem", "no", "ask")


# Operators, with workers of one small layer in this process


@pytest.fixture(scope="module")
def store() -> LayerStore:
    return tiny_store()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OperatorCertificates]:
    folder = tmp_path_factory.mktemp("certificates")
    return {name: issue_operator_certificates(folder, name, [HOST]) for name in ("alpha", "beta", "gamma")}


@contextmanager
def serving(store: LayerStore, files: OperatorCertificates | None) -> Iterator[str]:
    tls = files and TlsFiles(files.worker, files.worker_key, files.ca)
    worker = serve(store, Endpoint.parse(f"{HOST}:0", tls, insecure=tls is None))
    try:
        yield worker.address
    finally:
        worker.stop(drain_seconds=0)


@pytest.fixture(scope="module")
def alpha(store: LayerStore, certificates: dict[str, OperatorCertificates]) -> Iterator[str]:
    with serving(store, certificates["alpha"]) as address:
        yield address


@pytest.fixture(scope="module")
def plain(store: LayerStore) -> Iterator[str]:
    with serving(store, None) as address:
        yield address


def operator(files: OperatorCertificates, *workers: str, ca: Path | None = None) -> Operator:
    return Operator(files.ca.parent.name, workers, ca or files.ca, files.client, files.client_key)


def config_of(one: Operator) -> BlindConfig:
    return BlindConfig([one], "lattice", retry_seconds=0.0)


def expected_of(store: LayerStore) -> Expectations:
    return Expectations(
        "tiny", store.fingerprint, Q31.name, {name: x.fingerprint for name, x in store.layers.items()}
    )


@contextmanager
def server(answer: Callable[[socket.socket], object]) -> Iterator[int]:
    """A port of something else than a worker, which answers each connection in its own way."""
    with socket.create_server((HOST, 0)) as listening:

        def accept() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    try:
                        answer(connection)
                    except OSError:
                        continue

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def worker_certificate(files: OperatorCertificates, folder: Path, start: datetime, days: int) -> Path:
    """A worker's certificate of an operator's CA, valid at another time than the CA."""
    old = x509.load_pem_x509_certificate(files.worker.read_bytes())
    key = load_pem_private_key(files.ca_key.read_bytes(), None)
    builder = x509.CertificateBuilder(
        old.issuer, old.subject, old.public_key(), old.serial_number + 1, start, start + timedelta(days=days)
    )
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    path = folder / "worker.pem"
    path.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))  # type: ignore[arg-type]
    return path


def test_a_good_worker_passes_every_check_over_tls(
    alpha: str, certificates: dict[str, OperatorCertificates], store: LayerStore
) -> None:
    config = config_of(operator(certificates["alpha"], alpha))
    found = list(check_operators(config, expected_of(store)))
    assert {x.status for x in found} == {"ok"}
    assert [x.check for x in found] == [
        "alpha CA",
        "alpha client certificate",
        "alpha client key",
        *(f"alpha {alpha} {x}" for x in ("address", "connection", "certificate", "TLS", "manifest", "model")),
    ]
    assert "TLSv1.3" in named(found, " TLS").detail
    assert store.product_method in named(found, "manifest").detail
    assert "29 days" in named(found, f"{alpha} certificate").detail


def test_a_model_that_cannot_be_compared_yet_is_no_problem(
    alpha: str, certificates: dict[str, OperatorCertificates]
) -> None:
    found = list(check_operators(config_of(operator(certificates["alpha"], alpha)), None))
    assert not problems(found)
    assert "not compared" in named(found, "model").detail


def test_a_reference_run_needs_no_operator() -> None:
    (finding,) = check_operators(BlindConfig(masking="reference"), None)
    assert finding.status == "ok"


def test_a_name_that_does_not_resolve_is_the_only_problem(
    certificates: dict[str, OperatorCertificates],
) -> None:
    (finding,) = problems(
        check_operators(config_of(operator(certificates["alpha"], "no.invalid:7100")), None)
    )
    assert finding.check == "alpha no.invalid:7100 address"
    assert "no.invalid does not resolve" in finding.detail
    assert "DNS" in finding.fix


def test_a_name_that_is_none_is_a_problem_and_no_crash() -> None:
    (finding,) = check_address("alpha", f"{'x' * 70}.example", 7100)
    assert finding.status == "problem"
    assert "no valid name" in finding.detail


def test_a_port_where_nothing_listens_is_refused_and_goes_no_further(
    certificates: dict[str, OperatorCertificates],
) -> None:
    with socket.socket() as bound:
        bound.bind((HOST, 0))
        address = f"{HOST}:{bound.getsockname()[1]}"
        found = list(check_operators(config_of(operator(certificates["alpha"], address)), None))
    assert found[-1].check == f"alpha {address} connection"
    assert found[-1].status == "problem"
    assert "refused" in found[-1].detail
    assert "start the worker" in found[-1].fix


def test_an_address_without_a_route_is_told_apart_from_a_refusal() -> None:
    # TCP does not go to the broadcast address.
    (finding,) = check_connection("alpha", "255.255.255.255", 7100, 5.0)
    assert finding.status == "problem"
    assert "unreachable" in finding.detail
    assert "network" in finding.fix


def test_a_worker_of_another_ca_is_not_trusted(
    alpha: str, certificates: dict[str, OperatorCertificates]
) -> None:
    wrong = operator(certificates["alpha"], alpha, ca=certificates["beta"].ca)
    (finding,) = problems(check_operators(config_of(wrong), None))
    assert finding.check == f"alpha {alpha} certificate"
    assert "not signed by the pinned CA" in finding.detail
    assert str(certificates["beta"].ca) in finding.detail
    assert "current CA" in finding.fix


def test_a_ca_of_the_same_name_is_not_enough(
    alpha: str, certificates: dict[str, OperatorCertificates], tmp_path: Path
) -> None:
    reissued = issue_operator_certificates(tmp_path, "alpha", [HOST])
    (finding,) = problems(check_operators(config_of(operator(reissued, alpha)), None))
    assert "not signed by the pinned CA" in finding.detail


def test_a_certificate_for_another_host_says_which_host_it_must_name(
    alpha: str, certificates: dict[str, OperatorCertificates]
) -> None:
    elsewhere = alpha.replace(HOST, "localhost")
    (finding,) = problems(check_operators(config_of(operator(certificates["alpha"], elsewhere)), None))
    assert finding.check == f"alpha {elsewhere} certificate"
    assert "for another host than localhost" in finding.detail
    assert "localhost" in finding.fix


def test_a_clients_certificate_that_the_worker_does_not_accept_is_named(
    alpha: str, certificates: dict[str, OperatorCertificates]
) -> None:
    stranger = operator(certificates["beta"], alpha, ca=certificates["alpha"].ca)
    (finding,) = problems(check_operators(config_of(stranger), None))
    assert finding.check == f"beta {alpha} TLS"
    assert f"does not accept the client's certificate {certificates['beta'].client}" in finding.detail
    assert "--tls-client-ca" in finding.fix


def test_tls_to_a_plaintext_worker_is_called_by_its_name(
    plain: str, certificates: dict[str, OperatorCertificates]
) -> None:
    (finding,) = problems(check_operators(config_of(operator(certificates["alpha"], plain)), None))
    assert finding.check == f"alpha {plain} TLS"
    assert "does not speak TLS" in finding.detail
    assert "--insecure" in finding.fix


def test_plaintext_to_a_tls_worker_is_called_by_its_name(alpha: str) -> None:
    config = BlindConfig([Operator("alpha", [alpha])], "lattice", insecure=True)
    (finding,) = problems(check_operators(config, None))
    assert "speaks TLSv1.3, and insecure is set" in finding.detail
    assert "leave out insecure" in finding.fix


def test_a_plaintext_worker_on_loopback_passes(plain: str, store: LayerStore) -> None:
    config = BlindConfig([Operator("alpha", [plain])], "lattice", insecure=True)
    found = list(check_operators(config, expected_of(store)))
    assert {x.status for x in found} == {"ok"}
    assert [x.check.split()[-1] for x in found] == ["address", "connection", "manifest", "model"]


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        (lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "does not speak TLS"),
        (lambda connection: connection.recv(1), "broke off"),
        (lambda connection: connection.recv(1) and threading.Event().wait(2), "timeout"),
    ],
    ids=["a web server", "hangs up", "says nothing"],
)
def test_what_is_no_worker_does_not_pass_for_one(
    certificates: dict[str, OperatorCertificates], answer: Callable[[socket.socket], object], detail: str
) -> None:
    with server(answer) as port:
        (finding,) = check_tls("alpha", operator(certificates["alpha"], f"{HOST}:{port}"), HOST, port, 0.5)
    assert finding.status == "problem"
    assert detail in finding.detail
    assert finding.fix


def test_a_tls_server_that_speaks_no_http2_is_no_worker(
    certificates: dict[str, OperatorCertificates],
) -> None:
    files = certificates["alpha"]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.worker, files.worker_key)
    with server(lambda x: context.wrap_socket(x, server_side=True).recv(1)) as port:
        found = list(check_tls("alpha", operator(files, f"{HOST}:{port}"), HOST, port, 5.0))
    assert "does not speak HTTP/2" in named(problems(found), "TLS").detail


def test_a_worker_of_another_model_or_with_other_layers_is_a_problem(
    alpha: str, certificates: dict[str, OperatorCertificates], store: LayerStore
) -> None:
    config = config_of(operator(certificates["alpha"], alpha))
    expected = expected_of(store)
    (finding,) = problems(check_operators(config, replace(expected, fingerprint="0" * 64)))
    assert finding.check == f"alpha {alpha} model"
    assert "serves another model" in finding.detail
    assert finding.fix == "start it with the same checkpoint and revision"
    (finding,) = problems(check_operators(config, replace(expected, layers={"w": "0" * 64})))
    assert "lacks 1 of the layers" in finding.detail


# An operator's files


def test_certificates_that_expired_are_a_problem_and_no_handshake_is_tried(
    alpha: str, tmp_path: Path
) -> None:
    expired = issue_operator_certificates(tmp_path, "alpha", [HOST], now=LONG_AGO)
    found = list(check_operators(config_of(operator(expired, alpha)), None))
    assert [x.check for x in problems(found)] == ["alpha CA", "alpha client certificate"]
    assert all("expired on 2020-01-31" in x.detail and "new one" in x.fix for x in problems(found))
    assert found[-1].check == f"alpha {alpha} connection"


def test_certificates_that_are_not_valid_yet_blame_the_clock_as_well(alpha: str, tmp_path: Path) -> None:
    early = issue_operator_certificates(tmp_path, "alpha", [HOST], now=datetime.now(UTC) + timedelta(days=2))
    found = problems(check_operators(config_of(operator(early, alpha)), None))
    assert [x.check for x in found] == ["alpha CA", "alpha client certificate"]
    assert all("not valid before" in x.detail and "clock" in x.fix for x in found)


def test_certificates_about_to_expire_are_a_warning_on_both_sides(store: LayerStore, tmp_path: Path) -> None:
    short = issue_operator_certificates(tmp_path, "alpha", [HOST], days=3)
    with serving(store, short) as address:
        found = list(check_operators(config_of(operator(short, address)), None))
    assert not problems(found)
    warned = [x.check for x in found if x.status == "warning"]
    assert warned == ["alpha CA", "alpha client certificate", f"alpha {address} certificate"]


@pytest.mark.parametrize(("days_ago", "detail"), [(9, "expired"), (-2, "not valid yet")])
def test_a_workers_certificate_outside_its_time_is_a_problem(
    store: LayerStore,
    certificates: dict[str, OperatorCertificates],
    tmp_path: Path,
    days_ago: int,
    detail: str,
) -> None:
    files = certificates["alpha"]
    start = datetime.now(UTC) - timedelta(days=days_ago)
    wrong = replace(files, worker=worker_certificate(files, tmp_path, start, days=5))
    with serving(store, wrong) as address:
        (finding,) = problems(check_operators(config_of(operator(files, address)), None))
    assert finding.check == f"alpha {address} certificate"
    assert detail in finding.detail
    assert "renew" in finding.fix


def test_of_several_cas_one_that_is_valid_suffices(
    alpha: str, certificates: dict[str, OperatorCertificates], tmp_path: Path
) -> None:
    expired = issue_operator_certificates(tmp_path, "alpha", [HOST], now=LONG_AGO)
    both = tmp_path / "both.pem"
    both.write_bytes(expired.ca.read_bytes() + certificates["alpha"].ca.read_bytes())
    assert not problems(check_operators(config_of(operator(certificates["alpha"], alpha, ca=both)), None))


@pytest.fixture
def changing(alpha: str, tmp_path: Path) -> tuple[BlindConfig, OperatorCertificates]:
    """A configuration whose files a test changes after it was made."""
    files = issue_operator_certificates(tmp_path, "delta", [HOST])
    return config_of(operator(files, alpha)), files


def test_a_key_of_another_certificate_is_a_problem(
    changing: tuple[BlindConfig, OperatorCertificates], certificates: dict[str, OperatorCertificates]
) -> None:
    config, files = changing
    files.client_key.write_bytes(certificates["beta"].client_key.read_bytes())
    (finding,) = problems(check_operators(config, None))
    assert finding.check == "delta client key"
    assert "is not the key of certificate" in finding.detail
    assert "made together" in finding.fix


@pytest.mark.parametrize("name", ["ca", "client", "client_key"])
@pytest.mark.parametrize("content", [b"", b"SENTINEL", None], ids=["empty", "garbage", "gone"])
def test_damaged_files_are_problems_that_quote_nothing(
    changing: tuple[BlindConfig, OperatorCertificates], name: str, content: bytes | None
) -> None:
    config, files = changing
    path: Path = getattr(files, name)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    found = problems(check_operators(config, None))
    assert found
    assert all(x.fix and "SENTINEL" not in x.detail for x in found)
    assert str(path) in found[0].detail


def test_a_key_that_everyone_can_read_is_a_warning(
    changing: tuple[BlindConfig, OperatorCertificates],
) -> None:
    config, files = changing
    files.client_key.chmod(0o644)
    finding = named(check_operators(config, None), "client key")
    assert finding.status == "warning"
    assert finding.fix == f"chmod 600 {files.client_key}"
