"""An operand's blocks, taken from one queue by as many lanes as there are workers to ask.

A lane that is done with a block takes the next one, so that a faster worker answers more of them. Lanes run
in threads that wait for nothing but their worker, never for each other: they always come to an end.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

__all__ = ["Block", "UnderWay", "cut", "start"]

Block = tuple[int, int]
"""First row, and the one after the last."""


def cut(rows: int, most: int, least: int, parts: int) -> list[Block]:
    """Blocks that cover rows in order, all of about one size.

    Args:
        rows: how many there are.
        most: rows of a block, at most.
        least: rows of a block that is cut for the sake of ``parts``, at least.
        parts: how many blocks to make, if they can be that large, or more if they have to be smaller.
    """
    count = max(min(parts, rows // least), -(-rows // most), 1)
    bounds = [rows * i // count for i in range(count + 1)]
    return list(pairwise(bounds))


@dataclass(frozen=True)
class UnderWay:
    """Blocks that are being asked for.

    Attributes:
        lanes: futures, of which the first begins before the others.
    """

    lanes: list[Any]

    def exception(self) -> BaseException | None:
        """Waits until nothing is under way any more; what went wrong first in order of lanes, or None."""
        first, *others = self.lanes
        errors = [first.exception()]
        # Then all blocks are taken, and a lane that has not begun has nothing to do. What is left of one goes
        # to the lane that took it, if not to another.
        errors += [lane.exception() for lane in others if not lane.cancel()]
        return next((error for error in errors if error is not None), None)


class _Queue:
    """Hands out blocks, and none any more once one of them failed."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._blocks = deque(blocks)
        self._stopped = False
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Block]:
        while True:
            with self._lock:
                if not self._blocks:
                    return
                block = self._blocks.popleft()
            yield block

    def put(self, block: Block) -> None:
        with self._lock:
            if not self._stopped:
                self._blocks.appendleft(block)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            self._blocks.clear()


def start(executor: Executor, blocks: list[Block], lanes: int, ask: Callable[[int, int], int]) -> UnderWay:
    """Asks for blocks in the threads of an executor.

    Args:
        executor: runs nothing but lanes.
        blocks: one or more.
        lanes: how many blocks at a time, at most.
        ask: awaits the answer to the first rows of a block, and returns where the others begin, which become
            a block of their own, or where the block ends. Once it raised, no other block begins.

    Raises:
        RuntimeError: the executor is being shut down. Nothing is under way then.
    """
    queue = _Queue(blocks)

    def lane() -> None:
        for first, stop in queue:
            try:
                rest = ask(first, stop)
            except BaseException:
                queue.stop()
                raise
            if rest < stop:
                queue.put((rest, stop))

    submitted: list[Any] = []
    try:
        for _ in range(min(lanes, len(blocks))):
            submitted.append(executor.submit(lane))
    except RuntimeError:  # it is being shut down
        queue.stop()
        if submitted:
            UnderWay(submitted).exception()
        raise
    return UnderWay(submitted)
