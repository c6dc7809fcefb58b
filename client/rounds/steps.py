"""Steps of any optimizer of this process, so that raw loops and all trainers count alike."""

import threading
from typing import Any, Protocol
from weakref import WeakSet

from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["Stepping", "at_each_step"]


class Stepping(Protocol):
    """Is told of steps."""

    def step(self) -> None: ...


_lock = threading.Lock()
_told: "WeakSet[Any]" = WeakSet()
_hooked = False


def at_each_step(listener: Stepping) -> None:
    """Calls the listener's ``step`` after each step of an optimizer, for as long as the listener lives."""
    global _hooked
    with _lock:
        _told.add(listener)
        if not _hooked:
            register_optimizer_step_post_hook(_stepped)
            _hooked = True


def _stepped(optimizer: object, args: object, kwargs: object) -> None:
    with _lock:
        listeners = list(_told)
    for listener in listeners:
        listener.step()
