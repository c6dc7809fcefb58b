import contextlib
import os
import resource
import socket
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID

from blindtune.client.tls.certs import OperatorCertificates, issue_operator_certificates
from blindtune.errors import ConfigurationError

METHOD = "/certs.Echo/Echo"
ROLES = ("ca", "worker", "client")
FILES = {f"{role}{suffix}.pem" for role in ROLES for suffix in ("", "-key")}


class Server:
    """A gRPC server that echoes bytes to clients whose certificate ``trusted_ca`` has signed."""

    def __init__(self, certificate: Path, key: Path, trusted_ca: Path, host: str) -> None:
        self.calls = 0
        self._server = grpc.server(ThreadPoolExecutor(2))
        handler = grpc.unary_unary_rpc_method_handler(self._echo)
        service, method = METHOD.strip("/").split("/")
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {method: handler}),)
        )
        credentials = grpc.ssl_server_credentials(
            [(key.read_bytes(), certificate.read_bytes())],
            root_certificates=trusted_ca.read_bytes(),
            require_client_auth=True,
        )
        self.port = self._server.add_secure_port(f"{host}:0", credentials)
        self._server.start()

    def _echo(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.calls += 1
        return request

    def stop(self) -> None:
        self._server.stop(None).wait(10)


@contextlib.contextmanager
def serving(
    certificates: OperatorCertificates, trusted_ca: Path | None = None, host: str = "127.0.0.1"
) -> Iterator[Server]:
    server = Server(certificates.worker, certificates.worker_key, trusted_ca or certificates.ca, host)
    try:
        yield server
    finally:
        server.stop()


def call(
    server: Server,
    trusted_ca: Path,
    certificate: Path | None = None,
    key: Path | None = None,
    host: str = "127.0.0.1",
) -> bytes:
    credentials = grpc.ssl_channel_credentials(
        trusted_ca.read_bytes(),
        key.read_bytes() if key else None,
        certificate.read_bytes() if certificate else None,
    )
    options = [("grpc.enable_http_proxy", 0)]
    with grpc.secure_channel(f"{host}:{server.port}", credentials, options) as channel:
        return channel.unary_unary(METHOD)(b"hello", timeout=20)


def assert_accepted(server: Server, client: OperatorCertificates, host: str = "127.0.0.1") -> None:
    assert call(server, client.ca, client.client, client.client_key, host) == b"hello"


def assert_refused(
    server: Server, *arguments: Path | None, host: str = "127.0.0.1", because: str = ""
) -> None:
    calls = server.calls
    with pytest.raises(grpc.RpcError) as refusal:
        call(server, *arguments, host=host)
    assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
    assert because in refusal.value.details()
    assert server.calls == calls


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def extension(path: Path, kind: type) -> x509.Extension:
    return load(path).extensions.get_extension_for_class(kind)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b""
        for path in directory.rglob("*")
    }


@pytest.fixture(scope="module")
def alpha(tmp_path_factory: pytest.TempPathFactory) -> OperatorCertificates:
    return issue_operator_certificates(tmp_path_factory.mktemp("alpha"), "alpha")


@pytest.fixture(scope="module")
def beta(tmp_path_factory: pytest.TempPathFactory) -> OperatorCertificates:
    return issue_operator_certificates(tmp_path_factory.mktemp("beta"), "beta")


# Mutual TLS over loopback.


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_client_reaches_worker_at_each_default_host(alpha: OperatorCertificates, host: str) -> None:
    listen = "127.0.0.1"
    if host == "[::1]":
        listen = host
        try:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 loopback")
    with serving(alpha, host=listen) as server:
        assert_accepted(server, alpha, host)
        assert server.calls == 1


def test_client_of_another_operator_is_refused_by_the_worker(
    alpha: OperatorCertificates, beta: OperatorCertificates
) -> None:
    with serving(alpha) as server:
        assert_refused(server, alpha.ca, beta.client, beta.client_key)
        assert_accepted(server, alpha)


