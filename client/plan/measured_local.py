"""How fast this machine computes what the client keeps to itself, and the optimizer's step."""

import statistics
from collections.abc import Callable
from functools import partial
from mmap import mmap
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from blindtune.client.plan.fitting import fit
from blindtune.client.plan.local_work import LARGE_BYTES, LocalWork, counted
from blindtune.client.plan.small_steps import SmallModel, small_step

__all__ = ["LocalRates", "measure_local", "measure_optimizer"]

_MODELS = (
    SmallModel(64, 128, 2, 256, 32),  # calls
    SmallModel(1024, 4096, 2, 1024, 256),
    SmallModel(2048, 8192, 2, 1024, 64),
    SmallModel(2048, 8192, 2, 1024, 512),  # activations
)
_PRODUCT = 512, 1024, 16384
_FRESH_BYTES = 2 * LARGE_BYTES
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
    half_moved: float
    call: float
    shared: float
    fresh: float
    attended: float
    half_attended: float


class _Rounds:
    """Asks workers within what is measured, and takes the time of it.

    In training, too, workers are asked before and after: then threads have to be woken up, and share a core
    until the system has found one for each.
    """

    def __init__(self, ask: Callable[[], object]) -> None:
        self._ask = ask
        self._seconds = 0.0

    def __call__(self) -> None:
        started = perf_counter()
        self._ask()
        self._seconds += perf_counter() - started

    def taken(self) -> float:
        """Seconds of the rounds since this was asked last."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def _median_seconds(
    work: Callable[[], object], repeats: int = 5, apart: Callable[[], float] = lambda: 0.0
) -> float:
    """Of some runs, after one that does not count, less the seconds in each that are counted apart."""
    seconds = []
    for _ in range(repeats + 1):
        started = perf_counter()
        work()
        seconds.append(perf_counter() - started - apart())
    return statistics.median(seconds[1:])


def measure_local(ask: Callable[[int], object] = lambda rows: None, repeats: int = 3) -> LocalRates:
    """Takes training steps of random models whose frozen layers are left out.

    Args:
        ask: a round with workers, of so many rows.
        repeats: of each step.
    """
    flop, half_flop = _measure_product(torch.float32), _measure_product(torch.bfloat16)
    attended, half_attended = _measure_attention(torch.float32), _measure_attention(torch.bfloat16)
    amounts, seconds = [], []
    for dtype in (torch.float32, torch.bfloat16):
        for model in _MODELS:
            work, taken = _measure_model(model, dtype, ask, repeats)
            amounts.append((work.moved, work.half_moved, work.calls, work.shared))
            products = work.flops * flop + work.half_flops * half_flop
            attention = work.attended * attended + work.half_attended * half_attended
            # These are measured by themselves, and never all of a step.
            seconds.append(max(taken - products - attention, 0.1 * taken))
    moved, half_moved, call, shared = fit(np.array(amounts, np.float64), np.array(seconds)).tolist()
    fresh = _measure_fresh()
    return LocalRates(flop, half_flop, moved, half_moved, call, shared, fresh, attended, half_attended)


def _measure_product(dtype: torch.dtype) -> float:
    """Seconds of a floating-point operation of a matrix product."""
    rows, contraction, outputs = _PRODUCT
    x, w = torch.randn(rows, contraction, dtype=dtype), torch.randn(outputs, contraction, dtype=dtype)
    return _median_seconds(lambda: x @ w.T) / (2 * rows * contraction * outputs)


def _measure_attention(dtype: torch.dtype) -> float:
    """Seconds of a block of queries, backward, where there are few keys and so few operations."""
    q, k, v = (
        # As models have them: features of all heads side by side.
        torch.randn(_BATCH, _QUERIES, heads, _HEAD_SIZE, dtype=dtype).transpose(1, 2).requires_grad_()
        for heads in (_HEADS, _HEADS // 4, _HEADS // 4)
    )
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    gradient = torch.ones_like(out)
    work = LocalWork()
    work.add_attended(out.shape, torch.float32)

    def backward() -> Any:
        return torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)

    return _median_seconds(backward) / work.attended


def _measure_fresh() -> float:
    """Seconds of a byte of memory that the system has to provide first."""
    kept = torch.zeros(_FRESH_BYTES, dtype=torch.uint8)

    def anew() -> None:
        torch.frombuffer(mmap(-1, _FRESH_BYTES), dtype=torch.uint8).fill_(1)

    again = _median_seconds(lambda: kept.fill_(1))
    return max(0.0, _median_seconds(anew) - again) / _FRESH_BYTES


def _measure_model(
    model: SmallModel, dtype: torch.dtype, ask: Callable[[int], object], repeats: int
) -> tuple[LocalWork, float]:
    """What a step does, and its seconds."""
    rounds = _Rounds(partial(ask, model.tokens))
    take = small_step(model, dtype, rounds)
    work = LocalWork()
    take(lambda adapted: counted(work, adapted))
    rounds.taken()
    return work, _median_seconds(take, repeats, rounds.taken)


def measure_optimizer() -> float:
    """Seconds of a parameter in a step of AdamW, with clipped gradients."""
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in _TRAINED * 16]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return _median_seconds(step) / sum(x.numel() for x in parameters)
