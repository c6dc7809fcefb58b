"""Is this machine fit to be a client? What `blindtune doctor` looks at."""

import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants

from blindtune.client.preflight.disk import check_disk
from blindtune.client.preflight.finding import Finding
from blindtune.client.preflight.libraries import check_libraries
from blindtune.protocol.expansion import KEY_BYTES, Seed
from blindtune.protocol.kernels.compiled import kernel
from blindtune.protocol.multiplication.exactness import exact_method
from blindtune.protocol.multiplication.methods import Method
from blindtune.protocol.parameters import PARAMETER_SETS
from blindtune.protocol.products import MAX_CONTRACTION

__all__ = ["check_core_dumps", "check_kernels", "check_randomness", "diagnose"]

# Libraries choose their kernels by size: a small one, a usual one, and the largest there is.
_CONTRACTIONS = (64, 2048, MAX_CONTRACTION)
_ROWS, _FEATURES, _REPEATS = 256, 2048, 3
_KIT_BYTES = 100_000_000
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def diagnose() -> Iterator[Finding]:
    """Examines the machine. It takes a few seconds, and nothing leaves the machine."""
    yield from check_libraries()
    yield _product()
    yield _processor()
    yield _memory()
    yield _graphics()
    yield check_kernels()
    yield from check_disk({_cache(): ("kits made at first use", _KIT_BYTES)})
    yield check_randomness()
    yield check_core_dumps()
    yield _telemetry()
    yield _hub()


def _product() -> Finding:
    check = "integer products"
    notes: list[str] = []
    try:
        methods = [exact_method(_CONTRACTIONS, x, log=notes.append) for x in PARAMETER_SETS.values()]
    except RuntimeError as error:
        return Finding(
            check,
            "problem",
            str(error),
            "reinstall torch, and run a memory test: this processor must not be used for training",
        )
    speeds = ", ".join(
        f"{method.parameters.name} by {method.name}, {_speed(method):.0f} billion multiplications a second"
        for method in methods
    )
    detail = f"exact here: {speeds}"
    if notes:
        return Finding(
            check,
            "warning",
            f"{detail}; {notes[0]}",
            "use a processor with VNNI for masking 'reference' and for workers; other runs are not affected",
        )
    return Finding(check, "ok", detail)


def _speed(method: Method) -> float:
    """10^9 products of a residue and a weight in a second, the best of a few tries."""
    operand = Seed(bytes(KEY_BYTES), method.parameters).expand(_ROWS, _FEATURES)
    matrix = torch.from_numpy(np.ones((_FEATURES, _FEATURES), np.int8))
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        method.multiply(method.prepare(operand), matrix)
        times.append(time.perf_counter() - started)
    return _ROWS * _FEATURES**2 / min(times) / 1e9


def _processor() -> Finding:
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    detail = f"{cores} cores may be used, torch uses {threads} threads"
    if threads > cores:
        detail += ": they get in each other's way"
        return Finding("processor", "warning", detail, f"set OMP_NUM_THREADS={cores}")
    return Finding("processor", "ok", detail)


def _memory() -> Finding:
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = (page * os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    detail = f"{total / 2**30:.1f} GiB, of which {free / 2**30:.1f} GiB are free"
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        limit = "max"
    if limit.isdigit():
        detail += f"; this container may use {int(limit) / 2**30:.1f} GiB"
    return Finding("memory", "ok", detail)


def _graphics() -> Finding:
    if not torch.cuda.is_available():
        return Finding("CUDA", "ok", "torch sees no GPU; a client works without one")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("CUDA", "ok", f"torch sees {', '.join(names)}")


def _nothing(x):  # type: ignore[no-untyped-def]
    return x


def check_kernels() -> Finding:
    """Whether compiled kernels outlive the process; it asks as the protocol's own kernels do."""
    compiled: Any = kernel(_nothing)  # a dispatcher of numba
    folder = compiled.stats.cache_path
    if folder is None:
        return Finding(
            "compiled kernels",
            "warning",
            "cannot be kept: each process compiles them anew",
            "set NUMBA_CACHE_DIR to a folder that can be written to",
        )
    return Finding("compiled kernels", "ok", f"kept on disk, such as in {folder}")


def _cache() -> Path:
    """Where kits are made at first use, see `blindtune.client.kit.prepare.cached_kit`."""
    return Path(os.environ.get("BLINDTUNE_CACHE", Path.home() / ".cache" / "blindtune"))


def check_randomness() -> Finding:
    """Whether the operating system has random numbers, of which every mask is made."""
    try:
        os.getrandom(KEY_BYTES, os.GRND_NONBLOCK)
        first, second = os.urandom(KEY_BYTES), os.urandom(KEY_BYTES)
    except BlockingIOError:
        detail = "the system's generator has not been seeded yet"
    except OSError as error:
        detail = f"the system gives no random numbers ({error.strerror})"
    else:
        if first != second:
            return Finding("random numbers", "ok", "the system's generator is seeded and answers")
        detail = "the system's generator repeats itself"
    return Finding(
        "random numbers", "problem", detail, "do not mask anything here: give the machine a source of entropy"
    )


def check_core_dumps() -> Finding:
    """Whether a crash would write this process's memory, private data and all, to a disk."""
    limit, _ = resource.getrlimit(resource.RLIMIT_CORE)
    if limit == 0:
        return Finding("core dumps", "ok", "off (ulimit -c is 0)")
    return Finding(
        "core dumps",
        "warning",
        "on: if the process crashes, the system may write its memory to a disk, data and adapter included",
        "run ulimit -c 0 in the shell that trains, or set LimitCORE=0 in its service",
    )


def _telemetry() -> Finding:
    if constants.HF_HUB_DISABLE_TELEMETRY:
        return Finding("telemetry", "ok", "the Hugging Face libraries of this process report nothing")
    return Finding(
        "telemetry",
        "warning",
        "the Hugging Face libraries may report what is used, though no data",
        "set HF_HUB_DISABLE_TELEMETRY=1 and DO_NOT_TRACK=1 in the environment of your scripts",
    )


def _hub() -> Finding:
    if constants.HF_HUB_OFFLINE:
        return Finding("hub", "ok", "offline: checkpoints come from this machine alone")
    detail = "online: the hub is asked for models that are named and sees which; HF_HUB_OFFLINE=1 prevents it"
    return Finding("hub", "ok", detail)
