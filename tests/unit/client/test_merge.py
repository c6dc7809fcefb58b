"""Merging: the merged checkpoint is the tuned model, made with little memory, or nothing is written."""

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.assets import asset, minilm
from support.checkpoints import CLASSES, batch, save_checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedModel,
)

from blindtune.checkpoint.files import TensorFiles
from blindtune.client.merge.checkpoint import Merged, merge
from blindtune.errors import BlindtuneError, CheckpointError, ConfigurationError, UnsupportedError

pytestmark = pytest.mark.hf

LABELS = ["breach", "notice", "term"]
SHARD = "20KB"


def _trained(model: PreTrainedModel, folder: Path, **lora: Any) -> Path:
    """Writes an adapter in which everything that can be trained has been."""
    task = "SEQ_CLS" if "Classification" in type(model).__name__ else "CAUSAL_LM"
    peft = get_peft_model(
        model, LoraConfig(**{"task_type": task, "r": 4, "target_modules": "all-linear"} | lora)
    )
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    peft.save_pretrained(folder)
    return folder


def _adapter(family: str, base: Path, folder: Path, **lora: Any) -> Path:
    torch.manual_seed(11)
    return _trained(CLASSES[family].from_pretrained(base, dtype=torch.float32), folder, **lora)


def _peft(family: str, base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    return PeftModel.from_pretrained(CLASSES[family].from_pretrained(base, dtype=dtype), adapter).eval()


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    with TensorFiles(folder) as tensors:
        return {key: tensors.get(key).clone() for key in tensors}


@torch.no_grad()
def _logits(model: Any, family: str) -> torch.Tensor:
    inputs = batch(family)
    del inputs["labels"]
    return model.eval()(**inputs).logits


def _labels(family: str) -> list[str]:
    return LABELS if family == "bert" else []


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3", "gpt2", "bert"])
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True, "lora_alpha": 5},
        {"rank_pattern": {"k_proj|c_attn|key": 7}, "alpha_pattern": {"v_proj|c_proj|value": 3}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_the_merged_checkpoint_is_bit_for_bit_what_peft_merges(
    checkpoints: dict[str, Path], tmp_path: Path, family: str, lora: dict[str, Any]
) -> None:
    base = checkpoints[family]
    adapter = _adapter(family, base, tmp_path / "adapter", **lora)
    result = merge(adapter, base, tmp_path / "out", labels=_labels(family))
    _peft(family, base, adapter).merge_and_unload().save_pretrained(tmp_path / "expected")
    merged, expected = _tensors(tmp_path / "out"), _tensors(tmp_path / "expected")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[key], expected[key]) for key in merged)
    changed = sum(not torch.equal(merged[key], x) for key, x in _tensors(base).items())
    assert result.layers + result.replaced == changed
    assert result.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("family", "lora", "tied"),
    [
        ("llama_tied", {"target_modules": ["lm_head", "q_proj"]}, False),
        ("llama_tied", {"target_modules": ["embed_tokens", "q_proj"]}, False),
        ("llama_tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
        ("llama_tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
        (
            "llama_tied",
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
            True,
        ),
        ("llama_tied", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
        ("gpt2", {"target_modules": ["c_attn", "lm_head"]}, False),
        ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}, True),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "bias": "lora_only"}, True),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "lora_bias": True}, True),
        ("llama", {"target_modules": ["embed_tokens", "lm_head"]}, False),
        ("llama", {"layers_to_transform": [1], "target_modules": ["q_proj"]}, False),
        ("bert", {"bias": "all"}, True),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_stock_model_loads_it_and_answers_as_the_adapter_does(
    checkpoints: dict[str, Path], tmp_path: Path, family: str, lora: dict[str, Any], tied: bool
) -> None:
    base = checkpoints[family]
    adapter = _adapter(family, base, tmp_path / "adapter", **lora)
    merge(adapter, base, tmp_path / "out", labels=_labels(family))
    auto = AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM
    model, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.tie_word_embeddings == tied
    expected = _logits(_peft(family, base, adapter), family)
    assert torch.allclose(_logits(model, family), expected, atol=1e-5)
    assert not torch.allclose(_logits(CLASSES[family].from_pretrained(base), family), expected, atol=1e-2)


