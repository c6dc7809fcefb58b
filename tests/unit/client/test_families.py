"""Further model families: all their frozen layers are found and grouped, and compute what they should."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.training import training_step, with_adapter
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from blindtune.checkpoint import Checkpoint
from blindtune.client import BlindConfig
from blindtune.client.kit.groups import all_products
from blindtune.client.kit.prepare import prepare
from blindtune.client.model import quantizer as quantizer_module
from blindtune.client.model.remote_linear import RemoteLinear
from blindtune.client.rounds.multiplier import ReferenceMultiplier
from blindtune.errors import UnsupportedError
from blindtune.protocol.masks import MaskedOperand
from blindtune.protocol.products import Direction, Product

pytestmark = pytest.mark.hf

LAYERS = 2
_COMMON: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}
_GATED = _COMMON | {"intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.15}
_GEMMA = _GATED | {"head_dim": 8}
_OPT = _COMMON | {"ffn_dim": 48, "init_std": 0.15, "word_embed_proj_dim": 32, "dropout": 0.0}

FAMILIES: dict[str, PretrainedConfig] = {
    "mistral": MistralConfig(**_GATED, sliding_window=5, tie_word_embeddings=False),
    "gemma": GemmaConfig(**_GEMMA),
    "gemma2": Gemma2Config(**_GEMMA, query_pre_attn_scalar=8, sliding_window=5),
    "gemma3": Gemma3TextConfig(**_GEMMA, query_pre_attn_scalar=8, sliding_window=5),
    "phi": PhiConfig(**_COMMON, intermediate_size=48, initializer_range=0.15, partial_rotary_factor=0.5),
    "opt": OPTConfig(**_OPT),
    # As in OPT-350m, the embedding has another width than the layers, and norms come last.
    "opt with projections": OPTConfig(
        **_OPT | {"word_embed_proj_dim": 24}, do_layer_norm_before=False, tie_word_embeddings=True
    ),
}

_ATTENTION = [f"self_attn.{x}_proj" for x in "qkv"]
_GATED_GROUPS = [_ATTENTION, ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
_OPT_GROUPS = [_ATTENTION, ["self_attn.out_proj"], ["fc1"], ["fc2"]]
GROUPS: dict[str, list[list[str]]] = {
    "mistral": _GATED_GROUPS,
    "gemma": _GATED_GROUPS,
    "gemma2": _GATED_GROUPS,
    "gemma3": _GATED_GROUPS,
    # Attention and feed-forward read the same normed input.
    "phi": [[*_ATTENTION, "mlp.fc1"], ["self_attn.dense"], ["mlp.fc2"]],
    "opt": _OPT_GROUPS,
    "opt with projections": _OPT_GROUPS,
}
BLOCKS = {name: "model.decoder.layers" if "opt" in name else "model.layers" for name in FAMILIES}
OTHERS = {
    "mistral": [["lm_head"]],
    "phi": [["lm_head"]],
    "opt with projections": [["model.decoder.project_in"], ["model.decoder.project_out"]],
}


def _expected_groups(family: str) -> list[set[str]]:
    layers = [
        {f"{BLOCKS[family]}.{number}.{name}" for name in group}
        for number in range(LAYERS)
        for group in GROUPS[family]
    ]
    return layers + [set(group) for group in OTHERS.get(family, [])]


def _save(config: PretrainedConfig, folder: Path, seed: int) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            # Fresh models have biases of zero, under which a lost bias would go unnoticed.
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random checkpoint of each of these families."""
    root = tmp_path_factory.mktemp("families")
    return {name: _save(config, root / name, seed) for seed, (name, config) in enumerate(FAMILIES.items())}


