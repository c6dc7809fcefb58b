"""The command as its users run it: in processes that are killed, and with mistakes in its input."""

import json
import os
import random
import signal
import subprocess
import sys
import time
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
RECORDS = [{"prompt": "ab" * i, "completion": "c" * (1 + 3 * (i % 4))} for i in range(1, 17)]
PATIENCE = 240
STEPS = 16


def start(recipe: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "blindtune.client.cli", "train", str(recipe), "--json", *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )


def finish(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Waits for the end of a run that goes well; returns its events."""
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    return [json.loads(line) for line in output.splitlines()]


def kill_at(process: subprocess.Popen[str], step: int, seconds: float) -> None:
    """Kills a run some time after a step's event, or after its start for step 0."""
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if (event["event"] == "step" and event["step"] >= step) or (step == 0 and event["event"] == "data"):
            break
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PATIENCE)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_gives_the_adapter_of_one_that_is_not(
    checkpoints: dict[str, Path], operators: RunningOperators, tmp_path: Path
) -> None:
    model = with_tokenizer(checkpoints["llama"], tmp_path)
    train = write_lines(tmp_path / "train.jsonl", RECORDS)
    validation = write_lines(tmp_path / "validation.jsonl", RECORDS[:3])
    recipes: dict[str, Path] = {}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        recipes[name] = tmp_path / name / "recipe.yaml"
        recipe = recipe_of(
            tmp_path / name,
            model,
            train,
            masking={"mode": "shares"},
            operators=operator_sections(operators, "llama"),
            adapter={"lora_dropout": 0.2},
            data={"validation": str(validation)},
            training={
                "num_train_epochs": 4,
                "gradient_accumulation_steps": 2,
                "save_strategy": "steps",
                "save_steps": 1,
                "save_total_limit": 1,
                "eval_strategy": "steps",
                "eval_steps": 3,
            },
        )
        write_recipe(recipe, recipes[name])
    undisturbed = finish(start(recipes["whole"]))[-1]
    chance = random.Random(4)
    for number, step in enumerate((0, 1, 3, 6, 9, 12)):
        begun = (tmp_path / "killed" / "output" / "run.json").exists()
        process = start(recipes["killed"], *(["--resume"] if begun else []))
        kill_at(process, step, chance.uniform(0, 0.3))
        if number:
            assert (tmp_path / "killed" / "output" / "checkpoints").exists()
    events = finish(start(recipes["killed"], "--resume"))
    assert sum(event["event"] == "step" for event in events) < STEPS, "it went on, and did not start over"
    assert events[-1]["event"] == "done"
    same = ("steps", "tokens", "rounds", "bytes_up", "bytes_down", "before", "after")
    assert {x: events[-1][x] for x in same} == {x: undisturbed[x] for x in same}
    assert undisturbed["steps"] == STEPS
    one, other = (tmp_path / x / "output" / "adapter_model.safetensors" for x in ("whole", "killed"))
    assert one.read_bytes() == other.read_bytes()


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs the command in this process; returns its exit code and what it said on stderr."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["blindtune", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


