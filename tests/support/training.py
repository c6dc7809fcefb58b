"""One training step, written so that two of them can be compared bit for bit."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from support.checkpoints import batch

__all__ = ["lora", "training_step", "with_adapter"]


def lora(family: str) -> LoraConfig:
    """An adapter on all layers whose initial output is not zero, so that every gradient counts."""
    return LoraConfig(
        task_type="SEQ_CLS" if family == "bert" else "CAUSAL_LM",
        target_modules="all-linear",
        r=4,
        lora_dropout=0.1,
        init_lora_weights=False,
    )


def with_adapter(model: PreTrainedModel, family: str) -> PeftModel:
    """The model with an adapter, the same one for the same family."""
    torch.manual_seed(11)
    return get_peft_model(model, lora(family))


def training_step(model: nn.Module, family: str, inputs: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    """The bytes of the loss and of all gradients of one step, by name; no parameter changes.

    Args:
        model: of that family.
        family: decides on the inputs.
        inputs: a batch with labels, in place of the family's own.
    """
    model.train()
    model.zero_grad()
    torch.manual_seed(12)
    loss = model(**(inputs or batch(family))).loss
    loss.backward()
    results = {"loss": loss} | {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    return {name: value.detach().float().numpy().tobytes() for name, value in results.items()}
