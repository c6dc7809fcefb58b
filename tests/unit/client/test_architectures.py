"""Architectures that are built in other ways than most: right on remote layers, or refused with the reason.

The smallest form of `benchmarks/compatibility/families.py`, whose table is in docs/families.md.
"""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, PretrainedConfig, PreTrainedModel

from benchmarks.compatibility.families import try_model
from blindtune.checkpoint import Checkpoint
from blindtune.checkpoint.skeleton import require_supported
from blindtune.checkpoint.trace import trace
from blindtune.client import BlindConfig, Operator
from blindtune.client.kit.kit import Kit, file_sha256
from blindtune.client.kit.prepare import prepare
from blindtune.client.model.quantizer import BlindQuantizer
from blindtune.client.model.remote_linear import RemoteLinear
from blindtune.errors import KitError, UnsupportedError

pytestmark = pytest.mark.hf

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
}
_SIZES |= {"num_hidden_layers": 2}

# What each of them needs, and the requests of a forward pass.
RIGHT = {
    "MambaForCausalLM": 6,  # its code reads the weight of dt_proj
    "SiglipForImageClassification": 10,  # its initializers draw from the shape of a weight
    "T5ForConditionalGeneration": 21,  # a decoder, whose cross-attention reads what the encoder gives
}
_SLOW = {
    "LongformerForMaskedLM": 8,  # pads its input, whose values it looks at
    "ViTForImageClassification": 8,  # reads pictures
    "BartForConditionalGeneration": 21,
    "WhisperForConditionalGeneration": 21,
    "WavLMForSequenceClassification": 7,
    "FunnelForMaskedLM": None,
    "RwkvForCausalLM": None,
    "CLIPModel": None,
}


@pytest.mark.parametrize(
    ("name", "requests"),
    [*RIGHT.items(), *(pytest.param(*x, marks=pytest.mark.slow) for x in _SLOW.items())],
)
def test_it_computes_what_the_plain_model_does_with_the_fewest_requests(
    name: str, requests: int | None, tmp_path: Path
) -> None:
    result = try_model(name, name, tmp_path)
    assert (result.outcome, result.note) == ("right", "")
    assert 0 < result.possible <= result.requests <= result.possible + (name == "FunnelForMaskedLM")
    assert requests in (None, result.requests)
    assert result.error < 1e-4


def _saved(name: str, folder: Path, **settings: Any) -> type[PreTrainedModel]:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    cls(cls.config_class(**_SIZES | settings)).save_pretrained(folder)
    return cls


def _load(cls: type[PreTrainedModel], folder: Path, **options: Any) -> PreTrainedModel:
    config = BlindConfig(masking="reference", progress=False, **options)
    return cls.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()


def test_layers_whose_weight_the_model_reads_are_no_frozen_layers_on_either_side(tmp_path: Path) -> None:
    cls = _saved("MambaForCausalLM", tmp_path, state_size=4)
    read = {f"backbone.layers.{i}.mixer.dt_proj" for i in range(2)}
    assert trace(cls, cls.config_class.from_pretrained(tmp_path)).read == read
    names = {x.name for x in Checkpoint.open(tmp_path).layers}
    assert not names & {f"{x}.weight" for x in read} and "backbone.layers.0.mixer.in_proj.weight" in names
    remote = {n for n, m in _load(cls, tmp_path).named_modules() if isinstance(m, RemoteLinear)}
    assert remote and not remote & read


def test_tiny_coefficients_are_not_worth_a_request(tmp_path: Path) -> None:
    _saved("MambaForCausalLM", tmp_path, state_size=1, time_step_rank=1)
    assert "backbone.layers.0.mixer.x_proj.weight" not in {x.name for x in Checkpoint.open(tmp_path).layers}


