"""The training record of runs through real workers: lies, kills, and what an auditor runs on it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.operators import RunningOperators
from support.recipes import operator_sections, recipe_of, with_tokenizer, write_lines

from blindtune.client.cli import main
from blindtune.client.process.exit_codes import ExitCode
from blindtune.client.recipe import Recipe, write_recipe

pytestmark = pytest.mark.hf

MARKER = "zzmarkerzz"
RECORDS = [{"prompt": f"{MARKER}{i}", "completion": "c" * (1 + 3 * (i % 4))} for i in range(8)]
PATIENCE = 240


@pytest.fixture
def run(checkpoints: dict[str, Path], operators: RunningOperators, tmp_path: Path) -> Recipe:
    """Four steps over two operators of two workers each."""
    recipe = recipe_of(
        tmp_path,
        with_tokenizer(checkpoints["llama"], tmp_path),
        write_lines(tmp_path / f"{MARKER}.jsonl", RECORDS),
        masking={"mode": "shares"},
        operators=operator_sections(operators, "llama"),
        training={"save_strategy": "steps", "save_steps": 1, "max_steps": 4},
        record={"key": str(tmp_path / "keys" / "record.key")},
    )
    write_recipe(recipe, tmp_path / "recipe.yaml")
    return recipe


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process; returns its exit code, and what it said on stdout and stderr."""

    def called(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["blindtune", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return called


def entries(run: Recipe) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (run.output.dir / "record.jsonl").read_bytes().splitlines()]


def test_a_lie_is_in_the_record_and_the_auditor_gets_what_he_asks_for(
    run: Recipe,
    operators: RunningOperators,
    tmp_path: Path,
    command: Callable[..., tuple[int, str, str]],
) -> None:
    liar = operators[1].workers[0]
    liar.lie("llama", "one residue is off by one", at=3)
    ended, _, said = command("train", tmp_path / "recipe.yaml")
    assert ended == 0, said
    assert liar.lies_told("llama") == 1
    kinds = [x["kind"] for x in entries(run)]
    assert kinds.count("worker") == 1 and kinds.count("checkpoint") == 4 and kinds[-1] == "finish"
    (worker,) = [x["body"] for x in entries(run) if x["kind"] == "worker"]
    assert (worker["operator"], worker["worker"]) == ("beta", liar.addresses["llama"])
    assert worker["event"] == "gave a wrong answer" and worker["excluded"] and worker["product"]
    start, finish = entries(run)[0]["body"], entries(run)[-1]["body"]
    assert [x["name"] for x in start["operators"]] == ["alpha", "beta"]
    assert all(len(x["ca"]) == len(x["certificate"]) == 1 for x in start["operators"])
    assert finish["lies"] == 1 and finish["verified_responses"] > 0
    assert MARKER not in (run.output.dir / "record.jsonl").read_text()

    keys = tmp_path / "keys"
    record = (run.output.dir / "record.jsonl", "--public-key", keys / "record.pub")
    (salt,) = (keys / "salts").iterdir()
    everything = ("--output", run.output.dir, "--data", run.data.train, "--salt", salt)
    ended, shown, said = command("verify-record", *record, *everything, "--model", run.model.name)
    assert ended == 0, said
    for words in ("finished: 4 steps", "1 wrong", "as committed to", "has the recorded fingerprint"):
        assert words in shown, shown
    head = json.loads((run.output.dir / "summary.json").read_text())["record"]["head"]
    ended, shown, _ = command("verify-record", *record, "--head", head, "--require-finish", "--json")
    assert ended == 0 and json.loads(shown)["complete"] is True

    for present, fields in ((True, RECORDS[3]), (False, {"prompt": "never", "completion": "there"})):
        one, proof = write_lines(tmp_path / "one.jsonl", [fields]), tmp_path / "proof.json"
        asked = ("--data", run.data.train, "--salt", salt, "--about", one, "--output", proof)
        assert command("prove-record", *record, *asked)[0] == 0
        ended, shown, said = command("verify-record", *record, "--proof", proof, "--about", one)
        assert ended == 0, said
        assert ("not among" in shown) is not present and "among the train records" in shown
        write_lines(one, [RECORDS[0]])
        ended, _, said = command("verify-record", *record, "--proof", proof, "--about", one)
        assert ended == ExitCode.RECORD and "the proof does not show" in said

    path = run.output.dir / "record.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    ended, shown, _ = command("verify-record", *record)
    assert ended == 0 and "open: it ends with checkpoint" in shown
    ended, _, said = command("verify-record", *record, "--require-finish")
    assert ended == ExitCode.RECORD and "is open" in said
    for known in (("--head", head), ("--output", run.output.dir)):
        ended, _, said = command("verify-record", *record, *known)
        assert ended == ExitCode.RECORD and "entries lack at the end" in said
    path.write_bytes(b"".join([lines[0], *lines[2:]]))
    ended, _, said = command("verify-record", *record)
    assert ended == ExitCode.RECORD and "record.jsonl, line 2: this is entry 2" in said
    assert MARKER not in said


def test_a_run_that_workers_end_says_which_of_them_lied(
    run: Recipe,
    operators: RunningOperators,
    tmp_path: Path,
    command: Callable[..., tuple[int, str, str]],
) -> None:
    for worker in operators[1].workers:
        worker.lie("llama", "one residue is off by one", at=9)
    ended, _, _ = command("train", tmp_path / "recipe.yaml")
    last = entries(run)[-3:]
    assert [x["kind"] for x in last] == ["worker", "worker", "failed"]
    assert {x["body"]["worker"] for x in last[:2]} == {x.addresses["llama"] for x in operators[1].workers}
    assert last[-1]["body"]["exit_code"] == ended != 0


@pytest.mark.slow
def test_the_record_of_a_run_that_is_killed_again_and_again_is_whole(
    run: Recipe, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    arguments = [
        sys.executable,
        "-m",
        "blindtune.client.cli",
        "train",
        str(tmp_path / "recipe.yaml"),
        "--json",
    ]
    for step in (1, 2, 2):
        options = ["--resume"] if (run.output.dir / "run.json").exists() else []
        process = subprocess.Popen(
            [*arguments, *options], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
        )
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "step" and event["step"] >= step:
                break
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=PATIENCE)
    # And one that was killed while it wrote an entry.
    with open(run.output.dir / "record.jsonl", "ab") as file:
        file.write(b'{"body":{"files":{"adapter_config.json":"')
    ended, _, said = command("train", tmp_path / "recipe.yaml", "--resume")
    assert ended == 0, said
    resumed = [x for x in entries(run) if x["kind"] == "resume"]
    assert len(resumed) == 3 and resumed[-1]["body"]["torn"]["size"] == 41
    record = (run.output.dir / "record.jsonl", "--public-key", run.output.dir / "record.pub")
    ended, shown, said = command("verify-record", *record, "--output", run.output.dir, "--require-finish")
    assert ended == 0, said
    assert "finished: 4 steps" in shown and "was taken out here" in shown
