"""Which threads calls and products run in."""

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeVar

from blindtune.protocol.operands import Operand
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Residues
from blindtune.server.hooks import Multiplying

__all__ = ["AtOnce", "Counted", "InThreads"]

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


class InThreads:
    """A multiplier whose products are computed in threads of a pool, each for one that waits.

    Every request that waits has a thread, and each thread that multiplied once would keep those of OpenMP
    that helped it for good.

    Args:
        multiplier: what computes.
        pool: with as many threads as there may be products at a time.
    """

    def __init__(self, multiplier: Multiplying, pool: Executor) -> None:
        self._multiplier = multiplier
        self._pool = pool

    def outputs(self, product: Product) -> int:
        return self._multiplier.outputs(product)

    def multiply(self, product: Product, operand: Operand) -> Residues:
        return self._pool.submit(self._multiplier.multiply, product, operand).result()
