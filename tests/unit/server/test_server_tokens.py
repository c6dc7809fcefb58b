"""Tokens: what their file holds, how they are made, and who is let in with one over a real connection."""

import hashlib
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.tiny_layer import tiny_header, tiny_store

from blindtune.client.config.blind_config import BlindConfig, Operator
from blindtune.client.operators.policy import Failure
from blindtune.client.operators.transport import GrpcTransport, TransportError
from blindtune.client.preflight.finding import Finding
from blindtune.client.preflight.operators import check_operators
from blindtune.client.tls.certs import OperatorCertificates, issue_operator_certificates
from blindtune.errors import ConfigurationError
from blindtune.proto import worker_pb2, worker_pb2_grpc
from blindtune.server.admission.refusals import Unauthenticated
from blindtune.server.admission.tokens import Tokens, add_token
from blindtune.server.daemon import RunningWorker, serve
from blindtune.server.transport import Endpoint, TlsFiles

PATIENCE = 60


def bearer(token: str) -> list[tuple[str, str | bytes]]:
    return [("user-agent", "x"), ("authorization", f"Bearer {token}")]


def test_a_token_is_made_once_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    first, second = add_token(file, "alice"), add_token(file, "bob.2")
    assert len(first) >= 43
    assert first != second
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text().splitlines() == [
        f"{name} sha256:{hashlib.sha256(token.encode()).hexdigest()}"
        for name, token in (("alice", first), ("bob.2", second))
    ]
    assert os.listdir(tmp_path) == ["tokens"]
    tokens = Tokens(file)
    assert [tokens.name_of(bearer(x)) for x in (first, second)] == ["alice", "bob.2"]


def test_tokens_made_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    threads = [threading.Thread(target=add_token, args=(file, f"n{i}")) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Tokens(file)) == 16