def test_worker_of_another_operator_is_refused_by_the_client(
    alpha: OperatorCertificates, beta: OperatorCertificates
) -> None:
    # The worker would accept this client: only the client's pinned CA stands in the way.
    with serving(beta, trusted_ca=alpha.ca) as server:
        assert_refused(
            server,
            alpha.ca,
            alpha.client,
            alpha.client_key,
            because="CERTIFICATE_VERIFY_FAILED",
        )
        assert call(server, beta.ca, alpha.client, alpha.client_key) == b"hello"


def test_operators_of_the_same_name_do_not_share_trust(alpha: OperatorCertificates, tmp_path: Path) -> None:
    namesake = issue_operator_certificates(tmp_path, "alpha")
    with serving(alpha) as server:
        assert_refused(server, alpha.ca, namesake.client, namesake.client_key)
        assert_refused(
            server,
            namesake.ca,
            alpha.client,
            alpha.client_key,
            because="CERTIFICATE_VERIFY_FAILED",
        )
        assert_accepted(server, alpha)


def test_client_without_certificate_is_refused(alpha: OperatorCertificates) -> None:
    with serving(alpha) as server:
        assert_refused(server, alpha.ca)
        assert_accepted(server, alpha)


def test_worker_certificate_cannot_act_as_client(alpha: OperatorCertificates) -> None:
    with serving(alpha) as server:
        assert_refused(server, alpha.ca, alpha.worker, alpha.worker_key)
        assert_accepted(server, alpha)


def test_client_certificate_cannot_act_as_worker(alpha: OperatorCertificates) -> None:
    server = Server(alpha.client, alpha.client_key, alpha.ca, "127.0.0.1")
    try:
        assert_refused(
            server,
            alpha.ca,
            alpha.client,
            alpha.client_key,
            because="CERTIFICATE_VERIFY_FAILED",
        )
    finally:
        server.stop()


def test_worker_reached_under_a_host_not_in_its_certificate_is_refused(tmp_path: Path) -> None:
    named = issue_operator_certificates(tmp_path, "named", ["worker.example", "localhost"])
    with serving(named) as server:
        assert_refused(server, named.ca, named.client, named.client_key, because="127.0.0.1")
        assert_accepted(server, named, "localhost")


@pytest.mark.parametrize(("age_days", "accepted"), [(29, True), (31, False)])
def test_expired_client_is_refused_by_the_worker(
    alpha: OperatorCertificates, tmp_path: Path, age_days: int, accepted: bool
) -> None:
    issued = datetime.now(UTC) - timedelta(days=age_days)
    old = issue_operator_certificates(tmp_path, "old", days=30, now=issued)
    with serving(alpha, trusted_ca=old.ca) as server:
        if accepted:
            assert call(server, alpha.ca, old.client, old.client_key) == b"hello"
        else:
            assert_refused(server, alpha.ca, old.client, old.client_key)


@pytest.mark.parametrize(("age_days", "accepted"), [(29, True), (31, False)])
def test_expired_worker_is_refused_by_the_client(
    alpha: OperatorCertificates, tmp_path: Path, age_days: int, accepted: bool
) -> None:
    issued = datetime.now(UTC) - timedelta(days=age_days)
    old = issue_operator_certificates(tmp_path, "old", days=30, now=issued)
    with serving(old, trusted_ca=alpha.ca) as server:
        arguments = (old.ca, alpha.client, alpha.client_key)
        if accepted:
            assert call(server, *arguments) == b"hello"
        else:
            assert_refused(server, *arguments, because="CERTIFICATE_VERIFY_FAILED")


# What the certificates say.


def test_worker_chain_passes_a_strict_verifier_for_its_hosts_only(
    alpha: OperatorCertificates,
) -> None:
    store = verification.Store([load(alpha.ca)])
    builder = verification.PolicyBuilder().store(store)
    chain = builder.build_server_verifier(x509.DNSName("localhost")).verify(load(alpha.worker), [])
    assert chain == [load(alpha.worker), load(alpha.ca)]
    with pytest.raises(verification.VerificationError):
        builder.build_server_verifier(x509.DNSName("elsewhere")).verify(load(alpha.worker), [])


