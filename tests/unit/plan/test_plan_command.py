"""``blindtune plan``: what it prints, for people and for programs, and how it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blindtune.client.cli import console, main
from blindtune.client.plan.profiles import CPU_CLIENT
from blindtune.client.process.exit_codes import ExitCode

pytestmark = pytest.mark.hf

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kit_cache: Path, tmp_path: Path
) -> Run:
    """Runs the command without a calibration of this machine: exit status, stdout and stderr."""
    monkeypatch.setenv("BLINDTUNE_CACHE", str(tmp_path / "no-calibration"))
    # A command is a process of its own; here others may have asked for JSON before.
    monkeypatch.setattr(console, "_state", {"json": False, "json_log": False})

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["blindtune", "plan", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        code = ended.value.code
        return code if isinstance(code, int) else 0, output.out, output.err

    return command


FIELDS: dict[str, Any] = {
    "event": str,
    "model": str,
    "architecture": str,
    "tokens": int,
    "layers": int,
    "trained": int,
    "rounds": int,
    "bytes_up": int,
    "bytes_down": int,
    "seconds": float,
    "busy": dict,
    "local_seconds": float,
    "bound": str,
    "memory": dict,
    "worker_cost": float,
    "traffic_cost": float,
    "client_profile": str,
    "worker_profile": str,
    "tokens_per_second": float,
    "cost": float,
}


@pytest.mark.parametrize("options", [(), ("--masking", "lattice"), ("--one-machine",)], ids=str)
def test_a_program_gets_every_figure_in_one_line(
    options: tuple[str, ...], run: Run, checkpoints: dict[str, Path]
) -> None:
    code, out, _ = run(checkpoints["llama"], "--json", "--batch-size", 2, "--length", 8, *options)
    assert code == ExitCode.DONE
    (line,) = out.splitlines()
    plan = json.loads(line)
    assert {name: type(value) for name, value in plan.items()} == FIELDS
    assert plan["event"] == "plan" and plan["tokens"] == 16
    assert set(plan["busy"]) == {"client", "upload", "workers", "download", "latency"}
    assert plan["bound"] in plan["busy"]
    names = {"client", "adapter", "activations", "buffers", "mapped", "worker", "hints"}
    assert set(plan["memory"]) == names
    assert all(isinstance(x, int) and x >= 0 for x in plan["memory"].values())


def test_options_reach_the_plan(run: Run, checkpoints: dict[str, Path]) -> None:
    base = ("--json", "--batch-size", 2, "--length", 8, checkpoints["llama"])

    def plan(*options: object) -> Any:
        return json.loads(run(*base, *options)[1])

    one = plan("--bandwidth", 8, "--latency", 100)
    # 8 Mbit/s are a megabyte a second.
    assert one["busy"]["download"] == pytest.approx(one["bytes_down"] / 1e6)
    assert one["busy"]["upload"] == pytest.approx(one["bytes_up"] / 1e6)
    assert one["busy"]["latency"] == pytest.approx((0.1 + CPU_CLIENT.turn) * one["rounds"])
    assert plan("--upload", 4)["busy"]["upload"] == pytest.approx(one["bytes_up"] / 5e5)
    assert plan("--worker-device", "h100")["worker_profile"] == "NVIDIA H100 (shipped)"
    assert plan("--in-flight", 3)["rounds"] == 3 * one["rounds"]
    assert plan("--in-flight", 3, "--micro-batches", 6)["tokens"] == 96
    assert plan("--rank", 16)["trained"] == 2 * one["trained"]
    assert 0 < plan("--target-modules", "q_proj, v_proj")["trained"] < one["trained"]
    assert plan("--worker-hour", 3600, "--gigabyte", 0)["cost"] == pytest.approx(2 * plan()["seconds"])
    assert plan("--dtype", "bfloat16")["memory"]["activations"] < one["memory"]["activations"]


def test_people_are_told_what_a_step_costs_and_what_bounds_it(run: Run, checkpoints: dict[str, Path]) -> None:
    code, out, _ = run(checkpoints["llama"], "--bandwidth", 0.1, "--worker-hour", 2, "--masking", "lattice")
    assert code == ExitCode.DONE
    lines = dict(line.split(maxsplit=1) for line in out.replace("bound by", "bound").splitlines())
    assert lines["bound"] == "download"
    assert "rounds" in lines["traffic"] and "a million tokens" in lines["cost"]
    assert lines["hints"].endswith("on the client's disk")
    assert "shipped" in lines["constants"]


def test_nothing_is_sent_or_written_by_a_plan(run: Run, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert run(checkpoints["bert"])[0] == ExitCode.DONE
    assert sorted(tmp_path.rglob("*")) == before


REFUSED: dict[str, tuple[tuple[object, ...], int, str]] = {
    "nothing_to_do": ((), ExitCode.USAGE, "name a model, or measure this machine"),
    "no_such_model": (("./nowhere",), ExitCode.MODEL, "there is no folder ./nowhere"),
    "no_such_masking": (("./nowhere", "--masking", "none"), ExitCode.USAGE, "none"),
    "no_such_head": (("./nowhere", "--head", "both"), ExitCode.CONFIGURATION, "head is one of auto"),
    "no_rows": (("./nowhere", "--length", 0), ExitCode.CONFIGURATION, "length must be 1 or more"),
    "no_bandwidth": (("./nowhere", "--bandwidth", 0), ExitCode.CONFIGURATION, "bandwidth must be positive"),
    "no_such_profile": (
        ("./nowhere", "--profile", "/no/file"),
        ExitCode.CONFIGURATION,
        "/no/file can't be read",
    ),
    "no_such_device": (("./nowhere", "--worker-device", "abacus"), ExitCode.CONFIGURATION, "cpu, h100"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_planned_is_one_message_and_a_status(case: str, run: Run) -> None:
    arguments, code, message = REFUSED[case]
    status, out, err = run(*arguments)
    assert status == code
    assert message in " ".join(err.split())
    assert not out and "Traceback" not in err