@pytest.mark.parametrize("ensure", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_a_base_that_stores_a_tied_head_twice_keeps_no_stale_copy(
    checkpoints: dict[str, Path], tmp_path: Path, ensure: bool
) -> None:
    base = shutil.copytree(checkpoints["llama_tied"], tmp_path / "base")
    embedding = "model.embed_tokens.weight"
    _edit(base / "model.safetensors", lambda x: x.update({"lm_head.weight": x[embedding].clone()}))
    lora = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": ensure}
    adapter = _adapter("llama_tied", base, tmp_path / "adapter", **lora)
    merge(adapter, base, tmp_path / "out")
    assert ("lm_head.weight" in _tensors(tmp_path / "out")) != ensure
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.tie_word_embeddings == ensure
    expected = _logits(_peft("llama_tied", base, adapter), "llama_tied")
    assert torch.allclose(_logits(model, "llama_tied"), expected, atol=1e-5)


def _sharded(base: Path, folder: Path, family: str = "llama") -> Path:
    CLASSES[family].from_pretrained(base).save_pretrained(folder, max_shard_size=SHARD)
    return folder


def test_a_sharded_base_gives_the_same_shards_with_the_same_tensors(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    base = _sharded(checkpoints["llama"], tmp_path / "base")
    adapter = _adapter("llama", base, tmp_path / "adapter")
    seen = []
    result = merge(
        adapter, base, tmp_path / "out", progress=lambda names: (seen.append(name) or name for name in names)
    )
    merge(adapter, checkpoints["llama"], tmp_path / "whole")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 3
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == shards == sorted(seen)
    assert result.shards == len(shards)
    for name in shards:
        assert load_file(base / name).keys() == load_file(tmp_path / "out" / name).keys()
    before, after = (
        json.loads((x / "model.safetensors.index.json").read_text()) for x in (base, tmp_path / "out")
    )
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"]
    one, other = _tensors(tmp_path / "out"), _tensors(tmp_path / "whole")
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_pickled_shards_become_safetensors(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(_sharded(checkpoints["gpt2"], tmp_path / "shards", "gpt2"), tmp_path / "base")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    for path in base.glob("*.safetensors"):
        name = path.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(load_file(path), base / name)
        index["weight_map"] = {k: name if v == path.name else v for k, v in index["weight_map"].items()}
        path.unlink()
    (base / "model.safetensors.index.json").unlink()
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    adapter = _adapter("gpt2", base, tmp_path / "adapter")
    merge(adapter, base, tmp_path / "out")
    merge(adapter, tmp_path / "shards", tmp_path / "expected")
    for path in (tmp_path / "expected").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_deltas_are_added_in_float32_and_rounded_once_to_the_base_type(tmp_path: Path) -> None:
    base = save_checkpoint("llama", tmp_path / "base", dtype=torch.bfloat16)
    adapter = _adapter("llama", base, tmp_path / "adapter")
    merge(adapter, base, tmp_path / "out")
    merge(adapter, base, tmp_path / "wide", dtype=torch.float32)
    exact = _peft("llama", base, adapter).merge_and_unload().state_dict()  # the base in float32
    merged, wide = _tensors(tmp_path / "out"), _tensors(tmp_path / "wide")
    for key, value in exact.items():
        assert torch.equal(wide[key], value)
        assert torch.equal(merged[key], value.to(torch.bfloat16))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    assert model.dtype == torch.float32
    assert torch.allclose(_logits(model, "llama"), _logits(_peft("llama", base, adapter), "llama"), atol=1e-5)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_an_adapter_in_half_precision_is_multiplied_out_in_float32(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    adapter = _adapter("llama", checkpoints["llama"], tmp_path / "adapter")
    half = shutil.copytree(adapter, tmp_path / "half")
    weights = {
        key: x.to(torch.bfloat16) for key, x in load_file(adapter / "adapter_model.safetensors").items()
    }
    save_file(weights, half / "adapter_model.safetensors")
    rounded = {key: x.to(torch.float32) for key, x in weights.items()}
    save_file(rounded, adapter / "adapter_model.safetensors")
    for name in ("adapter", "half"):
        merge(tmp_path / name, checkpoints["llama"], tmp_path / f"{name} out")
    files = [(tmp_path / f"{name} out" / "model.safetensors").read_bytes() for name in ("adapter", "half")]
    assert files[0] == files[1]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_never_more_than_one_tensor_of_the_base_is_held(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    read = TensorFiles.get
    alive: list[weakref.ref[torch.Tensor]] = []
    reads = []

    def get(self: TensorFiles, key: str) -> torch.Tensor:
        assert not [x for x in alive if x() is not None], f"another tensor is still held when {key} is read"
        tensor = read(self, key).clone()
        alive.append(weakref.ref(tensor))
        reads.append(key)
        return tensor

    adapter = _adapter(family, checkpoints[family], tmp_path / "adapter")
    monkeypatch.setattr(TensorFiles, "get", get)
    merge(adapter, checkpoints[family], tmp_path / "out", labels=_labels(family))
    with TensorFiles(checkpoints[family]) as tensors:
        assert set(reads) == set(tensors)


def _encoder(folder: Path) -> Path:
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_a_classifier_on_a_bare_encoder_is_whole_with_its_labels(tmp_path: Path) -> None:
    base = _encoder(tmp_path / "base")
    assert "encoder.layer.0.output.dense.weight" in _tensors(base)
    _check_classifier(base, tmp_path, lambda: batch("bert"))


def test_all_minilm_becomes_a_classifier(tmp_path: Path) -> None:
    base = minilm()
    _check_classifier(
        base, tmp_path, lambda: AutoTokenizer.from_pretrained(base)(["a clause"], return_tensors="pt")
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a clause") == AutoTokenizer.from_pretrained(base)(
        "a clause"
    )


def _check_classifier(base: Path, tmp_path: Path, inputs: Callable[[], Any]) -> None:
    original = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(LABELS))
    adapter = _trained(original, tmp_path / "adapter")
    result = merge(adapter, base, tmp_path / "out", labels=LABELS)
    assert result.replaced == 2
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    # Position numbers, which the released checkpoint still holds, are no parameters.
    assert {key for values in info.values() for key in values} <= {"embeddings.position_ids"}
    # As save_pretrained names them: other readers take no mixture of keys with and without a prefix.
    assert _tensors(tmp_path / "out").keys() - {"embeddings.position_ids"} == model.state_dict().keys()
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.label2id == {label: i for i, label in enumerate(LABELS)}
    assert model.config.architectures == ["BertForSequenceClassification"]
    x = {key: value for key, value in inputs().items() if key != "labels"}
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(LABELS))
    with torch.no_grad():
        expected = PeftModel.from_pretrained(fresh, adapter).eval()(**x).logits
        assert torch.allclose(model.eval()(**x).logits, expected, atol=1e-5)


def test_a_classifier_on_a_language_model_leaves_the_old_head_out(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    base = checkpoints["llama"]
    original = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    adapter = _trained(original, tmp_path / "adapter")
    merge(adapter, base, tmp_path / "out", labels=LABELS)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values()), info
    assert "lm_head.weight" not in _tensors(tmp_path / "out")
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    expected = _logits(PeftModel.from_pretrained(fresh, adapter), "llama")
    assert torch.allclose(_logits(model, "llama"), expected, atol=1e-5)


def test_a_released_language_model_comes_with_its_tokenizer_and_template(tmp_path: Path) -> None:
    base = asset("models/tiny-llama")
    adapter = _trained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    merge(adapter, base, tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "mine"}], tokenize=False) == "mine"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config is not None


def test_the_tokenizer_beside_the_adapter_wins_even_over_files_that_only_the_base_has(tmp_path: Path) -> None:
    base = shutil.copytree(asset("models/tiny-llama"), tmp_path / "base")
    (base / "special_tokens_map.json").write_text(json.dumps({"pad_token": "stale"}))
    adapter = _trained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(asset("models/tiny-llama"))
    tokenizer.pad_token = "<mine>"
    tokenizer.save_pretrained(adapter)
    merge(adapter, base, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token == "<mine>"


@pytest.fixture
def llama_adapter(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    return _adapter("llama", checkpoints["llama"], tmp_path / "adapter")


def _refused(
    tmp_path: Path, error: type[BlindtuneError], match: str, merging: Callable[[Path], Merged]
) -> None:
    """Checks that nothing is written, the temporary folder included."""
    before = set(tmp_path.iterdir())
    with pytest.raises(error, match=match):
        merging(tmp_path / "out")
    assert set(tmp_path.iterdir()) == before


def test_a_folder_without_an_adapter_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base = checkpoints["llama"]
    _refused(tmp_path, ConfigurationError, "adapter_config.json", lambda out: merge(base, base, out))


def test_a_damaged_adapter_is_refused(
    checkpoints: dict[str, Path], llama_adapter: Path, tmp_path: Path
) -> None:
    base = checkpoints["llama"]
    weights = llama_adapter / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-9])
    _refused(tmp_path, CheckpointError, "cannot be read", lambda out: merge(llama_adapter, base, out))
    weights.write_bytes(content)
    (llama_adapter / "adapter_config.json").write_text("{")
    _refused(
        tmp_path, CheckpointError, "no adapter configuration", lambda out: merge(llama_adapter, base, out)
    )


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("PREFIX_TUNING", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        ("LOHA", LoHaConfig(r=2, target_modules=["q_proj"])),
        ("LOKR", LoKrConfig(r=2, target_modules=["q_proj"])),
    ],
)
def test_an_adapter_that_is_not_lora_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path, kind: str, config: Any
) -> None:
    base = checkpoints["llama"]
    get_peft_model(CLASSES["llama"].from_pretrained(base), config).save_pretrained(tmp_path / "other")
    match = f"{kind} .*merge_and_unload"
    _refused(tmp_path, UnsupportedError, match, lambda out: merge(tmp_path / "other", base, out))


