"""A run with tokens in place of client certificates, through daemons that are processes of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.training import training_step, with_adapter
from transformers import PreTrainedModel

from blindtune.client import Operator
from blindtune.client.tls.certs import issue_operator_certificates
from blindtune.errors import IncompatibleWorkerError, OperatorUnavailableError

pytestmark = pytest.mark.hf

Load = Callable[..., PreTrainedModel]
COMMAND = [sys.executable, "-m", "blindtune.server"]
PATIENCE = 120


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=PATIENCE)


class Daemon:
    """A worker with tokens, and a client's token for it."""

    def __init__(self, folder: Path, name: str, host: str, model: Path) -> None:
        self.name = name
        self.folder = folder / name
        self.certificates = issue_operator_certificates(folder, name, [host])
        self.tokens, self.secret, self.log = (self.folder / x for x in ("tokens", "token", "log"))
        self.host = host
        self.model = model
        self.give("alice")
        with self.log.open("w") as stderr:
            self.process = subprocess.Popen(
                [*COMMAND, *self.arguments(f"{host}:0")],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | {"BLINDTUNE_WORKER_TOKENS": str(self.tokens)},
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        self.address = json.loads(line)["address"]

    def arguments(self, listen: str) -> list[str]:
        files = ("--tls-cert", str(self.certificates.worker), "--tls-key", str(self.certificates.worker_key))
        return ["serve", "--model", str(self.model), "--listen", listen, "--threads", "1", *files]

    def give(self, client: str) -> None:
        """Makes a token with the command, and gives it to the client."""
        made = command("token", client, "--tokens", str(self.tokens))
        assert made.returncode == 0, made.stderr
        self.secret.write_text(made.stdout)
        self.secret.chmod(0o600)

    def operator(self) -> Operator:
        return Operator(self.name, [self.address], ca=self.certificates.ca, token=self.secret)

    def stop(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=PATIENCE)


@pytest.fixture(scope="module")
def daemons(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Daemon]]:
    folder = tmp_path_factory.mktemp("daemons")
    started: list[Daemon] = []
    try:
        for name, host in (("alpha", "127.0.0.1"), ("beta", "127.0.0.2")):
            started.append(Daemon(folder, name, host, checkpoints["llama"]))
        yield started
    finally:
        for daemon in started:
            daemon.stop()


def test_a_run_with_tokens_equals_the_reference_until_one_is_revoked(
    daemons: list[Daemon], load: Load
) -> None:
    alpha, beta = daemons
    for daemon in daemons:
        daemon.give("alice")
    operators = [daemon.operator() for daemon in daemons]
    expected = training_step(with_adapter(load("llama", masking="reference"), "llama"), "llama")
    model = with_adapter(load("llama", operators=operators, retry_seconds=30.0), "llama")
    assert training_step(model, "llama") == expected

    # Exchanged: the new one is made and given before the old one is taken away.
    before = alpha.tokens.read_text()
    alpha.give("alice")
    alpha.tokens.write_text(alpha.tokens.read_text().removeprefix(before))
    assert training_step(model, "llama") == expected

    impatient = with_adapter(load("llama", operators=operators, retry_seconds=1.0), "llama")
    beta.tokens.write_text("")
    with pytest.raises(
        OperatorUnavailableError, match="UNAUTHENTICATED: this worker does not know the token"
    ):
        training_step(impatient, "llama")
    with pytest.raises(IncompatibleWorkerError, match="does not know the token"):
        training_step(with_adapter(load("llama", operators=operators), "llama"), "llama")

    for daemon in daemons:
        log = daemon.log.read_text()
        assert daemon.secret.read_text().strip() not in log
        multiplied = [line for line in map(json.loads, log.splitlines()) if line["event"] == "multiply"]
        assert {line["client"] for line in multiplied} == {"alice"}


def test_health_is_told_without_a_token_and_a_port_is_taken_once(daemons: list[Daemon]) -> None:
    [alpha, _] = daemons
    ask = ("health", "--address", alpha.address, "--tls-ca", str(alpha.certificates.ca))
    assert command(*ask).returncode == 0
    second = command(*alpha.arguments(alpha.address), "--tokens", str(alpha.tokens))
    assert second.returncode == 1
    assert second.stdout == ""
    assert second.stderr.startswith(f"blindtune-worker: cannot listen at {alpha.address}: Address already in")
    assert "reading layers" not in second.stderr
