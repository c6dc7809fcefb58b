"""Checkpoints that are quantized already: read as their libraries read them, or refused by kind."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.recipes import Silent, recipe_of, with_tokenizer, write_lines
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from blindtune.checkpoint import Checkpoint
from blindtune.checkpoint.decoded import DecodedTensors, open_tensors
from blindtune.client import BlindConfig
from blindtune.client.kit.prepare import fingerprint, prepare
from blindtune.client.merge.checkpoint import merge
from blindtune.client.runs.run import train_recipe
from blindtune.errors import BlindtuneError, CheckpointError, UnsupportedError
from blindtune.protocol.nf4 import quantize_nf4
from blindtune.protocol.weights import INT8, SCHEMES
from blindtune.server.store import LayerStore

pytestmark = pytest.mark.hf

BLOCK = 16
UP = "model.layers.1.mlp.up_proj"
BITS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
KINDS = [*BITS, "fp8"]


def in_fp8(source: Path, folder: Path) -> None:
    """A checkpoint in the published layout: matrices as FP8, and beside them a scale for each block."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for key in [x for x in tensors if x.endswith("_proj.weight")]:
        w = tensors[key]
        rows, columns = -(-w.shape[0] // BLOCK), -(-w.shape[1] // BLOCK)
        padded = torch.zeros(rows * BLOCK, columns * BLOCK)
        padded[: w.shape[0], : w.shape[1]] = w
        blocks = padded.view(rows, BLOCK, columns, BLOCK)
        scales = blocks.abs().amax((1, 3)).clamp(min=1e-6) / 448
        scaled = (blocks / scales[:, None, :, None]).view(rows * BLOCK, -1)[: w.shape[0], : w.shape[1]]
        tensors[key] = scaled.to(torch.float8_e4m3fn)
        tensors[key.removesuffix("weight") + "weight_scale_inv"] = scales
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same small Llama in each kind, as its own library writes it."""
    root = tmp_path_factory.mktemp("quantized")
    plain = root / "plain"
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,  # of which the library's kernels need as many as share a scale
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        LlamaForCausalLM(config).save_pretrained(plain)
    logging.disable(logging.WARNING)
    found = {kind: root / kind for kind in KINDS}
    for kind, options in BITS.items():
        model = AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=BitsAndBytesConfig(**options), dtype=torch.bfloat16
        )
        model.save_pretrained(found[kind])
    in_fp8(plain, found["fp8"])
    logging.disable(logging.NOTSET)
    return found


def stock_weights(kind: str, folder: Path) -> dict[str, torch.Tensor]:
    """Each quantized weight as its library decodes it, float32."""
    if kind == "fp8":
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        tensors, decode = load_file(folder / "model.safetensors"), Fp8Dequantize(None)._dequantize_one
        sides = {
            x: x.removesuffix("weight") + "weight_scale_inv" for x in tensors if x.endswith("_proj.weight")
        }
        return {x: decode(tensors[x], tensors[side], torch.float32) for x, side in sides.items()}
    from bitsandbytes import functional

    found = {}
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            state.dtype = torch.float32
            found[f"{name}.weight"] = functional.dequantize_4bit(weight.data, state)
        elif weight is not None and weight.dtype == torch.int8:
            found[f"{name}.weight"] = functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_library_and_both_sides_agree(kind: str, quantized: dict[str, Path]) -> None:
    folder, stock = quantized[kind], stock_weights(kind, quantized[kind])
    assert len(stock) == 14
    with open_tensors(folder) as tensors:
        assert isinstance(tensors, DecodedTensors) and set(tensors.quantized) == set(stock)
        assert all(torch.equal(tensors.get(key), weight) for key, weight in stock.items())
        plain = load_file(folder.parent / "plain" / "model.safetensors")
        assert set(tensors) == set(plain)
        assert all(tensors.shape(x) == tuple(plain[x].shape) for x in stock)
    for scheme in SCHEMES.values():
        checkpoint = Checkpoint.open(folder, scheme=scheme)
        assert LayerStore.load(checkpoint).fingerprint == fingerprint(checkpoint)


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested"])
def test_a_checkpoint_in_nf4_that_is_served_as_nf4_keeps_its_codes(
    kind: str, quantized: dict[str, Path]
) -> None:
    stored = load_file(quantized[kind] / "model.safetensors")
    with open_tensors(quantized[kind]) as tensors:
        assert isinstance(tensors, DecodedTensors)
        for key in tensors.quantized:
            again = quantize_nf4(tensors.get(key))
            assert torch.equal(again.codes, stored[key].flatten())
            assert torch.equal(again.rows(0, again.shape[0]), tensors.get(key))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 40).view(1, -1)).logits.float()


@pytest.mark.parametrize("kind", KINDS)
def test_a_kit_of_it_gives_a_model_whose_logits_are_those_of_the_stock_one(
    kind: str, quantized: dict[str, Path], tmp_path: Path
) -> None:
    folder = quantized[kind]
    with open_tensors(folder) as tensors:
        plain = {key: tensors.get(key).float() for key in tensors}
    expected = AutoModelForCausalLM.from_pretrained(folder.parent / "plain")
    expected.load_state_dict(plain, strict=False)
    kit = prepare(Checkpoint.open(folder), tmp_path / "kit")
    config = BlindConfig(masking="reference", progress=False)
    model = AutoModelForCausalLM.from_pretrained(kit.folder, quantization_config=config, dtype=torch.float32)
    error = (logits(model) - logits(expected)).norm() / logits(expected).norm()
    assert error < 0.03


def test_a_recipe_trains_on_it_and_the_adapter_merges_into_full_precision(
    quantized: dict[str, Path], tmp_path: Path
) -> None:
    base = with_tokenizer(quantized["nf4-nested"], tmp_path / "base")
    lines = [{"prompt": f"say {i}", "completion": "abc"} for i in range(6)]
    recipe = recipe_of(
        tmp_path,
        base,
        write_lines(tmp_path / "train.jsonl", lines),
        quantization={"scheme": "nf4"},
        training={"max_steps": 2, "learning_rate": 0.01},
    )
    train_recipe(recipe, Silent())
    merged = merge(recipe.output.dir, base, tmp_path / "merged")
    assert merged.layers and "quantization_config" not in json.loads(
        (tmp_path / "merged" / "config.json").read_text()
    )
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {x.dtype for x in tensors.values()} == {torch.bfloat16}
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    logging.disable(logging.WARNING)
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), recipe.output.dir
    )
    logging.disable(logging.NOTSET)
    assert (logits(whole) - logits(tuned)).norm() < 0.02 * logits(tuned).norm()


def test_loading_one_itself_is_refused(quantized: dict[str, Path]) -> None:
    config = BlindConfig(masking="reference", progress=False)
    with pytest.raises(ValueError, match="quantized with BitsAndBytesConfig"):
        AutoModelForCausalLM.from_pretrained(quantized["nf4"], quantization_config=config)


Change = Callable[[dict[str, torch.Tensor]], object]


def without(name: str) -> Change:
    return lambda x: x.pop(f"{UP}.{name}")


def cut(name: str, less: int = 1) -> Change:
    return lambda x: x.update({f"{UP}.{name}": x[f"{UP}.{name}"][:-less].clone()})


def with_type(name: str, dtype: torch.dtype) -> Change:
    return lambda x: x.update({f"{UP}.{name}": x[f"{UP}.{name}"].to(dtype)})


STATE = "weight.quant_state.bitsandbytes__nf4"
DAMAGES: list[tuple[str, Change]] = [
    ("nf4", without("weight")),
    ("nf4", without("weight.absmax")),
    ("nf4", without("weight.quant_map")),
    ("nf4", without(STATE)),
    ("nf4", cut("weight")),
    ("nf4", cut("weight.absmax")),
    ("nf4", cut("weight.quant_map")),
    ("nf4", cut(STATE, 9)),
    ("nf4", with_type("weight.absmax", torch.float64)),
    ("nf4", lambda x: x[f"{UP}.weight.quant_map"].mul_(2)),
    ("nf4", lambda x: x[f"{UP}.weight.absmax"].fill_(torch.nan)),
    ("nf4-nested", without("weight.nested_absmax")),
    ("nf4-nested", without("weight.nested_quant_map")),
    ("nf4-nested", cut("weight.nested_absmax")),
    ("nf4-nested", cut("weight.nested_quant_map")),
    ("nf4-nested", with_type("weight.absmax", torch.float32)),
    ("fp4", cut("weight.absmax")),
    ("int8", without("SCB")),
    ("int8", cut("SCB")),
    ("int8", cut("weight")),
    ("int8", with_type("weight", torch.int16)),
    ("int8", lambda x: x.update({f"{UP}.weight_format": torch.tensor(1, dtype=torch.uint8)})),
    ("fp8", without("weight_scale_inv")),
    ("fp8", cut("weight_scale_inv")),
    ("fp8", cut("weight", BLOCK)),
    ("fp8", with_type("weight", torch.float8_e5m2)),
]


@pytest.mark.parametrize("kind,change", DAMAGES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_damaged_one_is_one_clear_error(
    kind: str, change: Change, quantized: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(quantized[kind], tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj") as caught:
        LayerStore.load(Checkpoint.open(folder))
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_named(quantized: dict[str, Path], tmp_path: Path) -> None:
    for kind in KINDS:
        folder = shutil.copytree(quantized[kind], tmp_path / kind)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "already quantized with gptq"),
        ({"quant_method": "awq"}, "already quantized with awq"),
        ({"quant_method": "compressed-tensors"}, "already quantized with compressed-tensors"),
        ({"quant_method": "fp8"}, "fp8 with weight_block_size None"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, "fp8 with weight_block_size"),
        ({"bits": 4}, "already quantized with None"),
        ("nf4", "no usable config.json"),
        (BITS["nf4"] | {"quant_method": "bitsandbytes"}, "stores no such weight"),
    ],
)
def test_what_is_not_read_is_refused_by_kind_with_what_to_take_instead(
    said: object, message: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints["llama"], tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    with pytest.raises(BlindtuneError, match=message):
        Checkpoint.open(folder)


def test_a_quantized_model_of_transposed_weights_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    logging.disable(logging.WARNING)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoints["gpt2"], quantization_config=BitsAndBytesConfig(**BITS["nf4"])
    )
    model.save_pretrained(tmp_path / "gpt2")
    logging.disable(logging.NOTSET)
    with pytest.raises(UnsupportedError, match="Conv1D"):
        Checkpoint.open(tmp_path / "gpt2")


def test_an_adapter_of_qlora_loads_on_the_private_model(quantized: dict[str, Path], tmp_path: Path) -> None:
    """The head stays as it is stored: QLoRA leaves it in full precision."""
    logging.disable(logging.WARNING)
    stock = AutoModelForCausalLM.from_pretrained(quantized["nf4"], dtype=torch.float32)
    logging.disable(logging.NOTSET)
    lora = LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM")
    tuned = get_peft_model(stock, lora)
    generator = torch.Generator().manual_seed(1)
    for name, values in tuned.named_parameters():
        if "lora_B" in name:
            values.data.normal_(0, 0.02, generator=generator)
    tuned.save_pretrained(tmp_path / "adapter")
    kit = prepare(Checkpoint.open(quantized["nf4"], scheme=SCHEMES["nf4"]), tmp_path / "kit", "local")
    config = BlindConfig(masking="reference", quantization="nf4", head="local", progress=False)
    base = AutoModelForCausalLM.from_pretrained(kit.folder, quantization_config=config, dtype=torch.float32)
    private = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert (logits(private) - logits(tuned)).norm() < 0.03 * logits(tuned).norm()
    assert kit.scheme is not INT8