@pytest.fixture
def recipe_file(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A recipe that works, on lines of their own."""
    model = with_tokenizer(checkpoints["bert"], tmp_path)
    records = [{"text": f"{MARKER} {i}", "label": ("x", "y", MARKER)[i % 3], "id": i} for i in range(400)]
    train = write_lines(tmp_path / "train.jsonl", records)
    recipe: Recipe = recipe_of(
        tmp_path,
        model,
        train,
        data={"task": "classification", "train_examples": 8},
        training={"max_steps": 1},
    )
    write_recipe(recipe, tmp_path / "recipe.yaml")
    return tmp_path / "recipe.yaml"


def _broken_line(folder: Path) -> None:
    lines = (folder / "train.jsonl").read_text().split("\n")
    lines[316] = lines[316][:-4]
    (folder / "train.jsonl").write_text("\n".join(lines))


def _unseen(folder: Path) -> None:
    write_lines(
        folder / "other.jsonl", [{"text": "a", "label": "x"}, {"text": MARKER, "label": f"{MARKER}2"}]
    )


def _someone_elses(folder: Path) -> None:
    (folder / "output").mkdir()
    (folder / "output" / "thesis.txt").write_text("mine")


MISTAKES: dict[str, tuple[Callable[[Path], None], list[str], ExitCode, str]] = {
    "wrong key": (lambda x: None, ["data.max_lenght=3"], ExitCode.CONFIGURATION, "did you mean max_length?"),
    "wrong type": (
        lambda x: None,
        ["data.max_length=many"],
        ExitCode.CONFIGURATION,
        "data.max_length: should be",
    ),
    "wrong choice": (lambda x: None, ["masking.mode=share"], ExitCode.CONFIGURATION, "'shares', 'lattice'"),
    "unknown model": (
        lambda x: None,
        ["model.name=nobody/nothing"],
        ExitCode.MODEL,
        "nobody/nothing is neither",
    ),
    "missing model": (
        lambda x: None,
        ["model.name=./nothing"],
        ExitCode.MODEL,
        "no checkpoint folder ./nothing",
    ),
    "missing data": (lambda x: None, ["data.train=nothing.jsonl"], ExitCode.DATA, "there is no data file"),
    "broken line": (_broken_line, [], ExitCode.DATA, "train.jsonl, line 317"),
    "unseen label": (
        _unseen,
        ["data.validation={}/other.jsonl"],
        ExitCode.DATA,
        "other.jsonl, line 2: the label",
    ),
    "empty data": (
        lambda x: (x / "train.jsonl").write_text("") and None,
        [],
        ExitCode.DATA,
        "train.jsonl holds no records",
    ),
    "folder in use": (_someone_elses, [], ExitCode.CONFIGURATION, "output is not empty (thesis.txt)"),
    "no operators": (
        lambda x: None,
        ["masking.mode=shares"],
        ExitCode.CONFIGURATION,
        "two or more operators",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_clear_error_that_shows_no_data(
    mistake: str, command: Callable[..., tuple[int, str]], recipe_file: Path
) -> None:
    make, settings, code, words = MISTAKES[mistake]
    make(recipe_file.parent)
    options = [x for setting in settings for x in ("--set", setting.format(recipe_file.parent))]
    ended, said = command("train", str(recipe_file), *options)
    assert ended == code, said
    (line,) = [x for x in said.splitlines() if x.startswith("blindtune: ")]
    assert words in line
    assert "Traceback" not in said
    assert MARKER not in said
    assert not (recipe_file.parent / "output" / "run.json").exists()


def test_what_the_command_says_and_writes_of_a_run_holds_no_text_and_no_label(
    command: Callable[..., tuple[int, str]], recipe_file: Path
) -> None:
    ended, said = command("train", str(recipe_file))
    assert ended == 0, said
    assert MARKER not in said
    output = recipe_file.parent / "output"
    holding = {x.name for x in output.rglob("*") if x.is_file() and MARKER.encode() in x.read_bytes()}
    # The classes' names are part of what was trained, and nobody else can read these files.
    assert holding <= {"run.json", "summary.json"}
    assert output.stat().st_mode & 0o077 == 0


def test_programs_get_an_event_for_every_step_and_the_error_as_well(
    recipe_file: Path,
) -> None:
    events = finish(start(recipe_file))
    assert [x["step"] for x in events if x["event"] == "step"] == [1]
    assert events[-1] == {"event": "done"} | json.loads(
        (recipe_file.parent / "output" / "summary.json").read_text()
    )
    process = start(recipe_file)
    output, _ = process.communicate(timeout=PATIENCE)
    last = json.loads(output.splitlines()[-1])
    assert process.returncode == ExitCode.CONFIGURATION
    assert (last["event"], last["code"]) == ("error", ExitCode.CONFIGURATION)


def test_a_dry_run_connects_to_nothing_and_writes_nothing(
    command: Callable[..., tuple[int, str]], recipe_file: Path
) -> None:
    before = set(recipe_file.parent.rglob("*"))
    sections = "[{name: a, workers: ['127.0.0.2:1']}, {name: b, workers: ['127.0.0.3:1']}]"
    ended, said = command(
        "train",
        str(recipe_file),
        "--dry-run",
        *("--set", "masking.mode=shares", "--set", "masking.insecure=true", "--set", f"operators={sections}"),
    )
    assert ended == 0, said
    assert "MB up" in said
    assert "fields not used: 'id'" in said
    assert said.endswith(f"Next: blindtune check {recipe_file}\n")
    assert set(recipe_file.parent.rglob("*")) == before


def test_a_checkpoint_cannot_bring_code_of_its_own_whatever_stdin_says(
    recipe_file: Path, checkpoints: dict[str, Path]
) -> None:
    model = recipe_file.parent / checkpoints["bert"].name
    proof = recipe_file.parent / "ran"
    (model / "evil.py").write_text(f"open({str(proof)!r}, 'w').close()\n")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((model / name).read_text())
        auto_map = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
        (model / name).write_text(json.dumps({**content, "model_type": "evil", "auto_map": auto_map}))
    command = [sys.executable, "-m", "blindtune.client.cli", "train", str(recipe_file), "--dry-run"]
    ended = subprocess.run(command, input="y\n" * 20, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == ExitCode.MODEL, ended.stderr
    assert not proof.exists()


def test_a_checkpoint_that_lacks_its_optimizer_is_not_gone_on_from(
    command: Callable[..., tuple[int, str]], recipe_file: Path
) -> None:
    options = [str(recipe_file), "--set", "training.save_strategy=steps", "--set", "training.save_steps=1"]
    assert command("train", *options)[0] == 0
    output = recipe_file.parent / "output"
    (output / "summary.json").unlink()
    (output / "checkpoints" / "checkpoint-1" / "optimizer.pt").unlink()
    ended, said = command("train", *options, "--resume")
    assert ended == ExitCode.MODEL
    assert "checkpoint-1 is damaged: optimizer.pt is missing" in said


def stopped_and_resumed(recipe: Path, process: subprocess.Popen[Any], steps: int) -> None:
    """Checks that a run whose output nobody reads ended with a checkpoint, and goes on from there."""
    assert process.wait(PATIENCE) == ExitCode.OUTPUT_CLOSED
    (checkpoint,) = (recipe.parent / "output" / "checkpoints").glob("checkpoint-*")
    assert 0 < int(checkpoint.name.removeprefix("checkpoint-")) < steps
    events = finish(start(recipe, "--set", f"training.max_steps={steps}", "--resume"))
    assert sum(event["event"] == "step" for event in events) < steps
    assert events[-1]["steps"] == steps


def test_a_run_whose_events_nobody_reads_stops_with_a_checkpoint_and_goes_on_from_it(
    recipe_file: Path,
) -> None:
    process = start(recipe_file, "--set", "training.max_steps=40")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()  # as head -1 does
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    stopped_and_resumed(recipe_file, process, 40)
    assert "which is saved: go on with --resume" in said
    assert "Traceback" not in said
    assert "Exception ignored" not in said


def test_a_run_whose_messages_nobody_reads_stops_with_a_checkpoint_and_goes_on_from_it(
    recipe_file: Path,
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "blindtune.client.cli", "train", str(recipe_file)]
    with os.fdopen(writing, "w") as messages:
        process = subprocess.Popen([*command, "--set", "training.max_steps=40"], stderr=messages)
    stopped_and_resumed(recipe_file, process, 40)


def test_a_run_whose_reader_leaves_during_its_last_step_is_complete(recipe_file: Path) -> None:
    process = start(recipe_file)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(PATIENCE) == ExitCode.OUTPUT_CLOSED, said
    assert "Traceback" not in said
    assert (recipe_file.parent / "output" / "summary.json").is_file()


def test_a_second_signal_ends_a_run_at_once_though_a_worker_does_not_answer(
    checkpoints: dict[str, Path], operators: RunningOperators, tmp_path: Path
) -> None:
    model = with_tokenizer(checkpoints["llama"], tmp_path)
    train = write_lines(tmp_path / "train.jsonl", RECORDS)
    recipe = recipe_of(
        tmp_path,
        model,
        train,
        masking={"mode": "shares", "request_timeout": 10.0 * PATIENCE, "retry_seconds": 10.0 * PATIENCE},
        operators=operator_sections(operators, "llama"),
    )
    write_recipe(recipe, tmp_path / "recipe.yaml")
    for worker in operators[0].workers:
        worker.lie("llama", "unavailable", at=150, times=10_000_000)
    process = start(tmp_path / "recipe.yaml")
    assert process.stdout is not None
    assert process.stderr is not None
    for line in process.stdout:
        if json.loads(line)["event"] == "step":
            break
    while not all(worker.lies_told("llama") for worker in operators[0].workers):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    for line in process.stdout:
        if "again to stop at once" in line:
            break
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == ExitCode.INTERRUPTED, errors
    assert "Traceback" not in errors
    assert json.loads(output.splitlines()[-1]) == {"event": "error", "code": 130, "message": "interrupted"}
