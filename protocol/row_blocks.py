"""Rows are independent in every step of the protocol, so kernels run on blocks of rows in threads.

The kernels release the interpreter lock and use no threading layer of their own, which keeps them
safe next to gRPC's threads and after a fork: the pool belongs to the process that made it.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise

import torch

__all__ = ["for_row_blocks"]

_SMALL = 1 << 16
_pool: tuple[int, ThreadPoolExecutor] | None = None


def _executor() -> ThreadPoolExecutor:
    global _pool
    if _pool is None or _pool[0] != os.getpid():
        threads = torch.get_num_threads()  # the one setting for how many cores to use
        _pool = (os.getpid(), ThreadPoolExecutor(threads, thread_name_prefix="blindtune-rows"))
    return _pool[1]


def for_row_blocks(rows: int, row_elements: int, kernel: Callable[[int, int], None]) -> None:
    """Calls ``kernel(start, stop)`` for blocks that cover ``range(rows)``, in threads when it pays.

    The kernel must treat each row by itself, so that the result does not depend on the blocks.

    Args:
        rows: number of rows.
        row_elements: elements that one row touches, to decide whether threads pay.
        kernel: releases the interpreter lock; its first exception is raised here.
    """
    blocks = min(torch.get_num_threads(), rows, max(1, rows * row_elements // _SMALL))
    if blocks <= 1:
        kernel(0, rows)
        return
    bounds = [rows * i // blocks for i in range(blocks + 1)]
    first, *others = pairwise(bounds)
    futures = [_executor().submit(kernel, *block) for block in others]
    try:
        kernel(*first)  # This thread takes a block too, rather than wait while another wakes up.
    finally:
        wait(futures)
    for future in futures:
        future.result()
