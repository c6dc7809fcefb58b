"""A folder that came from elsewhere does not decide who gets data, nor whether that is private."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.recipes import recipe_of
from typer.testing import CliRunner

from blindtune.client.recipe import Recipe, load_recipe, write_recipe
from blindtune.client.tls.certs import issue_operator_certificates
from blindtune.client.trust.choice import (
    are_new,
    own_recipe,
    recipe_of_run,
    remember_operators,
    trust_file,
    trust_named,
)
from blindtune.errors import ConfigurationError

NAMES = {"alpha": "203.0.113.1:7100", "beta": "198.51.100.1:7100"}
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's own folder, in which nothing is trusted yet."""
    folder = tmp_path / "settings"
    monkeypatch.setenv("BLINDTUNE_CONFIG", str(folder))
    return folder


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("issued")
    for name in NAMES:
        issue_operator_certificates(folder, name)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, issued: Path) -> Recipe:
    """A user's recipe of two operators, as it was resolved."""
    shutil.copytree(issued, tmp_path / "certs")
    operators = []
    for name, address in NAMES.items():
        folder = tmp_path / "certs" / name
        paths = {"ca": "ca.pem", "cert": "client.pem", "key": "client-key.pem"}
        files = {what: str(folder / file) for what, file in paths.items()}
        operators.append({"name": name, "workers": [address], **files})
    masking = {"mode": "shares", "allow_one_machine": False}
    return recipe_of(tmp_path, "model", tmp_path / "train.jsonl", masking=masking, operators=operators)


@pytest.fixture
def run(recipe: Recipe) -> Path:
    """The output folder of a run of it."""
    folder = recipe.output.dir
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    write_recipe(recipe, folder / "recipe.yaml")
    return folder


def _changed(run: Path, change: Change) -> None:
    """Rewrites the recipe of a folder, as someone through whose hands it went could."""
    content = load_recipe(run / "recipe.yaml").model_dump(mode="json")
    change(content)
    write_recipe(Recipe.model_validate(content), run / "recipe.yaml")


def test_operators_that_no_run_has_used_are_refused(run: Path) -> None:
    with pytest.raises(ConfigurationError, match="none of your runs has used these") as refused:
        recipe_of_run(run)
    assert "alpha at 203.0.113.1:7100; beta at 198.51.100.1:7100" in str(refused.value)
    assert "--operators FILE" in str(refused.value)
    assert f"blindtune trust {run / 'recipe.yaml'}" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_operators_of_an_own_run_are_trusted_at_once(recipe: Recipe, run: Path, tmp_path: Path) -> None:
    assert are_new(recipe)
    assert str(trust_file()) in (remember_operators(recipe) or "")
    assert not are_new(recipe)
    assert remember_operators(recipe) is None
    assert recipe_of_run(run).operators == recipe.operators
    shutil.copytree(run, tmp_path / "moved")
    assert recipe_of_run(tmp_path / "moved").operators == recipe.operators
    assert trust_file().stat().st_mode & 0o077 == 0