def _load(folder: Path, **options: Any) -> PreTrainedModel:
    config = BlindConfig(masking="reference", progress=False, **options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def _stock(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@dataclass(frozen=True)
class Pair:
    """A model with remote layers and the plain one; no test changes them."""

    family: str
    model: PreTrainedModel
    stock: PreTrainedModel


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Pair:
    folder = folders[request.param]
    return Pair(request.param, _load(folder).eval(), _stock(folder).eval())


def _remote(model: nn.Module) -> dict[str, RemoteLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, RemoteLinear)}


def _ids(rows: int = 2, tokens: int = 9) -> torch.Tensor:
    """Longer than the sliding windows, so that they matter."""
    return torch.randint(3, 99, (rows, tokens), generator=torch.Generator().manual_seed(0))


def test_every_frozen_linear_layer_is_remote_and_all_else_is_loaded(pair: Pair) -> None:
    model, stock = pair.model, pair.stock
    linear = {name for name, module in stock.named_modules() if isinstance(module, nn.Linear)}
    here = {"lm_head"} if stock.config.tie_word_embeddings else set()
    assert set(_remote(model)) == linear - here == set().union(*_expected_groups(pair.family))
    state, expected = model.state_dict(), stock.state_dict()
    assert set(expected) - set(state) == {f"{name}.weight" for name in _remote(model)}
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    biases = {name for name, module in stock.named_modules() if getattr(module, "bias", None) is not None}
    assert all((layer.bias is not None) == (name in biases) for name, layer in _remote(model).items())


def test_layers_that_read_the_same_tensor_share_a_request(pair: Pair) -> None:
    together: dict[int, set[str]] = {}
    for name, layer in _remote(pair.model).items():
        together.setdefault(id(layer._group), set()).add(name)
    expected = _expected_groups(pair.family)
    assert all(group in expected for group in together.values())
    assert len(together) == len(expected)


class Counting(ReferenceMultiplier):
    """Remembers what it was asked for."""

    asked: Sequence[Product] = ()

    def _ask(self, masked: MaskedOperand, product: Product, decode: Any) -> Any:
        self.asked = (*self.asked, product)
        return super()._ask(masked, product, decode)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_asks_for_each_group_once_in_each_direction(
    folders: dict[str, Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizer_module, "ReferenceMultiplier", Counting)
    model = _load(folders[family])
    multiplier = model.hf_quantizer.multiplier
    training_step(with_adapter(model, family), family)
    asked = Counter(multiplier.asked)
    planned = all_products(Checkpoint.open(folders[family]), "auto")
    assert set(asked) <= set(planned), "what is asked for is what hints are made of"
    assert set(asked.values()) == {1}
    forward = [x for x in asked if x.direction is Direction.FORWARD]
    assert len(forward) == len(_expected_groups(family)) == len(planned) // 2
    # The embedding is not trained, so the first group's input needs no gradient.
    assert len(asked) - len(forward) == len(forward) - 1


def test_the_outputs_are_those_of_the_plain_model_to_quantization_error(pair: Pair) -> None:
    with torch.no_grad():
        logits, plain = (m(input_ids=_ids()).logits for m in (pair.model, pair.stock))
    assert 0 < float((logits - plain).norm() / plain.norm()) < 0.05


def test_padding_and_position_are_those_of_the_plain_model(pair: Pair) -> None:
    mask = torch.ones_like(_ids())
    mask[0, :4] = 0
    with torch.no_grad():
        logits, plain = (
            m(input_ids=_ids(), attention_mask=mask).logits[mask.bool()] for m in (pair.model, pair.stock)
        )
    assert 0 < float((logits - plain).norm() / plain.norm()) < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_close_to_those_of_the_plain_model(
    folders: dict[str, Path], family: str
) -> None:
    private, plain = (
        training_step(with_adapter(model, family), family)
        for model in (_load(folders[family]), _stock(folders[family]))
    )
    assert private.keys() == plain.keys() and len(plain) > 10
    loss, expected = (float(np.frombuffer(x["loss"], np.float32)[0]) for x in (private, plain))
    assert loss == pytest.approx(expected, rel=0.02)
    a, b = (
        np.concatenate([np.frombuffer(x[name], np.float32) for name in plain if name != "loss"])
        for x in (private, plain)
    )
    assert 0 < np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b)


def test_generating_with_a_cache_gives_what_the_whole_sequence_gives(pair: Pair) -> None:
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    mask = torch.ones_like(_ids())
    cached, whole = (
        pair.model.generate(_ids(), attention_mask=mask, use_cache=use_cache, **options)
        for use_cache in (True, False)
    )
    assert cached.shape == (2, 14)
    assert torch.equal(cached, whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kit_gives_the_same_layers_as_the_checkpoint(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(folders[family])
    kit = prepare(checkpoint, tmp_path / "kit")
    remote = {layer.name for layer in checkpoint.layers if not layer.tied}
    assert {f"{name}.weight" for name in set().union(*_expected_groups(family))} == remote
    assert remote <= set(kit.layers)


# Mixtures of experts.

_SPARSE = _GATED | {"tie_word_embeddings": False}
EXPERTS: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**_SPARSE, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(
        **_SPARSE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random checkpoints of mixtures of experts."""
    root = tmp_path_factory.mktemp("experts")
    return {name: _save(config, root / name, seed) for seed, (name, config) in enumerate(EXPERTS.items())}


@pytest.mark.parametrize("family", EXPERTS)
def test_a_mixture_of_experts_is_refused_and_the_reason_given(
    sparse: dict[str, Path], family: str, kit_cache: Path
) -> None:
    before = sorted(kit_cache.rglob("*"))
    for attempt in (Checkpoint.open, _load):
        with pytest.raises(UnsupportedError) as caught:
            attempt(sparse[family])
        assert f"{family} is a mixture of experts (num_" in str(caught.value)
        assert "experts = 4): which expert is asked would show the workers how tokens are routed" in str(
            caught.value
        )
        assert "Use a dense model" in str(caught.value)
    assert sorted(kit_cache.rglob("*")) == before, "nothing is prepared for it"


# Configurations as these families define them, with experts wherever the family puts their number.
OTHER_EXPERTS = [
    "AriaTextConfig",
    "DbrxConfig",
    "DeepseekV2Config",
    "DeepseekV3Config",
    "Ernie4_5_MoeConfig",
    "Glm4MoeConfig",
    "GptOssConfig",
    "GraniteMoeConfig",
    "JambaConfig",
    "JetMoeConfig",
    "Llama4TextConfig",
    "MiniMaxConfig",
    "OlmoeConfig",
    "PhimoeConfig",
    "Qwen2MoeConfig",
    "Qwen3NextConfig",
]


@pytest.mark.parametrize("name", OTHER_EXPERTS)
def test_other_mixtures_of_experts_are_refused_too(name: str, tmp_path: Path) -> None:
    cls = getattr(transformers, name, None)
    if cls is None:
        pytest.skip(f"this transformers has no {name}")
    cls().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="is a mixture of experts"):
        Checkpoint.open(tmp_path)