@pytest.mark.parametrize("head", ["remote", "local"])
def test_a_tied_head_with_a_bias_of_its_own_is_right_on_either_side(head: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    stock = BertForMaskedLM(BertConfig(**_SIZES)).eval()
    torch.nn.init.normal_(stock.cls.predictions.bias)
    stock.save_pretrained(tmp_path)
    model = _load(BertForMaskedLM, tmp_path, head=head)
    assert isinstance(model.get_output_embeddings(), RemoteLinear) == (head == "remote")
    ids = torch.arange(5)[None]
    with torch.no_grad():
        logits, expected = model(ids).logits, stock(ids).logits
    assert float((logits - expected).norm()) < 0.02 * float(expected.norm())


@pytest.mark.parametrize(
    ("name", "settings", "share"),
    [
        # Its keys and values are too small, so that the queries stored with them stay here, too.
        ("Molmo2TextModel", {"head_dim": 4, "num_key_value_heads": 1}, "stores joined with others"),
        ("MambaForCausalLM", {"state_size": 4}, "layers whose weight the model's own code reads"),
    ],
)
def test_what_the_client_computes_itself_is_said(
    name: str, settings: dict[str, Any], share: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _load(_saved(name, tmp_path, **settings), tmp_path)
    (said,) = [r.getMessage() for r in caplog.records if r.name == "blindtune.client.model.kept"]
    assert "% of the frozen weights are computed here" in said and share in said


def test_nothing_is_said_where_all_is_remote(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _load(_saved("LlamaForCausalLM", tmp_path, num_key_value_heads=2), tmp_path)
    assert not [r for r in caplog.records if r.name == "blindtune.client.model.kept"]
    assert logging.getLogger("blindtune.client.model.kept").isEnabledFor(logging.WARNING)


_DEEPSEEK = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}


@pytest.mark.parametrize(
    ("name", "dense", "sparse"),
    [
        ("DogeConfig", {"is_moe": False}, {"is_moe": True}),
        (
            "DeepseekV3Config",
            _DEEPSEEK | {"first_k_dense_replace": 2},
            _DEEPSEEK | {"first_k_dense_replace": 1},
        ),
        (
            "NemotronHConfig",
            {"layers_block_type": ["mamba", "attention"]},
            {"layers_block_type": ["mamba", "moe"]},
        ),
    ],
)
def test_a_dense_model_of_a_family_that_has_experts_is_served(
    name: str, dense: dict[str, Any], sparse: dict[str, Any]
) -> None:
    cls: type[PretrainedConfig] = getattr(transformers, name)
    require_supported(cls(**_SIZES | dense))
    with pytest.raises(UnsupportedError, match="is a mixture of experts"):
        require_supported(cls(**_SIZES | sparse))


def test_a_kit_that_lacks_a_weight_which_stays_here_is_refused(tmp_path: Path) -> None:
    """As kits do that were made when the layer was remote: its weight would be drawn at random."""
    cls = _saved("MambaForCausalLM", tmp_path / "model", state_size=4)
    kit = prepare(Checkpoint.open(tmp_path / "model"), tmp_path / "kit")
    path = tmp_path / "kit" / "model.safetensors"
    key = "backbone.layers.0.mixer.dt_proj.weight"
    tensors = load_file(path)
    layers = kit.layers | {key: kit.layers["backbone.layers.0.mixer.in_proj.weight"]}
    save_file({name: x for name, x in tensors.items() if name != key}, path, {"format": "pt"})
    files = kit.description.files | {path.name: file_sha256(path)}
    description = kit.description.model_copy(update={"layers": layers, "files": files, "keyed_digest": ""})
    secret = (tmp_path / "kit" / "blindtune" / "verification.key").read_bytes()
    described = description.model_copy(update={"keyed_digest": description.digest(secret)})
    (tmp_path / "kit" / "blindtune" / "kit.json").write_text(described.model_dump_json())
    config = BlindConfig(operators=_NOWHERE, progress=False, insecure=True, allow_one_machine=True)
    with torch.device("meta"):
        model = cls(cls.config_class.from_pretrained(tmp_path / "kit"))
    with pytest.raises(KitError, match=rf"lacks {key}, which the client multiplies by: make it again"):
        BlindQuantizer(config)._remote_layers(
            model, tmp_path / "kit", Kit.open(tmp_path / "kit"), set(tensors) - {key}
        )


_NOWHERE = [Operator("alpha", ["127.0.0.1:1"]), Operator("beta", ["127.0.0.2:1"])]