def test_hosts_become_dns_names_and_addresses_once_each(tmp_path: Path) -> None:
    hosts = ["gpu-1.example", "worker_1", "10.1.2.3", "2001:db8::7", "gpu-1.example"]
    certificates = issue_operator_certificates(tmp_path, "alpha", hosts)
    names = extension(certificates.worker, x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["gpu-1.example", "worker_1"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == [
        "10.1.2.3",
        "2001:db8::7",
    ]


def test_each_certificate_allows_its_role_and_no_other(alpha: OperatorCertificates) -> None:
    constraints = extension(alpha.ca, x509.BasicConstraints)
    assert constraints.critical and constraints.value.ca and constraints.value.path_length == 0
    usage = extension(alpha.ca, x509.KeyUsage)
    assert usage.critical and usage.value.key_cert_sign and not usage.value.digital_signature
    for path, purpose in (
        (alpha.worker, ExtendedKeyUsageOID.SERVER_AUTH),
        (alpha.client, ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        constraints = extension(path, x509.BasicConstraints)
        assert constraints.critical and not constraints.value.ca
        usage = extension(path, x509.KeyUsage)
        assert usage.critical and usage.value.digital_signature and not usage.value.key_cert_sign
        assert list(extension(path, x509.ExtendedKeyUsage).value) == [purpose]


def test_each_key_is_a_distinct_p256_key_matching_its_certificate(
    alpha: OperatorCertificates, beta: OperatorCertificates
) -> None:
    seen = set()
    for certificates in (alpha, beta):
        for role in ROLES:
            key_path = getattr(certificates, f"{role}_key")
            key = load_pem_private_key(key_path.read_bytes(), None)
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            assert isinstance(key.curve, ec.SECP256R1)
            certificate = load(getattr(certificates, role))
            assert certificate.public_key() == key.public_key()
            assert certificate.signature_hash_algorithm.name == "sha256"
            certificate.verify_directly_issued_by(load(certificates.ca))
            seen.add(key.private_numbers().private_value)
    assert len(seen) == 6


def test_key_identifiers_link_each_certificate_to_its_ca(alpha: OperatorCertificates) -> None:
    ca_id = extension(alpha.ca, x509.SubjectKeyIdentifier).value.digest
    for path in (alpha.ca, alpha.worker, alpha.client):
        own_id = x509.SubjectKeyIdentifier.from_public_key(load(path).public_key())
        assert extension(path, x509.SubjectKeyIdentifier).value == own_id
        assert extension(path, x509.AuthorityKeyIdentifier).value.key_identifier == ca_id


def test_validity_covers_the_days_asked_and_a_slightly_slow_clock(tmp_path: Path) -> None:
    now = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
    certificates = issue_operator_certificates(tmp_path, "alpha", days=7, now=now)
    for path in (certificates.ca, certificates.worker, certificates.client):
        assert load(path).not_valid_after_utc == now + timedelta(days=7)
        assert load(path).not_valid_before_utc == now - timedelta(minutes=5)


# What lies on disk.


def test_six_files_are_written_under_the_operator_and_nothing_else(tmp_path: Path) -> None:
    certificates = issue_operator_certificates(tmp_path / "new" / "folder", "alpha")
    assert set(os.listdir(tmp_path / "new" / "folder")) == {"alpha"}
    assert set(os.listdir(tmp_path / "new" / "folder" / "alpha")) == FILES
    folder = tmp_path / "new" / "folder" / "alpha"
    assert certificates == OperatorCertificates(
        ca=folder / "ca.pem",
        ca_key=folder / "ca-key.pem",
        worker=folder / "worker.pem",
        worker_key=folder / "worker-key.pem",
        client=folder / "client.pem",
        client_key=folder / "client-key.pem",
    )


def test_private_keys_are_private_from_the_moment_they_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    created: dict[str, int] = {}
    real_open = os.open

    def recording_open(path, flags, mode=0o777, **options):
        descriptor = real_open(path, flags, mode, **options)
        if flags & os.O_CREAT:
            created[os.path.basename(path)] = stat.S_IMODE(os.fstat(descriptor).st_mode)
        return descriptor

    monkeypatch.setattr(os, "open", recording_open)
    # Nothing but the modes asked for protects the files under this umask.
    umask = os.umask(0)
    try:
        issue_operator_certificates(tmp_path / "certs", "alpha")
    finally:
        os.umask(umask)
    assert set(created) == FILES
    for role in ROLES:
        assert created[f"{role}-key.pem"] == 0o600
        path = tmp_path / "certs" / "alpha" / f"{role}-key.pem"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for folder in (tmp_path / "certs", tmp_path / "certs" / "alpha"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("existing", ["certificates", "other file", "plain file", "symlink"])
def test_existing_files_are_never_overwritten(tmp_path: Path, existing: str) -> None:
    target = tmp_path / "certs" / "alpha"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if existing == "certificates":
        issue_operator_certificates(tmp_path / "certs", "alpha")
    elif existing == "other file":
        target.mkdir(parents=True)
        (target / "notes.txt").write_text("mine")
    else:
        target.parent.mkdir()
        target.write_text("mine") if existing == "plain file" else target.symlink_to(elsewhere)
    before = contents(tmp_path)
    with pytest.raises(ConfigurationError, match=r"certs/alpha already exists.*remove it") as error:
        issue_operator_certificates(tmp_path / "certs", "alpha")
    assert "PRIVATE" not in str(error.value)
    assert contents(tmp_path) == before
    assert target.is_symlink() == (existing == "symlink")


def test_other_operators_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    issue_operator_certificates(tmp_path, "alpha")
    before = contents(tmp_path / "alpha")
    issue_operator_certificates(tmp_path, "beta")
    assert contents(tmp_path / "alpha") == before


def test_failure_while_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    # A key fits under this limit and a certificate does not, so the writing stops half-way.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))
    try:
        with pytest.raises(ConfigurationError, match=r"cannot be written to .*alpha.*give a"):
            issue_operator_certificates(tmp_path, "alpha")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []
    issue_operator_certificates(tmp_path, "alpha")


def test_folder_that_is_a_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "certs").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"cannot be written to .*certs/alpha"):
        issue_operator_certificates(tmp_path / "certs", "alpha")
    assert contents(tmp_path) == {"certs": b"mine"}


# Arguments that must be refused before anything is written.


@pytest.mark.parametrize(
    "operator",
    [
        "",
        ".",
        "..",
        "../alpha",
        "/alpha",
        "a/b",
        "a\\b",
        "alpha\n",
        "al pha",
        "al\0pha",
        "-alpha",
        ".alpha",
        "älpha",
        "a" * 41,
    ],
)
def test_operator_name_that_is_no_plain_folder_name_is_refused(tmp_path: Path, operator: str) -> None:
    with pytest.raises(ConfigurationError, match="operator name .* letters, digits"):
        issue_operator_certificates(tmp_path / "certs", operator)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("operator", ["a", "Alpha-1", "0_b", "a" * 40])
def test_operator_name_of_allowed_characters_is_accepted(tmp_path: Path, operator: str) -> None:
    issue_operator_certificates(tmp_path, operator)
    assert os.listdir(tmp_path) == [operator]


@pytest.mark.parametrize(
    "host",
    [
        "",
        "localhost:50051",
        "[::1]",
        "*.example",
        "a..b",
        "-a.example",
        "host name",
        "10.0.0.300",
        "wörker.example",
        "host\n",
        "https://host",
        ".".join(["a" * 60] * 5),
        "a" * 64,
    ],
)
def test_host_that_no_certificate_could_match_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigurationError, match="operator alpha: host .* DNS name or IP address"):
        issue_operator_certificates(tmp_path / "certs", "alpha", ["localhost", host])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("hosts", [[], "localhost"])
def test_hosts_must_be_a_list_with_something_in_it(tmp_path: Path, hosts: list[str] | str) -> None:
    with pytest.raises(ConfigurationError, match="operator alpha: no list of hosts"):
        issue_operator_certificates(tmp_path / "certs", "alpha", hosts)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("days", [0, -1, 398])
def test_validity_out_of_range_is_refused(tmp_path: Path, days: int) -> None:
    with pytest.raises(ConfigurationError, match=f"operator alpha: .* {days} days: give 1 to 397"):
        issue_operator_certificates(tmp_path / "certs", "alpha", days=days)
    assert os.listdir(tmp_path) == []
