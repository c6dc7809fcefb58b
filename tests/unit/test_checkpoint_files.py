"""A checkpoint's numbers are weights as they stand, or it is refused by the name of a tensor or file."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.checkpoints import CLASSES
from support.recipes import character_tokenizer

from blindtune.checkpoint import Checkpoint
from blindtune.checkpoint.skeleton import supported_config
from blindtune.client.merge.checkpoint import merge
from blindtune.client.training.models import load_tokenizer
from blindtune.errors import CheckpointError

pytestmark = pytest.mark.hf

UP = "model.layers.1.mlp.up_proj"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 976\n"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def copy(checkpoints: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Copies a checkpoint with other tensors."""

    def make(change: Callable[[Tensors], object] = lambda x: None, pickled: bool = False) -> Path:
        folder = shutil.copytree(checkpoints["llama"], tmp_path / "base")
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        (folder / "model.safetensors").unlink()
        if pickled:
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def _as(key: str, dtype: torch.dtype) -> Callable[[Tensors], object]:
    return lambda x: x.update({key: x[key].to(dtype)})


def _beside(key: str) -> Callable[[Tensors], object]:
    return lambda x: x.update({key: torch.ones(1)})


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (_as(f"{UP}.weight", torch.float8_e4m3fn), f"{UP}.weight .* is float8_e4m3fn"),
        (_as("model.embed_tokens.weight", torch.int8), "model.embed_tokens.weight .* is int8"),
        (_as("model.norm.weight", torch.float8_e5m2), "model.norm.weight .* is float8_e5m2"),
        (_beside(f"{UP}.weight_scale_inv"), f"{UP}.weight_scale_inv beside {UP}.weight"),
        (_beside(f"{UP}.input_scale"), f"{UP}.input_scale beside {UP}.weight"),
        (_beside(f"{UP}.weight.absmax"), f"{UP}.weight.absmax beside {UP}.weight"),
        (_beside("lm_head.SCB"), "lm_head.SCB beside lm_head.weight"),
        (lambda x: x.update({"extra.w": torch.ones(2, dtype=torch.uint8)}), "extra.w .* is uint8, and the"),
    ],
)
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickled"])
def test_weights_that_need_a_scale_are_refused_by_name(
    change: Callable[[Tensors], object], key: str, pickled: bool, copy: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointError, match=f"{key}.*full precision"):
        Checkpoint.open(copy(change, pickled))


def test_what_old_checkpoints_hold_besides_weights_is_passed_over(copy: Callable[..., Path]) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.position_ids"] = torch.arange(4)
        tensors["mtp.0.proj.weight"] = torch.ones(2, 2)
        tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].half()

    assert Checkpoint.open(copy(change)).layers


def test_nothing_is_merged_into_weights_that_need_a_scale(copy: Callable[..., Path], tmp_path: Path) -> None:
    base = copy()
    model = CLASSES["llama"].from_pretrained(base, dtype=torch.float32)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    tensors = load_file(base / "model.safetensors")
    _beside(f"{UP}.weight_scale")(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="weight_scale beside"):
        merge(tmp_path / "adapter", base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "config.json"]
)
def test_a_pointer_to_a_file_is_not_taken_for_the_file(name: str, copy: Callable[..., Path]) -> None:
    folder = copy()
    if name != "config.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=f"{name} is a git-lfs pointer.*git lfs pull"):
        Checkpoint.open(folder)
    if name == "config.json":
        with pytest.raises(CheckpointError, match="git-lfs pointer"):
            supported_config(folder)


def test_a_pointer_of_another_system_is_named_with_its_command(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "model.safetensors").write_text("/annex/objects/SHA256E-s976--ab.safetensors\n")
    with pytest.raises(CheckpointError, match=r"safetensors is a git-annex pointer.*with git annex get"):
        Checkpoint.open(folder)


def test_a_pointer_that_nothing_reads_does_no_harm(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "pytorch_model.bin").write_text(POINTER)
    assert Checkpoint.open(folder).layers


def test_a_pointer_to_a_tokenizer_is_named(tmp_path: Path) -> None:
    character_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "<pad>"
    (tmp_path / "tokenizer.json").write_text(POINTER)
    with pytest.raises(CheckpointError, match="tokenizer.json is a git-lfs pointer"):
        load_tokenizer(tmp_path)
