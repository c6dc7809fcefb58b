"""Every kind of adapter that peft has for linear layers: right on remote layers, or refused clearly."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from support.checkpoints import CLASSES, batch
from transformers import PreTrainedModel

from blindtune.errors import UnsupportedError

pytestmark = pytest.mark.hf

Load = Callable[..., PreTrainedModel]

# Sizes that fit layers of 32 features, where the defaults don't.
_SIZES: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 8},
    "GRALORA": {"r": 8, "gralora_k": 2},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 8, "r": 0},
    "PSOFT": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "VBLORA": {"vector_length": 8, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 8},
}
# They read no base weight.
_WORK = {
    "LORA",
    "ADALORA",
    "BOFT",
    "C3A",
    "FOURIERFT",
    "GRALORA",
    "IA3",
    "LOHA",
    "LOKR",
    "OFT",
    "PVERA",
    "ROAD",
}
_WORK |= {"RANDLORA", "VBLORA", "VERA"}
# Their targets are no linear layers, or they need what this model has not.
_ELSEWHERE = {"ADAPTION_PROMPT", "TRAINABLE_TOKENS", "POLY", "XLORA", "SHADOW"}
_LORA: dict[str, dict[str, Any]] = {
    "aLoRA": {"alora_invocation_tokens": [1, 2]},
    "rsLoRA": {"use_rslora": True},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "with biases": {"lora_bias": True},
    "QA-LoRA": {"use_qalora": True},
}


def _kinds() -> dict[str, PeftConfig]:
    found: dict[str, PeftConfig] = {}
    for kind in PEFT_TYPE_TO_TUNER_MAPPING:
        config = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
        if kind.value not in _ELSEWHERE and "target_modules" in inspect.signature(config).parameters:
            sizes = _SIZES.get(kind.value, {})
            found[kind.value] = config(
                task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "down_proj"], **sizes
            )
    for name, options in _LORA.items():
        found[name] = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **options)
    return found


KINDS = _kinds()


def _step(model: PreTrainedModel, config: PeftConfig) -> tuple[float, torch.Tensor]:
    torch.manual_seed(11)
    wrapped = get_peft_model(model, config).train()
    with torch.no_grad():
        for parameter in wrapped.parameters():  # one that starts at zero hides the gradient of another
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn(parameter.shape)
    inputs = batch("llama")
    inputs["input_ids"][:, 2:4] = torch.tensor([1, 2])
    torch.manual_seed(12)
    loss = wrapped(**inputs).loss
    loss.backward()
    gradients = [x.grad.flatten() for x in wrapped.parameters() if x.requires_grad and x.grad is not None]
    return float(loss.detach()), torch.cat(gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_learns_what_it_learns_on_the_plain_model_or_is_refused(
    kind: str, load: Load, checkpoints: dict[str, Path]
) -> None:
    try:
        loss, gradient = _step(load("llama", masking="reference"), KINDS[kind])
    except UnsupportedError as error:
        assert "stays with the workers" in str(error) and kind not in _WORK
        return
    except ValueError as error:
        # peft refuses the layer itself.
        assert "RemoteLinear" in str(error) and kind not in _WORK
        return
    stock = CLASSES["llama"].from_pretrained(checkpoints["llama"], dtype=torch.float32)
    expected_loss, expected = _step(stock, KINDS[kind])
    assert loss == pytest.approx(expected_loss, rel=0.02)
    assert 0 < float((gradient - expected).norm()) < 0.1 * float(expected.norm())


def test_the_kinds_of_adapters_that_read_no_base_weight_are_among_those_of_peft() -> None:
    assert {x for x in _WORK if hasattr(PeftType, x)} <= set(KINDS)
