"""Pools of threads that calls run in."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["AtOnce", "Counted"]

_T = TypeVar("_T")


class AtOnce(ThreadPoolExecutor):
    """Runs a function where it is submitted: for calls that are refused and wait for nobody.

    gRPC's server lets a handler name the pool that it runs in. In this one a refusal takes none of the
    threads that others wait for, and none can pile up.
    """

    def __init__(self) -> None:
        super().__init__(1)

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> "Future[_T]":
        future: Future[_T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class Counted(ThreadPoolExecutor):
    """A pool that knows how much it has to do.

    Args:
        threads: how many.
        name: of the threads.
    """

    def __init__(self, threads: int, name: str) -> None:
        super().__init__(threads, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._pending = 0

    @property
    def pending(self) -> int:
        """What was submitted and has not ended."""
        return self._pending

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> "Future[_T]":
        self._count(1)
        future = super().submit(fn, *args, **kwargs)
        future.add_done_callback(lambda _: self._count(-1))
        return future

    def _count(self, change: int) -> None:
        with self._lock:
            self._pending += change