CHANGES: dict[str, Change] = {
    "an address": lambda x: x["operators"][0].update(workers=["203.0.113.9:7100"]),
    "two addresses": lambda x: [y.update(workers=[f"203.0.113.{i}:1"]) for i, y in enumerate(x["operators"])],
    "another replica": lambda x: x["operators"][0]["workers"].append("203.0.113.9:7100"),
    "a port": lambda x: x["operators"][1].update(workers=["198.51.100.1:7101"]),
    "operators exchanged": lambda x: x["operators"][0].update(workers=x["operators"][1]["workers"]),
    "a third operator": lambda x: x["operators"].append(
        {**x["operators"][0], "name": "gamma", "workers": ["203.0.113.9:1"]}
    ),
    "one of them for lattice": lambda x: (x["masking"].update(mode="lattice"), x["operators"].pop()),
    "another CA": lambda x: x["operators"][0].update(ca=x["operators"][1]["ca"]),
    "another key": lambda x: x["operators"][0].update(key="/home/someone/.ssh/id.pem"),
    "any file as a token": lambda x: x["operators"][0].update(token="/home/someone/password"),
    "no CA": lambda x: x["operators"][0].update(ca=None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_of_trusted_operators_a_folder_changes_is_refused(
    recipe: Recipe, run: Path, change: str
) -> None:
    remember_operators(recipe)
    _changed(run, CHANGES[change])
    with pytest.raises(ConfigurationError, match="operators that you do not trust"):
        recipe_of_run(run)
    with pytest.raises(ConfigurationError, match="operators that you do not trust"):
        own_recipe(run / "recipe.yaml")


def test_an_exchanged_ca_is_refused_and_one_with_another_comment_is_not(recipe: Recipe, run: Path) -> None:
    remember_operators(recipe)
    ca = recipe.operators[0].ca
    assert ca is not None
    ca.write_bytes(b"# alpha\n" + ca.read_bytes())
    recipe_of_run(run)
    shutil.copy(recipe.operators[1].ca or "", ca)
    with pytest.raises(ConfigurationError, match="the file of a CA holds another one than when you trusted"):
        recipe_of_run(run)


def test_a_file_that_only_a_folder_names_is_not_even_read(recipe: Recipe, run: Path) -> None:
    remember_operators(recipe)
    _changed(run, lambda x: x["operators"][0].update(ca="/dev/zero"))
    with pytest.raises(ConfigurationError, match="operators that you do not trust"):
        recipe_of_run(run)


def test_an_address_that_hides_where_it_leads_is_refused_before_it_is_shown(run: Path) -> None:
    _changed(run, lambda x: x["operators"][0].update(workers=["unix:/tmp/\x1b[2Jx:1"]))
    with pytest.raises(ConfigurationError, match="is not host:port") as refused:
        recipe_of_run(run)
    assert "\x1b" not in str(refused.value)


FLAGS = ("insecure", "allow_one_machine")


@pytest.mark.parametrize("flag", FLAGS)
def test_a_permission_never_comes_from_a_folder(recipe: Recipe, run: Path, flag: str) -> None:
    remember_operators(recipe)
    _changed(run, lambda x: x["masking"].update({flag: True}))

    def allowed(*settings: str, operators: Path | None = None) -> bool:
        return bool(getattr(recipe_of_run(run, settings, operators).masking, flag))

    assert not allowed()
    assert not allowed("masking.request_timeout=5")
    assert not allowed(operators=run / "recipe.yaml")
    assert not getattr(own_recipe(run / "recipe.yaml").masking, flag)
    assert allowed(f"masking.{flag}=true")
    with trust_file().open("a") as file:
        file.write(f"{flag}: true\n")
    assert allowed()
    assert not allowed(f"masking.{flag}=false")


def test_a_file_that_the_user_names_gives_operators_and_permissions(run: Path, tmp_path: Path) -> None:
    named = tmp_path / "operators.yaml"
    named.write_text(
        "operators:\n- {name: a, workers: ['127.0.0.1:1']}\n- {name: b, workers: ['127.0.0.2:1']}\n"
        "masking: {insecure: true, allow_one_machine: true}\n"
    )
    used = recipe_of_run(run, operators=named)
    assert [x.name for x in used.operators] == ["a", "b"]
    assert used.masking.insecure and used.masking.allow_one_machine
    assert not trust_file().exists(), "naming them for once is no trust for ever"
    given = "operators=[{name: c, workers: ['127.0.0.3:1']}]"
    assert [x.name for x in recipe_of_run(run, [given]).operators] == ["c"]
    with pytest.raises(ConfigurationError, match="--operators or --set operators, and not both"):
        recipe_of_run(run, [given], named)
    named.write_text("operators: []\n")
    with pytest.raises(ConfigurationError, match="names no operators"):
        recipe_of_run(run, operators=named)
    named.write_text("operators:\n- {name: a, worker: x}\n")
    with pytest.raises(ConfigurationError, match="line 2: .*operators.0.workers is missing"):
        recipe_of_run(run, operators=named)


def test_one_value_of_an_operator_from_the_command_line_does_not_make_it_trusted(
    recipe: Recipe, run: Path
) -> None:
    remember_operators(recipe)
    with pytest.raises(ConfigurationError, match="do not trust"):
        recipe_of_run(run, ["operators.0.workers=['203.0.113.9:1']"])


def test_reference_asks_nobody_whoever_is_named(run: Path, tmp_path: Path) -> None:
    _changed(run, lambda x: x["masking"].update(mode="reference"))
    assert recipe_of_run(run).operators == []
    with pytest.raises(ConfigurationError, match="leave out --operators"):
        recipe_of_run(run, operators=tmp_path / "any.yaml")


def test_a_recipe_elsewhere_is_the_users_word(recipe: Recipe, run: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    write_recipe(recipe, own)
    assert own_recipe(own) == recipe
    link = tmp_path / "link.yaml"
    link.symlink_to(run / "recipe.yaml")
    with pytest.raises(ConfigurationError, match="do not trust"):
        own_recipe(link)


def test_a_recipe_in_an_output_folder_names_neither_another_folder_nor_a_key(
    recipe: Recipe, run: Path, tmp_path: Path
) -> None:
    remember_operators(recipe)
    path = run / "recipe.yaml"
    assert own_recipe(path).output.dir == run
    _changed(run, lambda x: x["output"].update(dir=str(tmp_path / "elsewhere")))
    with pytest.raises(ConfigurationError, match="writes to another one"):
        own_recipe(path)
    _changed(run, lambda x: x["record"].update(key="/home/someone/.ssh/id"))
    with pytest.raises(ConfigurationError, match="names the key"):
        own_recipe(path, [f"output.dir={run}"])
    own_recipe(path, [f"output.dir={run}", "record.key=mine.key"])


def test_a_kit_that_only_a_folder_names_is_refused(recipe: Recipe, run: Path, tmp_path: Path) -> None:
    """Its maker knows the secret by which answers are verified."""
    kit = tmp_path / "kit"
    (kit / "blindtune").mkdir(parents=True)
    (kit / "blindtune" / "kit.json").touch()
    remember_operators(recipe)
    _changed(run, lambda x: x["model"].update(name=str(kit)))
    for act in (recipe_of_run, lambda folder: own_recipe(folder / "recipe.yaml")):
        with pytest.raises(ConfigurationError, match=f"names the kit {kit}.*--set model.name={kit}"):
            act(run)
    assert recipe_of_run(run, [f"model.name={kit}"]).model.name == str(kit)
    named = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(kit)})})
    assert remember_operators(named) is None, "the operators are not new"
    assert recipe_of_run(run).model.name == str(kit)


