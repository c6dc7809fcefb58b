"""What a folder out of other hands may hold, and what is refused before anything is loaded or written."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.recipes import recipe_of

from blindtune.client.merge.files import copy_tokenizer
from blindtune.client.recipe import write_recipe
from blindtune.client.runs.evaluation import tuned_model
from blindtune.client.training.folder import RunFolder
from blindtune.client.training.models import BaseModel
from blindtune.client.trust.links import require_inside, require_own_files
from blindtune.errors import CheckpointError, ConfigurationError, UnsupportedError

pytestmark = pytest.mark.hf


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The output folder of a run that has finished, as far as these tests go."""
    folder = tmp_path / "output"
    (folder / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    write_recipe(recipe_of(tmp_path, "someone/model", tmp_path / "train.jsonl"), folder / "recipe.yaml")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for name in ("run.json", "summary.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize(
    "setting", [{"megatron_config": {"a": 1}, "megatron_core": "megatron.x"}, {"peft_type": "PROMPT_TUNING"}]
)
def test_more_than_plain_lora_is_refused_even_where_the_base_alone_is_asked(
    run: Path, setting: dict[str, Any], adapter: bool
) -> None:
    (run / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **setting}))
    with pytest.raises(UnsupportedError, match="plain LoRA"), tuned_model(run, adapter=adapter):
        pass


def test_a_recipe_alone_is_no_run_that_one_is_told_to_go_on_with(run: Path) -> None:
    (run / "summary.json").unlink()
    with pytest.raises(ConfigurationError, match="--resume"), tuned_model(run):
        pass
    for name in ("run.json", "adapter_config.json"):
        (run / name).unlink()
    with pytest.raises(ConfigurationError, match="is not the output folder of a run") as refused:
        with tuned_model(run):
            pass
    assert "--resume" not in str(refused.value)


@pytest.mark.parametrize("name", ["checkpoints/checkpoint-2", ".lock", "checkpoints/.unfinished", "run.json"])
@pytest.mark.parametrize("target", ["victim", "nothing", "itself"])
def test_a_link_out_of_the_folder_is_refused_before_anything_is_written(
    run: Path, tmp_path: Path, name: str, target: str
) -> None:
    (tmp_path / "victim").mkdir()
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(run / name if target == "itself" else tmp_path / target)
    with pytest.raises(ConfigurationError, match=f"{name} is a link that leads out of"):
        RunFolder(run).start(resume=True)
    with pytest.raises(ConfigurationError, match="link that leads out of"), tuned_model(run):
        pass
    assert not any((tmp_path / "victim").iterdir())


def test_links_within_a_folder_and_those_of_the_hubs_cache_are_taken(run: Path, tmp_path: Path) -> None:
    (run / "checkpoints" / "latest").symlink_to("checkpoint-1")
    require_own_files(run)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (blobs / "x").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/x")
    require_own_files(snapshot)
    (blobs / "y").symlink_to(run / "run.json")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/y")
    with pytest.raises(ConfigurationError, match="link that leads out of"):
        require_inside(snapshot / "tokenizer.json", snapshot)


def test_a_merged_model_takes_no_file_along_that_a_link_leads_to(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (run / "chat_template.jinja").symlink_to(tmp_path / "secret")
    merged = tmp_path / "merged"
    merged.mkdir()
    with pytest.raises(ConfigurationError, match="link that leads out of"):
        copy_tokenizer(tmp_path, run, merged)
    assert os.listdir(merged) == []


@pytest.mark.parametrize("labels", [5, "ab", {"a": 1}, [1, 2], [["a"]], None, True])
def test_labels_of_another_kind_are_damage(run: Path, labels: object) -> None:
    (run / "run.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        RunFolder(run).labels  # noqa: B018


def test_a_base_with_an_adapter_beside_it_is_refused(tmp_path: Path) -> None:
    # Stock loading would load the model that the adapter names, which may be a kit that nobody trusts.
    base = tmp_path / "base"
    base.mkdir()
    (base / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere"}))
    with pytest.raises(ConfigurationError, match="holds an adapter"):
        BaseModel.found(recipe_of(tmp_path, base, tmp_path / "train.jsonl"))


def test_a_kit_out_of_the_hub_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = tmp_path / "snapshot"
    (kit / "blindtune").mkdir(parents=True)
    (kit / "blindtune" / "kit.json").write_text("{}")
    monkeypatch.setattr("blindtune.checkpoint.files.snapshot_download", lambda name, **options: str(kit))
    with pytest.raises(ConfigurationError, match="is a client kit from the hub"):
        BaseModel.found(recipe_of(tmp_path, "someone/model", tmp_path / "train.jsonl"))
    assert BaseModel.found(recipe_of(tmp_path, kit, tmp_path / "train.jsonl")).folder == kit
