"""A base model is usable, and takes what it is given, before anything is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.recipes import Silent, recipe_of, with_tokenizer, write_lines
from transformers import (
    AutoModel,
    BloomConfig,
    CamembertConfig,
    DebertaV2Config,
    GPT2Config,
    MPNetConfig,
    OPTConfig,
    PretrainedConfig,
    RobertaConfig,
    T5Config,
    XLNetConfig,
)

from blindtune.client.data.prepared import prepare_data
from blindtune.client.preflight.offline import before_loading
from blindtune.client.runs.run import train_recipe
from blindtune.client.training.models import load_tokenizer
from blindtune.client.training.positions import positions
from blindtune.errors import CheckpointError, ConfigurationError

pytestmark = pytest.mark.hf

_SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 12,
}


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (RobertaConfig(**_SIZES, pad_token_id=1), 10),
        (RobertaConfig(**_SIZES, pad_token_id=0), 11),
        (CamembertConfig(**_SIZES, pad_token_id=3), 8),
        (MPNetConfig(**_SIZES), 10),
        (DebertaV2Config(**_SIZES), 12),
        (GPT2Config(vocab_size=99, n_positions=12, n_embd=32, n_layer=1, n_head=4), 12),
        (OPTConfig(**_SIZES, ffn_dim=48, word_embed_proj_dim=32), 12),
        (XLNetConfig(vocab_size=99, d_model=32, n_layer=1, n_head=4, d_inner=48), None),
        (BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=4), None),
        (T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4), None),
    ],
    ids=lambda x: x.model_type if isinstance(x, PretrainedConfig) else None,
)
def test_the_limit_of_a_model_is_the_longest_text_that_it_takes(
    config: PretrainedConfig, most: int | None
) -> None:
    model = AutoModel.from_config(config)
    assert positions(config) == most
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    with torch.no_grad():
        model(input_ids=torch.full((1, most or 50), 7))
    if most is not None:
        with pytest.raises((IndexError, RuntimeError)), torch.no_grad():
            model(input_ids=torch.full((1, most + 1), 7))


def test_a_dry_run_finds_texts_that_are_too_long_for_a_roberta(tmp_path: Path) -> None:
    model = AutoModel.from_config(RobertaConfig(**_SIZES, pad_token_id=1))
    model.save_pretrained(tmp_path / "plain")
    folder = with_tokenizer(tmp_path / "plain", tmp_path / "whole")
    train = write_lines(tmp_path / "train.jsonl", [{"text": "ab" * 6, "label": x} for x in "xy"])
    recipe = recipe_of(tmp_path, folder, train, data={"task": "classification"})
    data = prepare_data(recipe.data, load_tokenizer(folder), 0)
    with pytest.raises(
        ConfigurationError, match="12 tokens, and the model takes 10: set data.max_length to 10"
    ):
        list(before_loading(recipe, folder, load_tokenizer(folder), data))


@pytest.fixture
def spoiled(checkpoints: dict[str, Path], tmp_path: Path) -> Callable[[str, str, float], Path]:
    """A checkpoint with one number changed."""

    def make(family: str, key: str, value: float) -> Path:
        folder = with_tokenizer(checkpoints[family], tmp_path)
        tensors = load_file(folder / "model.safetensors")
        tensors[key].view(-1)[3] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "model.norm.weight", float("nan")),
        ("llama", "model.layers.1.input_layernorm.weight", float("inf")),
        ("gpt2", "transformer.wte.weight", float("nan")),
        ("gpt2", "transformer.h.0.mlp.c_fc.bias", float("-inf")),
        ("llama", "model.layers.0.mlp.up_proj.weight", float("nan")),
    ],
)
def test_a_weight_that_is_no_number_is_named_before_training(
    family: str, key: str, value: float, spoiled: Callable[[str, str, float], Path], tmp_path: Path
) -> None:
    train = write_lines(tmp_path / "train.jsonl", [{"prompt": "ab", "completion": "c"}])
    recipe = recipe_of(tmp_path, spoiled(family, key, value), train)
    with pytest.raises(CheckpointError, match=f"{key} .*(infinite or no number|not finite)"):
        train_recipe(recipe, Silent())
    assert not (recipe.output.dir / "run.json").exists()