def test_a_trust_list_that_others_can_write_to_is_refused(recipe: Recipe, run: Path) -> None:
    remember_operators(recipe)
    trust_file().chmod(0o660)
    with pytest.raises(ConfigurationError, match="others can write to it"):
        recipe_of_run(run)


@pytest.mark.parametrize("mode", [0o777, 0o720])
def test_a_trust_list_that_others_can_exchange_is_refused(recipe: Recipe, run: Path, mode: int) -> None:
    remember_operators(recipe)
    trust_file().parent.chmod(mode)  # who can rename a file of the user's into it decides what it says
    with pytest.raises(ConfigurationError, match="others can exchange it"):
        recipe_of_run(run)
    trust_file().parent.chmod(0o755)
    assert recipe_of_run(run).operators == recipe.operators


@pytest.mark.parametrize(
    "content", ["trusted: 5", "- a", "trusted: [{masking: none}]", "a: [", "x: 1", "\x00"]
)
def test_a_trust_list_that_is_none_is_refused(run: Path, settings: Path, content: str) -> None:
    settings.mkdir()
    trust_file().write_text(content)
    trust_file().chmod(0o600)
    with pytest.raises(ConfigurationError, match=r"operators.yaml: .*correct it"):
        recipe_of_run(run)


def test_a_trust_list_that_cannot_be_written_is_a_warning_to_a_run(recipe: Recipe, settings: Path) -> None:
    settings.write_text("a file in the place of the folder")
    assert "warning: eval and generate will need --operators" in (remember_operators(recipe) or "")


def test_what_is_trusted_by_command_is_what_was_shown(recipe: Recipe, run: Path) -> None:
    from blindtune.client.cli.main import app

    ended = CliRunner().invoke(app, ["trust", str(run / "recipe.yaml")])
    assert ended.exit_code == 0
    assert "shares: alpha at 203.0.113.1:7100; beta at 198.51.100.1:7100" in ended.output.replace("\n", "")
    assert recipe_of_run(run).operators == recipe.operators
    assert not trust_named(run / "recipe.yaml")[1]


def test_comments_of_a_trust_list_survive(recipe: Recipe, run: Path, settings: Path) -> None:
    settings.mkdir()
    trust_file().write_text("# mine\ninsecure: false  # never\n")
    trust_file().chmod(0o600)
    remember_operators(recipe)
    assert trust_file().read_text().startswith("# mine\ninsecure: false  # never\n")
    assert os.stat(trust_file()).st_mode & 0o777 == 0o600
    recipe_of_run(run)