def test_a_line_without_an_end_and_comments_survive_a_new_token(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# of the lab\n\nold sha256:{'ab' * 32}")
    token = add_token(file, "new")
    assert file.read_text().startswith(f"# of the lab\n\nold sha256:{'ab' * 32}\nnew sha256:")
    assert Tokens(file).name_of(bearer(token)) == "new"


def test_a_name_may_have_two_tokens(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    pair = [add_token(file, "alice") for _ in range(2)]
    assert {Tokens(file).name_of(bearer(x)) for x in pair} == {"alice"}


@pytest.mark.parametrize("name", ["", "a b", "-a", "a" * 65, "a\n", "ä"])
def test_a_name_that_would_break_the_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="is no name for a token"):
        add_token(tmp_path / "tokens", name)
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize(
    "line",
    [
        "alice hunter2secret",
        "hunter2secret",
        f"alice sha256:{'ab' * 31}hunter2secret",
        f"alice sha256:{'ab' * 32} hunter2secret",
        f"hunter2secret! sha256:{'ab' * 32}",
        f"sha256:{'ab' * 32}",
        f"hunter2secret sha256:{'AB' * 32}",
    ],
)
def test_a_wrong_line_is_named_by_its_number_and_not_shown(tmp_path: Path, line: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"good sha256:{'ab' * 32}\n\n{line}\n")
    for reading in (lambda: Tokens(file), lambda: add_token(file, "new")):
        with pytest.raises(ConfigurationError, match="line 3") as caught:
            reading()
        assert "hunter2secret" not in str(caught.value)
        assert "hunter2secret" not in str(caught.value.__cause__)


def test_a_file_that_is_not_there_or_no_text_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot read the tokens"):
        Tokens(tmp_path / "absent")
    with pytest.raises(ConfigurationError, match="cannot read the tokens"):
        Tokens(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="no plain text"):
        Tokens(tmp_path / "binary")
    with pytest.raises(ConfigurationError, match="cannot write"):
        add_token(tmp_path / "no" / "folder", "x")


def test_only_one_whole_token_with_its_scheme_is_let_in(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    token = add_token(file, "alice")
    tokens = Tokens(file)
    for metadata in (
        None,
        [],
        [("authorization", token)],
        [("authorization", f"Basic {token}")],
        [("authorization", "Bearer ")],
        [("authorization", f"Bearer {token[:-1]}")],
        [("authorization", f"Bearer {token}x")],
        [("authorization", f"Bearer {token}".encode())],
        bearer(token) * 2,
    ):
        with pytest.raises(Unauthenticated) as caught:
            tokens.name_of(metadata)
        assert token not in str(caught.value)
    assert tokens.name_of([("authorization", f"bearer {token}")]) == "alice"


def test_no_file_of_tokens_makes_an_empty_one_valid(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"nobody sha256:{hashlib.sha256(b'').hexdigest()}\n")
    for value in ("Bearer ", "Bearer", "bearer  "):
        with pytest.raises(Unauthenticated):
            Tokens(file).name_of([("authorization", value)])


def test_a_changed_file_counts_at_once_and_a_broken_one_not_at_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "blindtune")
    file = tmp_path / "tokens"
    alice, bob = add_token(file, "alice"), add_token(file, "bob")
    tokens = Tokens(file)
    good = file.read_text()
    file.write_text("".join(line for line in good.splitlines(True) if line.startswith("bob")))
    with pytest.raises(Unauthenticated):
        tokens.name_of(bearer(alice))
    assert tokens.name_of(bearer(bob)) == "bob"

    file.write_text("alice topsecret\n")
    for _ in range(5):
        assert tokens.name_of(bearer(bob)) == "bob"
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert "line 1" in vars(errors[0])["error"]
    file.unlink()
    assert tokens.name_of(bearer(bob)) == "bob"

    file.write_text("")  # the last one is revoked
    with pytest.raises(Unauthenticated):
        tokens.name_of(bearer(bob))
    logged = "".join(str(vars(record)) for record in caplog.records)
    assert not any(secret in logged for secret in (alice, bob, "topsecret"))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> OperatorCertificates:
    return issue_operator_certificates(tmp_path_factory.mktemp("certificates"), "alpha")


class Setting:
    """A worker with tokens, and a client."""

    def __init__(self, worker: RunningWorker, folder: Path, certificates: OperatorCertificates) -> None:
        self.worker = worker
        self.file = folder / "tokens"
        self.certificates = certificates
        self.secret = folder / "token"

    def operator(self) -> Operator:
        return Operator("alpha", [self.worker.address], ca=self.certificates.ca, token=self.secret)

    def give(self, token: str) -> None:
        self.secret.write_text(token + "\n")
        self.secret.chmod(0o600)

    def channel(self) -> grpc.Channel:
        """TLS, and no token."""
        return grpc.secure_channel(
            self.worker.address, grpc.ssl_channel_credentials(self.certificates.ca.read_bytes())
        )


@pytest.fixture
def setting(tmp_path: Path, certificates: OperatorCertificates) -> Iterator[Setting]:
    store = tiny_store()
    token = add_token(tmp_path / "tokens", "alice")
    tls = TlsFiles(certificates.worker, certificates.worker_key, None)
    worker = serve(store, Endpoint.parse("127.0.0.1:0", tls, tokens=tmp_path / "tokens"))
    setting = Setting(worker, tmp_path, certificates)
    setting.give(token)
    yield setting
    worker.stop(drain_seconds=0)


def product(setting: Setting) -> list[worker_pb2.MultiplyRequest]:
    with setting.channel() as channel:
        metadata = bearer(setting.secret.read_text().strip())[1:]
        manifest = worker_pb2_grpc.WorkerStub(channel).GetManifest(
            worker_pb2.GetManifestRequest(), timeout=PATIENCE, metadata=metadata
        )
    header = tiny_header(manifest.fingerprint)
    return [worker_pb2.MultiplyRequest(header=header)]


def test_with_a_token_a_client_needs_no_certificate_and_is_logged_by_name(
    setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "blindtune")
    token = setting.secret.read_text().strip()
    with setting.channel() as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        answer = stub.Multiply(iter(product(setting)), timeout=PATIENCE, metadata=bearer(token)[1:])
        assert sum(len(x.residues) for x in answer) == 16
    setting.worker.stop()
    [line] = [vars(record) for record in caplog.records if record.message == "multiply"]
    assert (line["client"], line["status"]) == ("alice", "OK")
    assert token not in "".join(str(vars(record)) for record in caplog.records)


def test_without_a_valid_token_nothing_but_health_is_told(setting: Setting) -> None:
    message = product(setting)
    with setting.channel() as channel:
        worker = worker_pb2_grpc.WorkerStub(channel)
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        for metadata in ([], bearer("wrong")[1:]):
            for call in (
                lambda m: worker.GetManifest(worker_pb2.GetManifestRequest(), timeout=PATIENCE, metadata=m),
                lambda m: list(worker.Multiply(iter(message), timeout=PATIENCE, metadata=m)),
                lambda m: list(
                    reflection.ServerReflectionInfo(iter([listing]), timeout=PATIENCE, metadata=m)
                ),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    call(metadata)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        health = health_pb2_grpc.HealthStub(channel)
        found = health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
        assert found.status == health_pb2.HealthCheckResponse.SERVING


def test_calls_without_a_token_that_send_nothing_hold_no_thread(setting: Setting) -> None:
    ended = threading.Event()

    def nothing() -> Iterator[bytes]:
        ended.wait(PATIENCE)
        yield from ()

    with setting.channel() as channel:
        for method in ("Multiply", "GetManifest"):
            call = channel.stream_stream(f"/blindtune.v1.Worker/{method}")(nothing(), timeout=PATIENCE)
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    ended.set()


def test_the_client_shows_its_token_over_tls_alone(setting: Setting) -> None:
    transport = GrpcTransport(setting.operator(), setting.worker.address, insecure=False)
    assert transport.manifest(PATIENCE).model == "tiny"
    transport.close()


def test_a_client_with_a_wrong_token_is_told_at_once(setting: Setting) -> None:
    setting.give("someone-elses")
    transport = GrpcTransport(setting.operator(), setting.worker.address, insecure=False)
    with pytest.raises(TransportError) as caught:
        transport.manifest(PATIENCE)
    assert caught.value.failure is Failure.INCOMPATIBLE
    assert "does not know the token" in str(caught.value)
    assert "someone-elses" not in str(caught.value)
    transport.close()


def test_a_token_is_exchanged_during_a_run_whatever_side_is_first(setting: Setting) -> None:
    transport = GrpcTransport(setting.operator(), setting.worker.address, insecure=False)
    transport.manifest(PATIENCE)
    setting.file.unlink()
    fresh = add_token(setting.file, "alice")  # the old one is revoked before the client has the new one
    with pytest.raises(TransportError) as caught:
        transport.manifest(PATIENCE)
    assert caught.value.failure is Failure.UNREACHABLE
    setting.give(fresh)
    with pytest.raises(TransportError) as caught:
        transport.manifest(PATIENCE)
    assert caught.value.failure is Failure.UNREACHABLE
    assert transport.manifest(PATIENCE).model == "tiny"
    transport.close()


def findings(operator: Operator) -> dict[str, Finding]:
    config = BlindConfig([operator], masking="lattice")
    return {finding.check.split()[-1]: finding for finding in check_operators(config, None)}


def test_check_understands_tokens(setting: Setting) -> None:
    found = findings(setting.operator())
    assert {finding.status for finding in found.values()} == {"ok"}
    assert {"CA", "token", "TLS", "manifest"} <= found.keys()
    assert "key" not in found
    setting.secret.chmod(0o644)
    assert findings(setting.operator())["token"].status == "warning"


def test_check_says_what_to_do_about_a_token_that_is_not_valid(setting: Setting) -> None:
    setting.give("someone-elses")
    found = findings(setting.operator())["manifest"]
    assert found.status == "problem"
    assert "for a token that its workers let in" in found.fix


def test_the_command_prints_the_token_once_and_keeps_it_nowhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "blindtune.server", "token", "alice", "--tokens", str(tmp_path / "t")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert ended.stderr == ""
    token = ended.stdout.removesuffix("\n")
    assert Tokens(tmp_path / "t").name_of(bearer(token)) == "alice"
    assert token not in (tmp_path / "t").read_text()
