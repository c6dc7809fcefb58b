"""Rows are independent in every step of the protocol, so kernels run on blocks of rows in threads.

The kernels release the interpreter lock and use no threading layer of their own, which keeps them
safe next to gRPC's threads and after a fork: the pool belongs to the process that made it.

Threads take the next block when they are done with one. Waking a thread takes as long as a kernel needs for
thousands of elements, much longer still on a virtual machine whose processor sleeps, and until then the
calling thread goes on alone. A thread that has not begun by the end is not waited for. What it costs to have
asked for it is the same for all kernels, so that the less there is to do to an element, the more of them
there must be before another thread pays.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import torch
from numpy.typing import NDArray

from blindtune.protocol.kernels.process import this_process

__all__ = ["DRAWN", "READ", "WRITTEN", "for_row_blocks", "for_rows_in_turn"]

# Where one thread and two took equally long, of a virtual machine with two processors.
READ, WRITTEN, DRAWN = 1 << 19, 1 << 18, 1 << 17
"""How many elements make a thread pay: if they are only read, if a few instructions make others of them, and
if those are drawn at random."""

_LEAST = 1 << 17
_pool: tuple[object, ThreadPoolExecutor] | None = None


def _executor() -> ThreadPoolExecutor:
    global _pool
    if _pool is None or _pool[0] is not this_process():
        threads = torch.get_num_threads()  # the one setting for how many cores to use
        _pool = (this_process(), ThreadPoolExecutor(threads, thread_name_prefix="blindtune-rows"))
    return _pool[1]


def _blocks(rows: int, least: int, threads: int) -> list[tuple[int, int]]:
    """Smaller and smaller ones, so that all threads are done at about the same time."""
    blocks = []
    start = 0
    while start < rows:
        count = max((rows - start) // (2 * threads), 1)
        stop = min(start + -(-count // least) * least, rows)
        blocks.append((start, stop))
        start = stop
    return blocks


def for_row_blocks(
    rows: int, row_elements: int, kernel: Callable[[int, int], None], paying: int = WRITTEN
) -> None:
    """Calls ``kernel(start, stop)`` for blocks that cover ``range(rows)``, in threads when it pays.

    The kernel must treat each row by itself, so that the result does not depend on the blocks.

    Args:
        rows: number of rows.
        row_elements: elements that one row touches, to decide whether threads pay.
        kernel: releases the interpreter lock; its first exception is raised here.
        paying: elements that a thread must have, `READ`, `WRITTEN` or `DRAWN`.
    """
    threads = _threads(rows, row_elements, paying)
    if threads <= 1:
        kernel(0, rows)
        return
    least = min(-(-_LEAST // max(row_elements, 1)), -(-rows // threads))
    blocks = iter(_blocks(rows, least, threads))

    def take() -> None:
        for block in blocks:
            kernel(*block)

    _in_threads(threads, take)


def for_rows_in_turn(
    rows: int, row_elements: int, kernel: Callable[[NDArray[np.int64]], None], paying: int = WRITTEN
) -> None:
    """Calls ``kernel(turn)`` in as many threads as pay, which `shared_rows.take` rows from the same counter.

    Args:
        rows, row_elements, paying: as for `for_row_blocks`.
        kernel: goes on until there are no rows left; otherwise as for `for_row_blocks`.
    """
    turn = np.zeros(1, np.int64)
    _in_threads(_threads(rows, row_elements, paying), lambda: kernel(turn))


def _threads(rows: int, row_elements: int, paying: int) -> int:
    return min(torch.get_num_threads(), rows, max(1, rows * row_elements // paying))


def _in_threads(threads: int, work: Callable[[], None]) -> None:
    """Calls it in this thread, and in others that wake up before this one is done."""
    futures = [_executor().submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        begun = [future for future in futures if not future.cancel()]
        wait(begun)
    for future in begun:
        future.result()
