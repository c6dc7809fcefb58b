"""Threads that belong to one process: a forked child makes its own."""

import threading
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor

from blindtune.protocol.kernels.process import this_process

__all__ = ["Threads"]


class Threads:
    """An executor that is made at first use in each process.

    Args:
        count: how many threads at most.
        make: makes an executor of so many.
    """

    def __init__(self, count: int, make: Callable[[int], Executor] = ThreadPoolExecutor) -> None:
        self._count = count
        self._make = make
        self._lock = threading.Lock()
        self._closed = False
        self._executor: tuple[object, Executor] | None = None

    def get(self) -> Executor:
        """This process's executor.

        Raises:
            RuntimeError: after `close`.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the threads have ended")
            if self._executor is None or self._executor[0] is not this_process():
                self._executor = this_process(), self._make(self._count)
            return self._executor[1]

    def close(self) -> None:
        """Waits until the threads have nothing to do, and ends them."""
        with self._lock:
            self._closed = True
            executor, self._executor = self._executor, None
        if executor is not None and executor[0] is this_process():
            executor[1].shutdown()
