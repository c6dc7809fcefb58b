"""The command's mistakes: one clear line and a non-zero exit code, before anything is loaded."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from blindtune.server.cli import main


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "m", "--listen", "0.0.0.0:7100", "--insecure"), "needs a loopback address"),
        (("--model", "m", *LISTEN), "give --tls-cert"),
        (("--model", "m", *LISTEN, "--tls-cert", "c.pem"), "give all three"),
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


@pytest.mark.parametrize("command", ["serve", "fingerprint"])
def test_help_shows_the_environment_twin_of_every_option(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    # Help wraps its lines: compare without white space.
    text = re.sub(r"\s+", "", out)
    options = re.findall(r"^  --([a-z-]+)", out, re.MULTILINE)
    for option in set(options) - {"help"}:
        assert f"BLINDTUNE_WORKER_{option.upper().replace('-', '_')}" in text, option
    assert len(options) >= 4


def test_version_is_printed(run: Run) -> None:
    code, out, _ = run("--version")
    assert code == 0
    assert re.fullmatch(r"blindtune-worker \S+\n", out)
