"""A model with remote layers inside transformers and peft: what works as usual, and what is refused.

The layers compute in this process (masking "reference"), which is what shares equal bit for bit.
"""

import copy
import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.checkpoints import CLASSES, FAMILIES, batch
from support.training import training_step, with_adapter
from torch import nn
from transformers import LlamaConfig, PhiConfig, PhiForCausalLM, PreTrainedModel

from blindtune.checkpoint import Checkpoint
from blindtune.client import BlindConfig, multiplier_of
from blindtune.client.kit.groups import trace_groups
from blindtune.client.kit.prepare import prepare
from blindtune.client.model.remote_linear import RemoteLinear
from blindtune.errors import BlindtuneError, ConfigurationError, UnsupportedError

pytestmark = pytest.mark.hf

Load = Callable[..., PreTrainedModel]
CAUSAL = ["llama", "llama_tied", "qwen3", "gpt2"]
FROZEN = {"llama": 15, "llama_tied": 14, "qwen3": 15, "gpt2": 8, "bert": 13}


def _remote(model: nn.Module) -> dict[str, RemoteLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, RemoteLinear)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_frozen_linear_layer_is_remote_and_all_else_is_loaded(
    load: Load, checkpoints: dict[str, Path], family: str
) -> None:
    model = load(family, masking="reference")
    stock = CLASSES[family].from_pretrained(checkpoints[family])
    assert len(_remote(model)) == FROZEN[family]
    state = model.state_dict()
    missing = set(stock.state_dict()) - set(state)
    assert missing == {f"{name}.weight" for name in _remote(model)}
    assert all(torch.equal(value, stock.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_outputs_are_those_of_the_plain_model_to_quantization_error(
    load: Load, checkpoints: dict[str, Path], family: str
) -> None:
    model, stock = load(family, masking="reference"), CLASSES[family].from_pretrained(checkpoints[family])
    with torch.no_grad():
        logits, plain = (m.eval()(**batch(family)).logits for m in (model, stock))
    error = float((logits - plain).norm() / plain.norm())
    assert 0 < error < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_one_row_gives_that_row_of_a_larger_batch(load: Load, family: str) -> None:
    model = load(family, masking="reference").eval()
    inputs = {k: v for k, v in batch(family, rows=3).items() if k != "labels"}
    with torch.no_grad():
        together = model(**inputs).logits
        alone = model(**{name: value[1:2] for name, value in inputs.items()}).logits
    torch.testing.assert_close(alone[0], together[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "group"),
    [
        ("llama", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("llama", ["mlp.gate_proj", "mlp.up_proj"]),
        ("qwen3", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("gpt2", ["attn.c_attn"]),
        ("bert", ["attention.self.query", "attention.self.key", "attention.self.value"]),
    ],
)
def test_layers_that_read_the_same_tensor_share_a_request(load: Load, family: str, group: list[str]) -> None:
    remote = _remote(load(family, masking="reference"))
    first = next(name for name in remote if name.endswith(group[0]) and ".0." in name)
    prefix = first.removesuffix(group[0])
    together = {name for name, layer in remote.items() if layer._group is remote[first]._group}
    assert together == {prefix + name for name in group}


def test_groups_come_from_the_model_and_not_from_names() -> None:
    """In Phi, the first layer of the feed-forward block reads what attention reads."""
    config = PhiConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    layer = "model.layers.0"
    names = [f"{layer}.{x}" for x in ("self_attn.dense", "mlp.fc2", "mlp.fc1")]
    names += [f"{layer}.self_attn.{x}_proj" for x in "qkv"]
    groups = trace_groups(PhiForCausalLM, config, names)
    assert sorted(name for group in groups for name in group) == sorted(names)
    (largest,) = [group for group in groups if len(group) > 1]
    assert set(largest) == {f"{layer}.mlp.fc1", *(f"{layer}.self_attn.{x}_proj" for x in "qkv")}


def test_a_model_that_cannot_be_traced_is_asked_layer_by_layer(caplog: pytest.LogCaptureFixture) -> None:
    class Whole(CLASSES["llama"]):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> None:
            raise NotImplementedError("needs an image")

    class Untraceable(Whole):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.model.forward = self.forward

    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    assert trace_groups(Whole, FAMILIES["llama"][1], names) == [names], (
        "the language model in it can be traced"
    )
    assert trace_groups(Untraceable, FAMILIES["llama"][1], names) == [[name] for name in names]
    assert "cannot trace Untraceable" in caplog.text and "2 of 2 are asked for one by one" in caplog.text


@pytest.mark.parametrize("family", CAUSAL)
def test_a_head_that_is_tied_to_the_embedding_stays_here_and_any_other_goes(load: Load, family: str) -> None:
    head = load(family, masking="reference").get_output_embeddings()
    tied = FAMILIES[family][1].tie_word_embeddings
    assert isinstance(head, RemoteLinear) == (not tied)


@pytest.mark.parametrize("family", CAUSAL)
def test_a_remote_head_answers_as_the_local_one_and_leaves_the_embedding_alone(
    load: Load, family: str
) -> None:
    remote, local = (load(family, masking="reference", head=head).eval() for head in ("remote", "local"))
    assert isinstance(remote.get_output_embeddings(), RemoteLinear)
    assert not isinstance(local.get_output_embeddings(), RemoteLinear)
    embeddings = [model.get_input_embeddings().weight for model in (remote, local)]
    assert torch.equal(*embeddings)
    with torch.no_grad():
        a, b = (model(**batch(family)).logits for model in (remote, local))
    assert float((a - b).norm() / b.norm()) < 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient_and_warns_once(
    load: Load, caplog: pytest.LogCaptureFixture, family: str
) -> None:
    plain = training_step(with_adapter(load(family, masking="reference"), family), family)
    assert "gradient checkpointing" not in caplog.text
    model = load(family, masking="reference")
    model.gradient_checkpointing_enable()
    wrapped = with_adapter(model, family)
    assert training_step(wrapped, family) == plain
    assert training_step(wrapped, family) == plain
    warnings = [r for r in caplog.records if r.name == "blindtune.client.model.guard"]
    assert [r.levelno for r in warnings] == [logging.WARNING]
    assert "gradient checkpointing is on" in warnings[0].getMessage()


def test_inference_does_not_warn_about_training(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    model = load("llama", masking="reference")
    model.gradient_checkpointing_enable()
    with torch.no_grad():
        model.train()(**batch("llama"))
    model.eval()(**batch("llama"))
    assert not [r for r in caplog.records if r.name == "blindtune.client.model.guard"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_logits_do_not_depend_on_gradients_being_recorded(
    load: Load, mode: Callable[[], torch.no_grad]
) -> None:
    model = load("llama", masking="reference").eval()
    expected = model(**batch("llama")).logits.detach()
    with mode():
        assert torch.equal(model(**batch("llama")).logits, expected)


def test_a_bf16_model_trains_in_bf16(load: Load) -> None:
    model = with_adapter(load("llama", masking="reference", dtype=torch.bfloat16), "llama")
    output = model(**batch("llama"))
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_autocast_trains_a_float32_model_in_bf16(load: Load) -> None:
    model = with_adapter(load("llama", masking="reference"), "llama")
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch("llama"))
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad
    )


def test_an_fp16_model_is_refused(load: Load) -> None:
    with pytest.raises(
        UnsupportedError, match="fp16 is not supported: load the model with dtype=torch.bfloat16"
    ):
        load("llama", masking="reference", dtype=torch.float16)


def test_fp16_mixed_precision_is_refused(load: Load) -> None:
    model = load("llama", masking="reference")
    with torch.autocast("cpu", torch.float16), pytest.raises(UnsupportedError, match="use bf16=True"):
        model(**batch("llama"))


def test_a_diverged_model_stops_with_advice(load: Load) -> None:
    model = load("llama", masking="reference")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(UnsupportedError, match="not finite.*lower the learning rate"):
        model(**batch("llama"))


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "with an adapter"])
def test_a_copied_model_computes_the_same_and_shares_the_connections(load: Load, wrapped: bool) -> None:
    model: nn.Module = load("llama", masking="reference").eval()
    if wrapped:
        model = with_adapter(model, "llama").eval()
    twin = copy.deepcopy(model)
    assert multiplier_of(twin) is multiplier_of(model)
    with torch.no_grad():
        assert torch.equal(model(**batch("llama")).logits, twin(**batch("llama")).logits)
        for parameter in twin.parameters():
            parameter.mul_(2)
        assert not torch.equal(model(**batch("llama")).logits, twin(**batch("llama")).logits)


def test_pickling_a_model_is_refused_with_what_to_do_instead(load: Load, tmp_path: Path) -> None:
    model = load("llama", masking="reference")
    with pytest.raises(TypeError, match="save its adapter"):
        pickle.dumps(model)
    with pytest.raises(TypeError, match="save its adapter"):
        torch.save(model, tmp_path / "model.pt")


@pytest.mark.slow
def test_a_compiled_model_trains_the_same(load: Load) -> None:
    """`TrainingArguments(torch_compile=True)`: what is remote is left out of the compiled graph."""
    model = with_adapter(load("llama", masking="reference"), "llama")
    expected = training_step(model, "llama")
    model.compile(backend="eager")
    compiled = training_step(model, "llama")
    assert compiled.keys() == expected.keys()
    for name, value in compiled.items():
        a, b = (torch.frombuffer(bytearray(x), dtype=torch.float32) for x in (value, expected[name]))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_data_parallel_training_is_refused(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """`DataParallel` replicates a model by this method of each module; it needs GPUs to get that far."""
    model = load("llama", masking="reference")
    with pytest.raises(UnsupportedError, match="DataParallel"):
        for module in model.modules():
            module._replicate_for_data_parallel()


@pytest.mark.parametrize("device_map", [{"": "disk"}, {"model": "cpu", "lm_head": "meta"}], ids=str)
def test_a_model_spread_over_devices_is_refused(checkpoints: dict[str, Path], device_map: object) -> None:
    with pytest.raises(UnsupportedError, match="on one device"):
        CLASSES["llama"].from_pretrained(
            checkpoints["llama"],
            device_map=device_map,
            quantization_config=BlindConfig(masking="reference", progress=False),
        )


@pytest.mark.parametrize("given", [True, False], ids=["given", "not given"])
def test_a_checkpoint_that_names_operators_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path, given: bool
) -> None:
    """Transformers would take its ``quantization_config``, and drop the one that the user gave."""
    kit = tmp_path / "kit"
    prepare(Checkpoint.open(checkpoints["llama"]), kit)
    config = json.loads((kit / "config.json").read_text())
    theirs = {"quant_method": "blindtune", "masking": "lattice", "insecure": True}
    theirs["operators"] = [{"name": "eve", "workers": ["127.0.0.1:9"]}]
    (kit / "config.json").write_text(json.dumps({**config, "quantization_config": theirs}))
    options = {"quantization_config": BlindConfig(masking="reference", progress=False)} if given else {}
    with pytest.raises(ConfigurationError, match="has a quantization_config of its own"):
        CLASSES["llama"].from_pretrained(kit, **options)


@pytest.mark.skipif(torch.accelerator.device_count() > 1, reason="it would be spread over several devices")
@pytest.mark.parametrize("device_map", ["auto", "sequential"])
def test_a_model_spread_over_one_device_is_whole_there(checkpoints: dict[str, Path], device_map: str) -> None:
    model = CLASSES["llama"].from_pretrained(
        checkpoints["llama"],
        device_map=device_map,
        quantization_config=BlindConfig(masking="reference", progress=False),
    )
    (device,) = {x.device for x in model.parameters()}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    assert device.type == (accelerator.type if accelerator else "cpu")
    model.generate(torch.tensor([[5, 6]], device=device), max_new_tokens=1, do_sample=False)


def test_saving_the_base_model_is_refused(load: Load, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not serializable"):
        load("llama", masking="reference").save_pretrained(tmp_path)


NEED_WEIGHTS = {
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "fast PiSSA": {"init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"init_lora_weights": "olora"},
    "a remote layer to be trained whole": {"modules_to_save": ["o_proj"]},
    "a remote head to be trained whole": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("options", NEED_WEIGHTS.values(), ids=NEED_WEIGHTS)
def test_adapters_that_need_the_weights_are_refused_before_they_train(
    load: Load, options: dict[str, object]
) -> None:
    model = load("llama", masking="reference").train()
    with pytest.raises(UnsupportedError):
        get_peft_model(model, LoraConfig(target_modules="all-linear", **options))(**batch("llama"))


def test_dora_that_is_added_later_is_refused_at_the_next_step(load: Load) -> None:
    model = with_adapter(load("llama", masking="reference"), "llama").train()
    for module in model.modules():
        if hasattr(module, "use_dora"):
            module.use_dora = {"default": True}
    with pytest.raises(UnsupportedError, match="uses DoRA.*use_dora=False"):
        model(**batch("llama"))


MERGES = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "safe merge": lambda model: model.merge_and_unload(safe_merge=True),
    "merge_adapter": lambda model: model.merge_adapter(),
}


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_merging_is_refused_and_leaves_the_model_as_it_was(
    load: Load, merge: Callable[[PeftModel], object]
) -> None:
    model = with_adapter(load("llama", masking="reference"), "llama").eval()
    with torch.no_grad():
        before = model(**batch("llama")).logits
        with pytest.raises(UnsupportedError, match="merge the saved adapter where the base model is"):
            merge(model)
        assert torch.equal(model(**batch("llama")).logits, before)


def test_the_reference_of_a_kit_needs_the_checkpoint_that_it_was_made_from(
    load: Load, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    base = shutil.copytree(checkpoints["llama"], tmp_path / "base")
    kit = prepare(Checkpoint.open(base), tmp_path / "kit").folder
    tokens = torch.arange(3, 20).view(1, -1)
    expected = load("llama", masking="reference")(tokens).logits
    assert torch.equal(load("llama", masking="reference", folder=kit)(tokens).logits, expected)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].mul_(-1)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigurationError, match="are not those that the kit .* is for"):
        load("llama", masking="reference", folder=kit)
    shutil.rmtree(base)
    with pytest.raises(ConfigurationError, match="needs the whole checkpoint, and .* is a kit"):
        load("llama", masking="reference", folder=kit)


def test_asking_for_the_multiplier_of_a_plain_model_is_an_error(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ConfigurationError, match="no remote layers"):
        multiplier_of(CLASSES["llama"].from_pretrained(checkpoints["llama"]))


def test_a_model_without_a_checkpoint_is_refused() -> None:
    with pytest.raises((BlindtuneError, OSError)):
        CLASSES["llama"].from_pretrained(
            "no/such/folder", quantization_config=BlindConfig(masking="reference"), local_files_only=True
        )
