"""What a run keeps of itself notices a change of it, and confirms no guess of its data."""

import hashlib
import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from support.recipes import recipe_of

from blindtune.client.data.prepared import PreparedData, Split
from blindtune.client.data.reading.records import digest
from blindtune.client.recipe import Recipe
from blindtune.client.training.data_tag import data_key
from blindtune.client.training.folder import RunFolder
from blindtune.errors import ConfigurationError

NOW = datetime(2026, 3, 1)
ROWS = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}]
OTHER = [{"input_ids": [1, 2, 4], "labels": [-100, 2, 4]}]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("BLINDTUNE_CONFIG", str(tmp_path / "settings"))
    return recipe_of(tmp_path, "model", tmp_path / "train.jsonl")


def _data(train: list[dict[str, list[int]]], validation: list[dict[str, list[int]]] | None) -> PreparedData:
    split = Split(Path("x"), "prompt-completion", [], train, 0, 0)
    return PreparedData(split, None if validation is None else replace(split, rows=validation), [])


def _kept(folder: RunFolder) -> str:
    return (folder.path / "run.json").read_text()


@pytest.fixture
def begun(recipe: Recipe) -> RunFolder:
    recipe.output.dir.mkdir()
    folder = RunFolder(recipe.output.dir)
    assert folder.begin(recipe, _data(ROWS, OTHER), None, NOW) == []
    return folder


def test_a_guess_of_the_data_finds_no_hash_of_it_and_two_runs_have_nothing_in_common(
    recipe: Recipe, begun: RunFolder
) -> None:
    first = json.loads(_kept(begun))["data"]
    assert begun.begin(recipe, _data(ROWS, ROWS), None, NOW) == []
    second = json.loads(_kept(begun))["data"]
    for rows in (ROWS, OTHER):
        assert digest(rows) not in _kept(begun)
        assert hashlib.sha256(digest(rows).encode()).hexdigest() not in _kept(begun)
    assert not {first["train"], first["validation"]} & {second["train"], second["validation"]}
    assert second["train"] != second["validation"], "the same rows in two files"
    assert data_key().stat().st_mode & 0o077 == 0 and len(data_key().read_bytes()) == 32


@pytest.mark.parametrize(
    ("data", "changed"),
    [
        (_data(OTHER, OTHER), "train"),
        (_data(ROWS, ROWS), "validation"),
        (_data(ROWS, None), "validation"),
        (_data(ROWS * 2, OTHER), "train"),
    ],
)
def test_changed_data_is_refused(recipe: Recipe, begun: RunFolder, data: PreparedData, changed: str) -> None:
    assert begun.require_same(recipe, _data(ROWS, OTHER), None) == []
    with pytest.raises(ConfigurationError, match=f"the {changed} data is not what the run began with"):
        begun.require_same(recipe, data, None)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("section", ["model", "quantization", "adapter", "data", "training"])
def test_no_setting_of_what_a_run_computes_can_be_changed_when_it_goes_on(
    recipe: Recipe, begun: RunFolder, section: str
) -> None:
    before = sorted(x.read_bytes() for x in begun.path.iterdir() if x.is_file())
    settings = getattr(recipe, section)
    for name in type(settings).model_fields:
        changed = recipe.model_copy(update={section: settings.model_copy(update={name: "changed"})})
        with pytest.raises(ConfigurationError, match=f"another {section}.{name} "):
            begun.require_same(changed, _data(ROWS, OTHER), None)
    assert sorted(x.read_bytes() for x in begun.path.iterdir() if x.is_file()) == before


def test_who_multiplies_may_change_when_a_run_goes_on(recipe: Recipe, begun: RunFolder) -> None:
    masking = recipe.masking.model_copy(update={"retry_seconds": 5.0, "ask_ahead": True})
    record = recipe.record.model_copy(update={"enabled": False})
    changed = recipe.model_copy(update={"masking": masking, "record": record, "operators": []})
    assert begun.require_same(changed, _data(ROWS, OTHER), None) == []


def test_without_its_key_a_run_goes_on_with_a_warning_once(recipe: Recipe, begun: RunFolder) -> None:
    data_key().unlink()
    (warning,) = begun.require_same(recipe, _data(ROWS, OTHER), None)
    assert "can't be told" in warning
    assert begun.require_same(recipe, _data(ROWS, OTHER), None) == []
    with pytest.raises(ConfigurationError, match="train data"):
        begun.require_same(recipe, _data(OTHER, OTHER), None)
    data_key().write_bytes(bytes(32))
    assert "is not the key" in begun.require_same(recipe, _data(ROWS, OTHER), None)[0]


@pytest.mark.parametrize("kept", [None, 5, {}, {"nonce": 5}, {"nonce": "x" * 32}, {"nonce": "../../x"}])
def test_a_run_that_says_nothing_usable_of_its_data_is_a_warning(
    recipe: Recipe, begun: RunFolder, kept: object
) -> None:
    begun.keep(data=kept)
    assert "says nothing of its data" in begun.require_same(recipe, _data(ROWS, OTHER), None)[0]


def test_a_plain_hash_of_an_earlier_version_is_compared_and_then_removed(
    recipe: Recipe, begun: RunFolder
) -> None:
    state = {name: x for name, x in begun.state.items() if name != "data"}
    old = {"train_sha256": digest(ROWS), "validation_sha256": digest(OTHER)}
    (begun.path / "run.json").write_text(json.dumps(state | old))
    with pytest.raises(ConfigurationError, match="validation data"):
        begun.require_same(recipe, _data(ROWS, ROWS), None)
    assert "train_sha256" in begun.state, "nothing is rewritten for data that is refused"
    assert begun.require_same(recipe, _data(ROWS, OTHER), None) == []
    assert digest(ROWS) not in _kept(begun) and "sha256" not in _kept(begun)
    with pytest.raises(ConfigurationError, match="train data"):
        begun.require_same(recipe, _data(OTHER, OTHER), None)


def test_a_key_that_others_can_read_or_cannot_be_made_is_a_warning(recipe: Recipe, begun: RunFolder) -> None:
    data_key().chmod(0o644)
    assert "can be read by others" in begun.begin(recipe, _data(ROWS, OTHER), None, NOW)[0]
    assert begun.state["data"] is None
    data_key().unlink()
    data_key().parent.rename(data_key().parent.with_name("moved"))
    data_key().parent.write_text("a file in the place of the folder")
    assert "--resume will not notice" in begun.begin(recipe, _data(ROWS, OTHER), None, NOW)[0]