@pytest.mark.parametrize(
    ("lora", "match"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, "target_parameters"),
    ],
)
def test_an_adapter_that_is_more_than_a_product_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path, lora: dict[str, Any], match: str
) -> None:
    base = checkpoints["llama"]
    adapter = _adapter("llama", base, tmp_path / "adapter", **lora)
    _refused(tmp_path, UnsupportedError, match, lambda out: merge(adapter, base, out))


def _edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


QUERY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: x.update({QUERY: torch.ones(4, 40)}), r"layers.1.self_attn.q_proj.*\(4, 40\).*\(4, 32\)"),
        (lambda x: x.pop(QUERY), r"lacks model.layers.1.self_attn.q_proj.lora_A.weight.*\(4, 32\)"),
        (
            lambda x: x.update({QUERY.replace("layers.1", "layers.7"): torch.ones(4, 32)}),
            r"layers.7.self_attn.q_proj.*\(4, 32\)",
        ),
        (lambda x: x[QUERY].fill_(torch.nan), "layers.1.self_attn.q_proj.weight is not finite"),
    ],
    ids=["shape", "missing", "too many", "diverged"],
)
def test_an_adapter_that_does_not_fit_is_refused_by_layer_and_shape(
    checkpoints: dict[str, Path], llama_adapter: Path, tmp_path: Path, change: Any, match: str
) -> None:
    _edit(llama_adapter / "adapter_model.safetensors", change)
    base = checkpoints["llama"]
    _refused(tmp_path, CheckpointError, match, lambda out: merge(llama_adapter, base, out))


