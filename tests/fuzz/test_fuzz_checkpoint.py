"""Checkpoint folders of any content: opened, or one error that names the folder; nothing of it is run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzzing import JSON, dumped, examples, refused_or_fine, spoiled, spoiled_json
from hypothesis import given
from hypothesis import strategies as st

from blindtune.checkpoint import Checkpoint
from blindtune.checkpoint.files import TensorFiles
from blindtune.errors import CheckpointError, UnsupportedError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints["llama"], tmp_path / "model"))


def read(folder: Path) -> None:
    """All that a worker reads of a checkpoint."""
    checkpoint = Checkpoint.open(folder)
    with checkpoint.reader() as reader:
        for layer in checkpoint.layers:
            reader.read(layer)


def test_a_spoiled_configuration_is_read_or_refused(folder: Path) -> None:
    path = folder / "config.json"
    valid = path.read_bytes()

    @examples(120)
    @given(
        content=spoiled_json(json.loads(valid)).map(dumped) | spoiled(st.just(valid)) | st.binary(max_size=50)
    )
    def check(content: bytes) -> None:
        path.write_bytes(content)
        with refused_or_fine(folder):
            read(folder)

    check()


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [1]},
        {"architectures": ["set_seed"]},
        {"architectures": ["logging"]},
        {"architectures": ["AutoTokenizer"]},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 0},
        {"hidden_size": -1},
        {"vocab_size": 2**62},
        {"hidden_act": "os.system"},
        {"model_type": ["llama"]},
        {"dtype": "system"},
        {"rope_parameters": []},
        {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}},
    ],
    ids=lambda x: "".join(map(str, x.items())),
)
def test_a_configuration_that_asks_for_something_else_is_read_or_refused(
    folder: Path, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # as whoever asks would want it
    path, evil = folder / "config.json", folder / "evil"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (folder / "evil.py").write_text(f"import pathlib; pathlib.Path({str(evil)!r}).touch()")
    with refused_or_fine():
        read(folder)
    assert not evil.exists()


def test_the_architecture_of_a_configuration_names_a_model_and_no_other_function(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["set_seed"]}))
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    Checkpoint.open(folder)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_more_blocks_than_any_model_has_are_refused_before_they_are_built(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 10**9}))
    with pytest.raises(CheckpointError, match="1000000000 blocks"):
        Checkpoint.open(folder)


def test_a_spoiled_safetensors_file_is_read_or_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    valid = path.read_bytes()
    length = 8 + int.from_bytes(valid[:8], "little")
    header = json.loads(valid[8:length])

    def with_header(content: bytes) -> bytes:
        return len(content).to_bytes(8, "little") + content + valid[length:]

    @examples(150)
    @given(
        content=spoiled(st.just(valid[:length])).map(lambda x: x + valid[length:])
        | spoiled_json(header).map(dumped).map(with_header)
        | spoiled(st.just(valid))
        | st.binary(max_size=100)
    )
    def check(content: bytes) -> None:
        path.unlink()
        path.write_bytes(content)
        with refused_or_fine(folder):
            read(folder)

    check()


def test_a_spoiled_index_is_read_or_refused(folder: Path) -> None:
    with TensorFiles(folder) as tensors:
        names = dict.fromkeys(tensors, "part.safetensors")
    os.rename(folder / "model.safetensors", folder / "part.safetensors")
    path = folder / INDEX
    valid = {"metadata": {"total_size": 1}, "weight_map": names}

    @examples(150)
    @given(
        content=spoiled_json(valid).map(dumped)
        | spoiled(st.just(dumped(valid)))
        | JSON.map(dumped)
        | JSON.map(lambda x: dumped({"weight_map": x}))
        | JSON.map(lambda x: dumped({"weight_map": {"a": x}}))
        | st.binary(max_size=50)
    )
    def check(content: bytes) -> None:
        path.write_bytes(content)
        with refused_or_fine(folder):
            read(folder)

    check()


@pytest.mark.parametrize("name", ["../other/part.safetensors", "/etc/passwd", "a\0b", "x" * 300, 5, None, []])
def test_an_index_names_files_of_its_own_folder_only(folder: Path, name: object) -> None:
    other = folder.parent / "other"
    other.mkdir()
    os.rename(folder / "model.safetensors", other / "part.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="index of weights"):
        TensorFiles(folder)


@pytest.mark.parametrize("content", [[], 5, torch.zeros(2), {"a": 5}, {1: torch.zeros(2)}, {"a": {"b": 1}}])
def test_pickled_weights_are_named_tensors_and_nothing_else(folder: Path, content: object) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin"):
        TensorFiles(folder)


def test_spoiled_pickled_weights_are_read_or_refused(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": torch.zeros(99, 32)}, path)
    valid = path.read_bytes()

    @examples(100)
    @given(content=spoiled(st.just(valid)) | st.binary(max_size=100))
    def check(content: bytes) -> None:
        path.unlink()
        path.write_bytes(content)
        with refused_or_fine(), TensorFiles(folder) as tensors:
            for key in tensors:
                tensors.get(key)

    check()


def test_a_layer_of_integers_or_of_another_shape_is_refused(
    checkpoints: dict[str, Path], folder: Path, edit: Callable[..., None]
) -> None:
    edit(folder, "lm_head.weight", torch.zeros(3, 4))
    with pytest.raises(CheckpointError, match="shape"):
        read(folder)
    edit(folder, "lm_head.weight", torch.full((99, 32), float("nan")))
    with pytest.raises(CheckpointError, match="lm_head"):
        read(folder)
    edit(folder, "lm_head.weight", torch.zeros(99, 32, dtype=torch.complex64))
    with pytest.raises((CheckpointError, UnsupportedError)):
        read(folder)


@pytest.fixture
def edit() -> Callable[..., None]:
    from safetensors.torch import load_file, save_file

    def change(folder: Path, key: str, value: torch.Tensor) -> None:
        path = folder / "model.safetensors"
        save_file(load_file(path) | {key: value}, path, {"format": "pt"})

    return change
