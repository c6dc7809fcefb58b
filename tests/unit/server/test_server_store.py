"""What a worker loads, and what it refuses to load."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from blindtune.checkpoint import Checkpoint
from blindtune.errors import ConfigurationError, ResourceError
from blindtune.protocol.multiplication.layer_memory import joined, row_bytes
from blindtune.protocol.weights import model_fingerprint
from blindtune.server.memory import available_bytes, cgroup_bytes, memory_needed, usable_device
from blindtune.server.store import LayerStore, layer_fingerprints

pytestmark = pytest.mark.hf


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(3)
    LlamaForCausalLM(config).save_pretrained(folder)
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def whole(checkpoint: Checkpoint) -> LayerStore:
    return LayerStore.load(checkpoint)


def test_a_store_holds_the_integers_of_every_frozen_layer(checkpoint: Checkpoint, whole: LayerStore) -> None:
    assert len(whole.layers) == 2 * 7 + 1
    with checkpoint.reader() as reader:
        for layer in checkpoint.layers:
            read = reader.read(layer)
            stored = whole.layers[layer.name]
            assert torch.equal(stored.integers, read.integers)
            assert stored.fingerprint == read.fingerprint()
    assert whole.fingerprint == model_fingerprint(layer_fingerprints(checkpoint))
    assert (whole.model, whole.revision) == ("tiny-llama", "")


def test_layers_stand_behind_each_other_in_memory_in_the_checkpoints_order(whole: LayerStore) -> None:
    names = [name for name in whole.layers if "layers.1." in name]
    for group in (["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]):
        layers = [
            whole.layers[name].integers for part in group for name in names if f".{part}." in f".{name}."
        ]
        assert len(layers) == len(group)
        (stack,) = joined(layers)
        assert torch.equal(stack, torch.cat(layers))


def test_every_contraction_length_is_served_in_both_directions(whole: LayerStore) -> None:
    assert whole.contractions == {16, 32, 48, 99}


def test_a_part_of_the_layers_has_the_fingerprint_of_the_whole(
    checkpoint: Checkpoint, whole: LayerStore
) -> None:
    name = checkpoint.layers[0].name
    part = LayerStore.load(checkpoint, held={name})
    assert list(part.layers) == [name]
    assert part.fingerprint == whole.fingerprint
    with pytest.raises(ConfigurationError, match="no frozen layer no.such.weight"):
        LayerStore.load(checkpoint, held={"no.such.weight"})


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(checkpoint: Checkpoint) -> None:
    needed = memory_needed(checkpoint.layers, torch.device("cpu"))[torch.device("cpu")]
    sizes = [layer.out_features * layer.in_features for layer in checkpoint.layers]
    held = sum(layer.out_features * row_bytes(layer.in_features) for layer in checkpoint.layers)
    assert needed == held + 4 * max(sizes)
    LayerStore.load(checkpoint, available=lambda device: needed)
    unreadable = replace(checkpoint, folder=Path("/nowhere"), model="m")
    with pytest.raises(ResourceError, match=r"need 0\.00 GiB on cpu.*use a larger machine"):
        LayerStore.load(unreadable, available=lambda device: needed - 1)


def test_a_gpu_needs_room_for_the_model_and_the_host_for_one_layer(checkpoint: Checkpoint) -> None:
    needed = memory_needed(checkpoint.layers, torch.device("cuda", 0))
    largest = 99 * 32
    assert needed[torch.device("cpu")] == 5 * largest
    assert needed[torch.device("cuda", 0)] > 4 * largest


def test_memory_is_what_the_containers_limit_leaves(tmp_path: Path) -> None:
    assert cgroup_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 50\n")
    assert cgroup_bytes(tmp_path) == 350
    (tmp_path / "memory.max").write_text("max\n")
    assert cgroup_bytes(tmp_path) is None
    assert available_bytes(torch.device("cpu")) > 0


def test_memory_limits_of_the_first_kind_of_cgroup_count_too(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    for name, content in {
        "memory.limit_in_bytes": "1000",
        "memory.usage_in_bytes": "900",
        "memory.stat": "cache 1\ntotal_inactive_file 200\n",
    }.items():
        (tmp_path / "memory" / name).write_text(content)
    assert cgroup_bytes(tmp_path) == 300


@pytest.mark.parametrize("name", ["tpu", "gpu0", "mps", "meta"])
def test_a_device_that_cannot_be_used_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="use cpu, cuda or cuda:N"):
        usable_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="torch finds no CUDA here"):
        usable_device("cuda:0")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_layers_stay_on_the_gpu(checkpoint: Checkpoint, whole: LayerStore) -> None:
    store = LayerStore.load(checkpoint, usable_device("cuda"))
    assert {layer.integers.device.type for layer in store.layers.values()} == {"cuda"}
    assert store.fingerprint == whole.fingerprint
