"""How fast this machine computes what the client keeps to itself, and the optimizer's step."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from blindtune.checkpoint.skeleton import frozen_layers
from blindtune.client.plan.asked import Step, make_remote, training_step
from blindtune.client.plan.fitting import fit
from blindtune.client.plan.local_work import LocalWork, counted

__all__ = ["LocalRates", "mean_seconds", "measure_local", "measure_optimizer"]

# Sizes, and tokens: one in which calls count, two in which bytes and products do.
_MODELS = (
    ({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 256}, 8),
    ({"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "vocab_size": 1024}, 256),
    ({"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 1, "vocab_size": 16384}, 256),
)
_OPTIMIZED = 100, 40_000


class LocalRates(NamedTuple):
    """Seconds of a floating-point operation in float32 and in bfloat16, of a byte moved, and of a call."""

    flop: float
    half_flop: float
    moved: float
    call: float


def mean_seconds(work: Callable[[], object], repeats: int) -> float:
    """Of some runs, after one that does not count. A step is a sum, so what it takes is a sum of means."""
    work()
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - started) / repeats


def measure_local(repeats: int = 5) -> LocalRates:
    """Takes training steps of random models whose frozen layers are left out."""
    amounts, seconds = [], []
    for dtype in (torch.float32, torch.bfloat16):
        for sizes, tokens in _MODELS:
            work, taken = _measure_model(LlamaConfig(**sizes, num_attention_heads=8), tokens, dtype, repeats)
            amounts.append((work.flops, work.half_flops, work.moved, work.calls))
            seconds.append(taken)
    return LocalRates(*fit(np.array(amounts, np.float64), np.array(seconds)).tolist())


def _measure_model(
    config: LlamaConfig, tokens: int, dtype: torch.dtype, repeats: int
) -> tuple[LocalWork, float]:
    base = LlamaForCausalLM(config).to(dtype)
    layers = [x for x in frozen_layers(base, base.state_dict()) if not x.head]
    adapted = get_peft_model(base, LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules="all-linear"))
    for layer in layers:
        make_remote(base.get_submodule(layer.module).get_base_layer(), layer.out_features)
    work = LocalWork()
    step = Step(lambda model: adapted, length=tokens, labels=True)
    counting = Step(step.adapt, length=tokens, labels=True, watched=lambda model: counted(work, model))
    training_step(adapted, config, "input_ids", counting, "cpu")
    return work, mean_seconds(lambda: training_step(adapted, config, "input_ids", step, "cpu"), repeats)


def measure_optimizer(repeats: int = 5) -> float:
    """Seconds of a parameter in a step of AdamW, with clipped gradients."""
    count, size = _OPTIMIZED
    parameters = [torch.nn.Parameter(torch.zeros(size)) for _ in range(count)]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones(size)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return mean_seconds(step, repeats) / (count * size)
