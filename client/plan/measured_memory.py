"""How much memory of this machine the client's libraries take, and its activations beyond their own size.

An array's memory, once free, is used again for smaller ones, and what small objects leave between two of them
is too little for the next of the same size. So a process grows to more than what it has at once.
"""

import ctypes
import gc
from pathlib import Path
from typing import NamedTuple

import torch

from blindtune.client.plan.local_work import LocalWork, counted
from blindtune.client.plan.small_steps import SmallModel, small_step

__all__ = ["MemoryUse", "measure_memory"]

# Deep enough that what stays in memory is far more than what comes and goes.
_MODEL = SmallModel(1024, 2816, 8, 1024, 256)
_STEPS = 3


class MemoryUse(NamedTuple):
    """Memory as in `blindtune.client.plan.profiles`."""

    resident: int
    spread: float


def measure_memory() -> MemoryUse:
    """Takes steps of a random model, in a process that holds little else."""
    take = small_step(_MODEL, torch.bfloat16)
    work = LocalWork()
    take(lambda model: counted(work, model))
    _give_back()
    before = _anonymous_bytes()
    for _ in range(_STEPS):
        take()
    grown = _anonymous_bytes() - before
    del take
    _give_back()
    return MemoryUse(_anonymous_bytes(), max(1.0, grown / work.held_small))


def _give_back() -> None:
    """Lets the system have all memory that is free, where the C library can be told to."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))
