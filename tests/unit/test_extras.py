"""Where a part of the installation is missing, every command says in one line what to install."""

import subprocess
import sys

import pytest
from support import incomplete

from blindtune.common import extras

CLIENT = "accelerate datasets peft prometheus-client ruamel.yaml scikit-learn scipy structlog".split()
MODULES = "accelerate,datasets,peft,prometheus_client,ruamel.yaml,sklearn,scipy,structlog"


def run(modules: str, *command: str) -> tuple[int, list[str]]:
    program = [sys.executable, incomplete.__file__, modules, *command]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=120)
    return ended.returncode, [x for x in ended.stderr.splitlines() if x.startswith(command[0])]


def test_nothing_is_missing_here() -> None:
    for extra in ("client", "worker", "demo", "audit"):
        assert extras.missing(extra) == []
        assert extras.advice([extra]) is None


def test_what_an_extra_of_extras_needs_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "_there", lambda package: package not in ("peft", "matplotlib", "torch"))
    assert extras.missing("client") == ["peft"], "what every installation has is no part of an extra"
    assert extras.missing("audit") == ["peft", "matplotlib"]
    line = extras.advice(["client", "audit"])
    assert line == "this needs peft, which this installation lacks: pip install 'blindtune[client]'"


@pytest.mark.parametrize(
    ("modules", "command", "code", "packages", "extra"),
    [
        (MODULES, ("blindtune", "schema"), 3, ", ".join(CLIENT), "client"),
        ("prometheus_client", ("blindtune-worker", "--help"), 1, "prometheus-client", "worker"),
    ],
    ids=["client", "worker"],
)
def test_a_command_says_what_to_install(
    modules: str, command: tuple[str, ...], code: int, packages: str, extra: str
) -> None:
    ended, said = run(modules, *command)
    assert ended == code
    line = f"this needs {packages}, which this installation lacks: pip install 'blindtune[{extra}]'"
    assert said == [f"{command[0]}: {line}"]
