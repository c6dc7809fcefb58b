"""Training steps of small random models. Their frozen layers are left out, and not even made."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from blindtune.checkpoint.skeleton import frozen_layers
from blindtune.client.kit.groups import trace_groups
from blindtune.client.plan.asked import Step, make_remote, training_step

__all__ = ["SmallModel", "small_step"]

_HEAD_SIZE = 64
_BATCH = 4

Watched = Callable[[nn.Module], AbstractContextManager[object]]


class SmallModel(NamedTuple):
    """A Llama, and the tokens of a step of it."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    tokens: int


def small_step(
    shape: SmallModel, dtype: torch.dtype, wait: Callable[[], object] = lambda: None
) -> Callable[..., None]:
    """Makes a model with an adapter.

    Args:
        shape: of the model.
        dtype: of its parameters.
        wait: called where a group of layers would be asked for.

    Returns:
        Takes a training step, within what it is given, as in `Step.watched`.
    """
    heads = max(1, shape.hidden // _HEAD_SIZE)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        vocab_size=shape.vocabulary,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        base = LlamaForCausalLM(config).to(dtype)
    layers = [x for x in frozen_layers(base, base.state_dict()) if not x.head]
    groups = trace_groups(LlamaForCausalLM, config, [x.module for x in layers])
    asking = {group[0] for group in groups}
    lora = LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules="all-linear")
    adapted = get_peft_model(base, lora, low_cpu_mem_usage=True)
    for layer in layers:
        module = base.get_submodule(layer.module).get_base_layer()
        make_remote(module, layer.out_features, wait if layer.module in asking else lambda: None)
        module.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    adapted.to_empty(device="cpu")
    base.tie_weights()
    for x in (*adapted.parameters(), *adapted.buffers()):
        x.data.normal_(std=0.02)

    def take(watched: Watched = lambda model: nullcontext()) -> None:
        step = Step(
            lambda model: adapted, batch=_BATCH, length=shape.tokens // _BATCH, labels=True, watched=watched
        )
        training_step(adapted, config, "input_ids", step, "cpu")

    return take
