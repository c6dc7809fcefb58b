"""An output folder out of other hands: a prompt goes to operators that the user trusts, or nowhere."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.operators import RunningOperators
from support.recipes import Silent, operator_sections, recipe_of, with_tokenizer, write_lines

from blindtune.client.cli import main
from blindtune.client.process.exit_codes import ExitCode
from blindtune.client.recipe import Recipe, load_recipe, write_recipe
from blindtune.client.runs.run import train_recipe

pytestmark = pytest.mark.hf

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process; returns its exit code, and what it said on stdout and stderr."""

    def called(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["blindtune", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return called


@pytest.fixture
def run(
    checkpoints: dict[str, Path],
    operators: RunningOperators,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Recipe:
    """A finished run of a step, of a user who has run nothing else; the first replica of each was used."""
    monkeypatch.setenv("BLINDTUNE_CONFIG", str(tmp_path / "settings"))
    data = write_lines(tmp_path / "data.jsonl", [{"prompt": "ab", "completion": "cd"}] * 2)
    sections = operator_sections(operators, "llama")
    recipe = recipe_of(
        tmp_path,
        with_tokenizer(checkpoints["llama"], tmp_path),
        data,
        data={"validation": str(data)},
        masking={"mode": "shares", "retry_seconds": 1.0},
        operators=[{**x, "workers": x["workers"][:1]} for x in sections],
        training={"max_steps": 1},
    )
    write_recipe(recipe, tmp_path / "recipe.yaml")
    observer = Silent()
    train_recipe(recipe, observer)
    assert any(x.startswith("operators: alpha at 127.0.0.1:") for x in observer.said)
    return recipe


def test_a_prompt_goes_to_operators_that_the_user_trusts_or_nowhere(
    run: Recipe,
    operators: RunningOperators,
    tmp_path: Path,
    command: Command,
    caplog: pytest.LogCaptureFixture,
) -> None:
    received = tmp_path / "received"
    shutil.copytree(run.output.dir, received)
    asked = ("generate", received, "--prompt", "secret", "--max-new-tokens", 2)

    ended, _, said = command(*asked)
    assert ended == ExitCode.CONFIGURATION and "are all on this machine" in said
    ended, _, said = command(*asked, "--set", "masking.allow_one_machine=true")
    assert ended == 0, said
    assert f"operators: alpha at {run.operators[0].workers[0]}; beta at" in said.replace("\n", " ")
    assert "nothing is private" in caplog.text

    strangers = [x.workers[1] for x in operators]
    recipe = load_recipe(received / "recipe.yaml")
    changed = [
        x.model_copy(update={"workers": [worker.addresses["llama"]]})
        for x, worker in zip(recipe.operators, strangers, strict=True)
    ]
    write_recipe(recipe.model_copy(update={"operators": changed}), received / "recipe.yaml")
    for number, worker in enumerate(strangers):
        worker.record(tmp_path / f"recorded-{number}")
    for arguments in (asked, ("eval", received), ("train", received / "recipe.yaml", "--resume")):
        more = ("--set", "masking.allow_one_machine=true", "--set", f"output.dir={received}")
        ended, _, said = command(*arguments, *more)
        assert ended == ExitCode.CONFIGURATION, said
        assert "names operators that you do not trust" in said
        assert said.count("\n") == 1, "one clear line"
    for number, worker in enumerate(strangers):
        worker.record(None)
        found = (tmp_path / f"recorded-{number}").rglob("*.json*")
        assert not [x for path in found for x in path.read_text().splitlines()[1:]]

    ended, shown, said = command("eval", received, "--operators", tmp_path / "recipe.yaml", "--json")
    assert ended == 0, said
    assert json.loads(shown)["examples"] == 2
    assert f"operators: alpha at {run.operators[0].workers[0]}" in said
