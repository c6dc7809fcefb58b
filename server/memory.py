"""Is there enough memory for a model? Asked before loading, not found out at the end of it."""

from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import torch

from blindtune.checkpoint import FrozenLayer
from blindtune.errors import ConfigurationError, ResourceError
from blindtune.protocol.kernels.recycled import give_back
from blindtune.protocol.multiplication.layer_memory import row_bytes
from blindtune.protocol.weights import INT8, Scheme, kept_bytes

__all__ = [
    "Available",
    "available_bytes",
    "cgroup_bytes",
    "give_back_cache",
    "is_out_of_memory",
    "memory_needed",
    "require_memory",
    "usable_device",
]

Available = Callable[[torch.device], int]
"""How many bytes of a device can still be taken."""

_CPU = torch.device("cpu")
# How torch and CUDA's libraries report memory that they did not get, where they have no exception for it.
_NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "ALLOC_FAILED", "out of memory")
# Where a container's own limit shows, for versions 2 and 1: limit, usage, and the line of
# memory.stat for cached files that the kernel gives back on demand.
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def usable_device(name: str) -> torch.device:
    """The device of that name: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ConfigurationError: there is no such device here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"{name} is no device: use cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return _CPU
    if device.type != "cuda":
        raise ConfigurationError(f"device {name} is not supported: use cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise ConfigurationError(f"device {name} was asked for, but torch finds no CUDA here")
    index = device.index if ":" in name else torch.cuda.current_device()
    if index >= torch.cuda.device_count():
        raise ConfigurationError(f"there is no device {name}: torch finds {torch.cuda.device_count()}")
    return torch.device("cuda", index)


def cgroup_bytes(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes left under the container's memory limit, or None where there is none to be seen."""
    for limit_file, usage_file, stat_file, reclaimable in _CGROUPS:
        try:
            limit = (root / limit_file).read_text().strip()
            usage = int((root / usage_file).read_text())
            stat = dict(line.split() for line in (root / stat_file).read_text().splitlines())
        except (OSError, ValueError):
            continue
        return None if limit == "max" else int(limit) - usage + int(stat.get(reclaimable, 0))
    return None


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    host = psutil.virtual_memory().available
    limit = cgroup_bytes()
    return host if limit is None else max(0, min(host, limit))


def memory_needed(
    layers: Iterable[FrozenLayer], device: torch.device, workspace: int = 0, scheme: Scheme = INT8
) -> dict[torch.device, int]:
    """Bytes that a worker takes at its peak: all layers as it keeps them, and what it works with.

    While it loads, that is float32 for the largest layer. Layers pass through the host's memory one at
    a time on their way to a GPU, and the GPU needs room to work on one too.

    Args:
        layers: all that are held.
        device: that holds them.
        workspace: bytes that requests take while they run, on the device and, if that is a GPU, on the host.
        scheme: how layers are kept.
    """
    layers = list(layers)
    sizes = [layer.out_features * layer.in_features for layer in layers]
    held, largest = sum(sizes), max(sizes, default=0)
    if scheme is not INT8:
        held = sum(kept_bytes(x.out_features, x.in_features, scheme) for x in layers)
    elif device == _CPU:
        held = sum(layer.out_features * row_bytes(layer.in_features) for layer in layers)
    needed = {device: held + max(4 * largest, workspace)}
    if device != _CPU:
        needed[_CPU] = max(5 * largest, workspace)
    return needed


def require_memory(needed: dict[torch.device, int], available: Available, workspace: int = 0) -> None:
    """Refuses what would not fit.

    Args:
        needed: from `memory_needed`.
        available: how much there is.
        workspace: how much of it is for requests, to say so.

    Raises:
        ResourceError: a device has less memory than needed.
    """
    for device, wanted in needed.items():
        free = available(device)
        if wanted <= free:
            continue
        advice = "free memory, raise the container's limit, or use a larger machine"
        if wanted - workspace <= free:
            advice = f"lower --max-concurrent, {advice}"
        share = f", up to {_gib(workspace)} of it for requests that run at the same time" if workspace else ""
        raise ResourceError(
            f"the model's layers need {_gib(wanted)} on {device}{share}, and {_gib(free)} are available: "
            f"{advice}"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the host or the device has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def give_back_cache() -> None:
    """Hands back what is kept for later: matrices of earlier products, and by torch a GPU's memory."""
    give_back()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