@pytest.mark.parametrize("other", ["gpt2", "bert"])
def test_an_adapter_of_another_family_is_refused(
    checkpoints: dict[str, Path], llama_adapter: Path, tmp_path: Path, other: str
) -> None:
    base = checkpoints[other]
    _refused(
        tmp_path, CheckpointError, "does not fit|another model", lambda out: merge(llama_adapter, base, out)
    )


def test_a_base_whose_weights_contradict_its_configuration_is_refused(
    checkpoints: dict[str, Path], llama_adapter: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(checkpoints["llama"], tmp_path / "base")
    key = "model.layers.0.mlp.up_proj.weight"
    _edit(base / "model.safetensors", lambda x: x.update({key: torch.ones(3, 32)}))
    match = rf"{key}.*\(3, 32\).*\(48, 32\)"
    _refused(tmp_path, CheckpointError, match, lambda out: merge(llama_adapter, base, out))


def test_a_base_that_lacks_a_tuned_weight_is_refused(
    checkpoints: dict[str, Path], llama_adapter: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(checkpoints["llama"], tmp_path / "base")
    key = "model.layers.0.mlp.up_proj.weight"
    _edit(base / "model.safetensors", lambda x: x.pop(key))
    _refused(tmp_path, CheckpointError, f"{key}.*does not store", lambda out: merge(llama_adapter, base, out))


def test_a_quantized_base_is_refused(
    checkpoints: dict[str, Path], llama_adapter: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(checkpoints["llama"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(config))
    _refused(tmp_path, UnsupportedError, "already quantized", lambda out: merge(llama_adapter, base, out))


def test_labels_that_contradict_the_adapter_are_refused(
    checkpoints: dict[str, Path], llama_adapter: Path, tmp_path: Path
) -> None:
    bert = checkpoints["bert"]
    adapter = _adapter("bert", bert, tmp_path / "classifier")
    _refused(
        tmp_path,
        CheckpointError,
        r"classifier.*\(3.*\(2.*label",
        lambda out: merge(adapter, bert, out, labels="ab"),
    )
    _refused(tmp_path, ConfigurationError, "twice", lambda out: merge(adapter, bert, out, labels="aba"))
    _refused(
        tmp_path,
        ConfigurationError,
        "CAUSAL_LM",
        lambda out: merge(llama_adapter, checkpoints["llama"], out, labels=LABELS),
    )


def test_weights_are_not_stored_as_integers(
    checkpoints: dict[str, Path], llama_adapter: Path, tmp_path: Path
) -> None:
    base = checkpoints["llama"]
    _refused(
        tmp_path, ConfigurationError, "int8", lambda out: merge(llama_adapter, base, out, dtype=torch.int8)
    )


def test_an_output_folder_with_files_in_it_is_refused_and_left_alone(
    checkpoints: dict[str, Path], llama_adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="not empty"):
        merge(llama_adapter, checkpoints["llama"], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_an_interrupted_merge_leaves_nothing(
    checkpoints: dict[str, Path], llama_adapter: Path, tmp_path: Path
) -> None:
    base = _sharded(checkpoints["llama"], tmp_path / "base")

    def interrupted(names: Any) -> Any:
        yield next(iter(names))
        raise KeyboardInterrupt

    before = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        merge(llama_adapter, base, tmp_path / "out", progress=interrupted)
    assert set(tmp_path.iterdir()) == before


def test_the_weight_file_is_named_as_pytorch_s_for_those_who_ask(
    checkpoints: dict[str, Path], llama_adapter: Path, tmp_path: Path
) -> None:
    merge(llama_adapter, checkpoints["llama"], tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_classifier_whose_random_head_was_never_trained_is_refused(tmp_path: Path) -> None:
    base = _encoder(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    adapter = _trained(model, tmp_path / "adapter", task_type=None, target_modules=["query"])
    _refused(
        tmp_path,
        CheckpointError,
        "classifier.weight.*modules_to_save",
        lambda out: merge(adapter, base, out, labels=LABELS),
    )


def test_a_pooler_that_was_random_in_training_is_refused(tmp_path: Path) -> None:
    model = BertModel(BertConfig.from_pretrained(_encoder(tmp_path / "base")), add_pooling_layer=False)
    model.save_pretrained(tmp_path / "base")
    base = tmp_path / "base"
    original = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    adapter = _trained(original, tmp_path / "adapter", target_modules=["query"])
    match = "bert.pooler.dense.weight.*modules_to_save"
    _refused(tmp_path, CheckpointError, match, lambda out: merge(adapter, base, out, labels=LABELS))
