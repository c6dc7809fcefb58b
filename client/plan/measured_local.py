"""How fast this machine computes what the client keeps to itself, and the optimizer's step."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from blindtune.checkpoint.skeleton import frozen_layers
from blindtune.client.plan.asked import Step, make_remote, training_step
from blindtune.client.plan.fitting import fit
from blindtune.client.plan.local_work import LocalWork, counted

__all__ = ["LocalRates", "measure_local", "measure_optimizer", "median_seconds"]


class _Measured(NamedTuple):
    """A model, and the tokens of a step of it."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    tokens: int


_MODELS = (
    _Measured(64, 128, 4, 256, 32),  # calls
    _Measured(1024, 4096, 2, 1024, 256),  # activations
    _Measured(1024, 1024, 1, 16384, 256),  # products of a head, and the loss
    _Measured(2048, 8192, 4, 32768, 64),  # few rows, and weights that they meet
)
_HEAD_SIZE = 64
_BATCH = 4
_QUERIES = 64
_HEADS = 32
# Of rank 16, in layers of widths 2048 and 8192.
_TRAINED = 16 * 2048, 16 * 2048, 16 * 8192


class LocalRates(NamedTuple):
    """Seconds for one unit each, as in `blindtune.client.plan.profiles`."""

    flop: float
    half_flop: float
    moved: float
    call: float
    attended: float
    half_attended: float


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Of some runs, after one that does not count."""
    work()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def measure_local(repeats: int = 5) -> LocalRates:
    """Takes training steps of random models whose frozen layers are left out."""
    attended = {dtype: _measure_attention(dtype, repeats) for dtype in (torch.float32, torch.bfloat16)}
    amounts, seconds = [], []
    for dtype, query in attended.items():
        for measured in _MODELS:
            work, taken = _measure_model(measured, dtype, repeats)
            amounts.append((work.flops, work.half_flops, work.moved, work.calls))
            # Attention is measured by itself, and never all of a step.
            seconds.append(max(taken - query * (work.attended + work.half_attended), 0.1 * taken))
    rates = fit(np.array(amounts, np.float64), np.array(seconds)).tolist()
    return LocalRates(*rates, *attended.values())


def _measure_attention(dtype: torch.dtype, repeats: int) -> float:
    """Seconds of a query of one head, backward, where there are few keys and so few operations."""
    q, k, v = (
        # As models have them: features of all heads side by side.
        torch.randn(_BATCH, _QUERIES, heads, _HEAD_SIZE, dtype=dtype).transpose(1, 2).requires_grad_()
        for heads in (_HEADS, _HEADS // 4, _HEADS // 4)
    )
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    gradient = torch.ones_like(out)

    def backward() -> Any:
        return torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)

    return median_seconds(backward, repeats) / out.shape[:-1].numel()


def _measure_model(measured: _Measured, dtype: torch.dtype, repeats: int) -> tuple[LocalWork, float]:
    heads = max(1, measured.hidden // _HEAD_SIZE)
    config = LlamaConfig(
        hidden_size=measured.hidden,
        intermediate_size=measured.intermediate,
        num_hidden_layers=measured.layers,
        vocab_size=measured.vocabulary,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        tie_word_embeddings=True,
    )
    base = LlamaForCausalLM(config).to(dtype)
    layers = [x for x in frozen_layers(base, base.state_dict()) if not x.head]
    adapted = get_peft_model(base, LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules="all-linear"))
    for layer in layers:
        make_remote(base.get_submodule(layer.module).get_base_layer(), layer.out_features)
    work = LocalWork()
    step = Step(lambda model: adapted, batch=_BATCH, length=measured.tokens // _BATCH, labels=True)
    counting = replace(step, watched=lambda model: counted(work, model))
    training_step(adapted, config, "input_ids", counting, "cpu")
    return work, median_seconds(lambda: training_step(adapted, config, "input_ids", step, "cpu"), repeats)


def measure_optimizer(repeats: int = 5) -> float:
    """Seconds of a parameter in a step of AdamW, with clipped gradients."""
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in _TRAINED * 16]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return median_seconds(step, repeats) / sum(x.numel() for x in parameters)
