"""The command's mistakes: one clear line and a non-zero exit code, before anything is loaded."""

import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from support.tiny_layer import tiny_header, tiny_store

from blindtune.client.tls.certs import issue_operator_certificates
from blindtune.proto import worker_pb2, worker_pb2_grpc
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Residues
from blindtune.server.admission.limits import Limit, Limits
from blindtune.server.admission.tokens import add_token
from blindtune.server.cli import main
from blindtune.server.daemon import serve
from blindtune.server.store import LayerStore
from blindtune.server.transport import Endpoint, TlsFiles


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """The command takes over the process's log; give it back afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("blindtune")
    handlers, level, our_level = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    ours.setLevel(our_level)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "Run":
    return Run(monkeypatch, capsys)


class Run:
    """Runs the command in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self._monkeypatch.setattr("sys.argv", ["blindtune-worker", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        output = self._capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, output.out, output.err


LISTEN = ("--listen", "127.0.0.1:0")
TLS = ("--tls-cert", "c.pem", "--tls-key", "k.pem")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "m", "--listen", "0.0.0.0:7100", "--insecure"), "needs a loopback address"),
        (("--model", "m", *LISTEN), "give --tls-cert"),
        (("--model", "m", *LISTEN, "--tls-cert", "c.pem"), "give all three"),
        (("--model", "m", *LISTEN, "--tokens", "t"), "give --tls-cert and --tls-key"),
        (("--model", "m", *LISTEN, "--tokens", "t", "--insecure"), "--tokens needs TLS"),
        (("--model", "m", *LISTEN, *TLS, "--tls-client-ca", "a", "--tokens", "t"), "and not both"),
        (("--model", "m", *LISTEN, *TLS, "--tokens", "t"), "cannot read k.pem"),
        (("--model", "m", *LISTEN, "--insecure", "--max-concurrent-per-client", "0"), "per_client is 0"),
        (("--model", "m", *LISTEN, "--insecure", "--max-requests-per-second", "0"), "per_second is 0"),
        (("--model", "m", *LISTEN, "--insecure", "--patience-seconds", "nan"), "patience_seconds is nan"),
        (("--model", "m", *LISTEN, "--insecure", "--max-rows", "0"), "max_rows is 0"),
        (("--model", "m", *LISTEN, "--insecure", "--device", "abacus"), "abacus is no device"),
        (("--model", "/no/such/model", *LISTEN, "--insecure"), "no checkpoint folder /no/such/model"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(run: Run, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run("serve", *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("blindtune-worker: ")
    assert message in err
    assert err.count("\n") == 1


def test_an_empty_folder_is_no_model(run: Run, tmp_path: Path) -> None:
    code, _, err = run("fingerprint", str(tmp_path))
    assert code == 1
    assert err.count("\n") == 1
    assert "config.json" in err


def test_the_environment_stands_in_for_options(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLINDTUNE_WORKER_MODEL", "/no/such/model")
    monkeypatch.setenv("BLINDTUNE_WORKER_LISTEN", "127.0.0.1:0")
    monkeypatch.setenv("BLINDTUNE_WORKER_INSECURE", "1")
    code, _, err = run("serve")
    assert code == 1
    assert "/no/such/model" in err


def test_a_port_that_is_taken_is_noticed_before_a_model_is_loaded(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, out, err = run("serve", "--model", "/no/such/model", "--listen", address, "--insecure")
    assert (code, out) == (1, "")
    assert err == (
        f"blindtune-worker: cannot listen at {address}: Address already in use. Stop what listens there, "
        "or choose another --listen\n"
    )


def test_a_host_that_is_not_this_machine_is_noticed_before_a_model_is_loaded(
    run: Run, tmp_path: Path
) -> None:
    files = issue_operator_certificates(tmp_path, "alpha")
    tls = (
        "--tls-cert",
        str(files.worker),
        "--tls-key",
        str(files.worker_key),
        "--tls-client-ca",
        str(files.ca),
    )
    for host, message in (
        ("192.0.2.1", "Cannot assign requested address"),
        ("no.invalid", "does not resolve"),
    ):
        code, _, err = run("serve", "--model", "/no/such/model", "--listen", f"{host}:7100", *tls)
        assert code == 1
        assert message in err


def test_a_token_cannot_be_added_to_a_broken_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("topsecret\n")
    code, out, err = run("token", "alice", "--tokens", str(tmp_path / "tokens"))
    assert (code, out) == (1, "")
    assert "line 1: expected NAME sha256:" in err
    assert "topsecret" not in err


@pytest.fixture(scope="module")
def store() -> LayerStore:
    return tiny_store()


def test_health_of_a_worker_in_plaintext(run: Run, store: LayerStore) -> None:
    worker = serve(store, Endpoint.parse("127.0.0.1:0", insecure=True))
    assert run("health", "--address", worker.address, "--insecure") == (0, "SERVING\n", "")
    worker.stop(drain_seconds=0)
    code, out, err = run("health", "--address", worker.address, "--insecure")
    assert (code, out) == (1, "")
    assert "does not answer (UNAVAILABLE" in err
    assert err.count("\n") == 1


def test_health_is_asked_of_the_worker_itself_and_of_no_proxy(
    run: Run, store: LayerStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("grpc_proxy", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_grpc_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    worker = serve(store, Endpoint.parse("127.0.0.1:0", insecure=True))
    assert run("health", "--address", worker.address, "--insecure") == (0, "SERVING\n", "")
    worker.stop(drain_seconds=0)


def test_health_of_a_worker_that_drains(run: Run, store: LayerStore) -> None:
    class Held:
        """A multiplier that waits until it is let go."""

        def __init__(self) -> None:
            self.entered, self.let_go = threading.Event(), threading.Event()

        def outputs(self, product: Product) -> int:
            return store.multiplier().outputs(product)

        def multiply(self, product: Product, operand: Residues, parameters: ParameterSet) -> Residues:
            self.entered.set()
            self.let_go.wait(60)
            return store.multiplier().multiply(product, operand, parameters)

    held = Held()
    worker = serve(store, Endpoint.parse("127.0.0.1:0", insecure=True), multiplier=held)
    header = tiny_header(store.fingerprint)
    with grpc.insecure_channel(worker.address) as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Multiply(
            iter([worker_pb2.MultiplyRequest(header=header)]), timeout=60
        )
        assert held.entered.wait(60)
        stopping = threading.Thread(target=worker.stop)
        stopping.start()
        give_up = time.monotonic() + 60
        while (found := run("health", "--address", worker.address, "--insecure"))[0] == 0:
            assert time.monotonic() < give_up
        assert "is NOT_SERVING" in found[2]
        held.let_go.set()
        assert len(list(call)) == 1
    stopping.join()


def test_health_over_tls_needs_what_the_worker_asks_for(run: Run, store: LayerStore, tmp_path: Path) -> None:
    files = issue_operator_certificates(tmp_path, "alpha", ["alpha.example"])
    other = issue_operator_certificates(tmp_path, "beta", ["alpha.example"])
    client = ("--tls-cert", str(files.client), "--tls-key", str(files.client_key))
    add_token(tmp_path / "tokens", "alice")
    certificates = Endpoint.parse("127.0.0.1:0", TlsFiles(files.worker, files.worker_key, files.ca))
    tokens = Endpoint.parse(
        "127.0.0.1:0", TlsFiles(files.worker, files.worker_key, None), tokens=tmp_path / "tokens"
    )
    for endpoint, credentials in ((certificates, client), (tokens, ())):
        worker = serve(store, endpoint)
        ask = ("health", "--address", worker.address, "--tls-name", "alpha.example", "--tls-ca")
        try:
            assert run(*ask, str(files.ca), *credentials)[0] == 0
            assert run(*ask, str(other.ca), *credentials)[0] == 1
            assert run("health", "--address", worker.address, "--tls-ca", str(files.ca), *credentials)[0] == 1
            if credentials:
                assert run(*ask, str(files.ca))[0] == 1
        finally:
            worker.stop(drain_seconds=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either --tls-ca or --insecure"),
        (("--insecure", "--tls-ca", "{ca}"), "either --tls-ca or --insecure"),
        (("--tls-cert", "{ca}"), "need --tls-ca"),
        (("--tls-ca", "{ca}", "--tls-key", "{ca}"), "belong together"),
        (("--tls-ca", "/no/such/ca.pem"), "cannot read /no/such/ca.pem"),
        (("--tls-ca", "{empty}"), "holds nothing in PEM"),
    ],
)
def test_mistakes_of_health_are_one_line(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    names = {"ca": issue_operator_certificates(tmp_path, "alpha").ca, "empty": tmp_path / "empty"}
    names["empty"].touch()
    code, out, err = run("health", "--address", "127.0.0.1:1", *(x.format(**names) for x in arguments))
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1


def test_health_of_no_address_or_a_foreign_one_in_plaintext_is_refused(run: Run) -> None:
    assert "give HOST:PORT" in run("health", "--address", "somewhere", "--insecure")[2]
    assert "loopback" in run("health", "--address", "192.0.2.1:7100", "--insecure")[2]


@pytest.mark.parametrize("command", ["serve", "fingerprint", "token", "health"])
def test_help_shows_the_environment_twin_of_every_option(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    # Help wraps its lines: compare without white space.
    text = re.sub(r"\s+", "", out)
    options = re.findall(r"^  --([a-z-]+)", out, re.MULTILINE)
    for option in set(options) - {"help"}:
        twin = option.upper().replace("-", "_")
        # A container's settings for serving must not be taken for those of its health check.
        own = {"token": "TOKENS", "health": rf"(HEALTH_{twin}|INSECURE)"}.get(command, twin)
        assert re.search(f"BLINDTUNE_WORKER_{own}", text), option
    assert len(options) >= 2


@pytest.mark.parametrize("limit", [*Limits.known()], ids=lambda limit: limit.name)
def test_every_limit_is_an_option_and_a_variable(
    run: Run, monkeypatch: pytest.MonkeyPatch, limit: Limit
) -> None:
    arguments = ("serve", "--model", "m", *LISTEN, "--insecure")
    option = f"--{limit.name.replace('_', '-')}"
    assert f"{limit.name} is -1" in run(*arguments, option, "-1")[2]
    monkeypatch.setenv(f"BLINDTUNE_WORKER_{limit.name.upper()}", "-2")
    assert f"{limit.name} is -2" in run(*arguments)[2]
    assert f"{limit.name} is -1" in run(*arguments, option, "-1")[2], "the command line counts"


def test_every_option_of_serve_is_documented_with_its_default(run: Run) -> None:
    text = (Path(__file__).parents[3] / "docs" / "worker.md").read_text()
    table = text.partition("## Options of `serve`")[2].partition("##")[0]
    documented = dict(re.findall(r"^\| `(--[a-z-]+)`[^|]*\| ([^|]*)\|", table, re.MULTILINE))
    _, out, _ = run("serve", "--help")
    for option in set(re.findall(r"^  (--[a-z-]+)", out, re.MULTILINE)) - {"--help", "--tls-key"}:
        assert option in documented, option
    for limit in Limits.known():
        assert float(documented[f"--{limit.name.replace('_', '-')}"]) == limit.default, limit.name


def test_version_is_printed(run: Run) -> None:
    code, out, _ = run("--version")
    assert code == 0
    assert re.fullmatch(r"blindtune-worker \S+\n", out)
