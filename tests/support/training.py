"""One training step, written so that two of them can be compared bit for bit."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from support.checkpoints import batch

__all__ = ["lora", "training_step"]


def lora(family: str) -> LoraConfig:
    """An adapter on all layers whose initial output is not zero, so that every gradient counts."""
    return LoraConfig(
        task_type="SEQ_CLS" if family == "bert" else "CAUSAL_LM",
        target_modules="all-linear",
        r=4,
        lora_dropout=0.1,
        init_lora_weights=False,
        fan_in_fan_out=family == "gpt2",
    )


def training_step(
    model: nn.Module, family: str, *, adapter: bool = True, inputs: Mapping[str, Any] | None = None
) -> dict[str, bytes]:
    """The bytes of the loss and of all gradients of one step, by name.

    Args:
        model: gets an adapter, unless ``adapter`` is false.
        family: of the model.
        inputs: a batch with labels; one of the family's own if not given.
    """
    torch.manual_seed(11)
    if adapter:
        model = get_peft_model(model, lora(family))  # type: ignore[arg-type]
    model.train()
    model.zero_grad()
    torch.manual_seed(12)
    loss = model(**(inputs or batch(family))).loss
    loss.backward()
    results = {"loss": loss} | {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    return {name: value.detach().float().numpy().tobytes() for name, value in results.items()}
