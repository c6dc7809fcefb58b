"""What a run keeps, and adapters to merge, with any content: read, or one error that names the file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fuzzing import JSON, dumped, examples, refused_or_fine, spoiled, spoiled_json
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from blindtune.client.merge.checkpoint import merge
from blindtune.client.training.checkpoints import damage_is_clear, newest, read_json
from blindtune.client.training.figures import Figures
from blindtune.client.training.folder import RunFolder

STATE = {
    "versions": {"torch": "2.13"},
    "train_sha256": "0" * 64,
    "validation_sha256": None,
    "labels": ["a", "b"],
    "so_far": {"steps": 3, "seconds": 1.5},
    "before": {"loss": 1.0},
}


@examples(200)
@given(
    content=spoiled_json(STATE).map(dumped)
    | spoiled(st.just(dumped(STATE)))
    | JSON.map(dumped)
    | st.binary(max_size=50)
)
@example(content=b'{"versions": 5}')
@example(content=b'{"so_far": {"steps": "x"}}')
def test_what_is_kept_of_a_run_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with refused_or_fine(path):
        kept = read_json(path)
        folder = RunFolder(tmp_path)
        assert folder.state == kept or json.dumps(folder.state) == json.dumps(kept)  # NaN is not itself
        assert all(isinstance(x, str) for x in folder.differing_versions())
        with damage_is_clear(path):
            total = Figures.from_json(kept.get("so_far", {})) + Figures(steps=1)
            json.dumps(total.summary(1.0, 1.0))


@examples(60)
@given(
    names=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20))
)
@example(names=["checkpoint-", "checkpoint-x", "checkpoint-2", "checkpoint-10", "checkpoint-1\n"])
@example(names=["checkpoint-20.bak", "checkpoint-30 (copy)", "checkpoint-031", "my checkpoint-40"])
def test_the_newest_checkpoint_is_found_among_folders_of_any_name(tmp_path: Path, names: list[str]) -> None:
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in {*names, "checkpoint-9"} - {".", ".."}:
        (folder / name).mkdir()
    found = newest(folder)
    assert found is not None
    assert found.name == ("checkpoint-10" if "checkpoint-10" in names else "checkpoint-9")


@pytest.fixture(scope="module")
def adapter(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    base = LlamaForCausalLM.from_pretrained(checkpoints["llama"])
    torch.manual_seed(1)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    return folder


def test_a_spoiled_adapter_is_merged_or_refused(
    adapter: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder, output = tmp_path / "adapter", tmp_path / "merged"
    shutil.copytree(adapter, folder)
    settings = (adapter / "adapter_config.json").read_bytes()
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    length = 8 + int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8:length])

    @examples(60)
    @given(
        content=st.tuples(
            spoiled_json(json.loads(settings)).map(dumped) | spoiled(st.just(settings)), st.just(weights)
        )
        | st.tuples(
            st.just(settings),
            spoiled(st.just(weights))
            | spoiled_json(header)
            .map(dumped)
            .map(lambda x: len(x).to_bytes(8, "little") + x + weights[length:]),
        )
    )
    def check(content: tuple[bytes, bytes]) -> None:
        (folder / "adapter_config.json").write_bytes(content[0])
        (folder / "adapter_model.safetensors").unlink()
        (folder / "adapter_model.safetensors").write_bytes(content[1])
        shutil.rmtree(output, ignore_errors=True)
        with refused_or_fine():
            merge(folder, checkpoints["llama"], output)

    check()
