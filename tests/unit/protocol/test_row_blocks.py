"""Blocks of rows in threads: every row once, and nobody waits for a thread that did not begin."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blindtune.protocol.kernels import row_blocks
from blindtune.protocol.kernels.compiled import kernel
from blindtune.protocol.kernels.row_blocks import for_row_blocks, for_rows_in_turn
from blindtune.protocol.kernels.shared_rows import rows_at_once, take

LARGE = 1 << 20


@kernel
def _count(counts, columns, turn):  # type: ignore[no-untyped-def]
    """Counts what is done to each row, in any number of threads."""
    rows, some = counts.shape[0], rows_at_once(columns)
    while True:
        start = take(turn, some)
        if start >= rows:
            return
        for r in range(start, min(start + some, rows)):
            counts[r] += 1


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@given(rows=st.integers(0, 3000), least=st.integers(1, 300), threads=st.integers(2, 9))
def test_blocks_cover_all_rows_once_in_order(rows: int, least: int, threads: int) -> None:
    blocks = row_blocks._blocks(rows, least, threads)
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(rows))
    assert all(stop - start >= least for start, stop in blocks[:-1])


@pytest.mark.parametrize("elements", [1, 1 << 10, LARGE])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 257, 1024])
def test_each_row_is_computed_once(rows: int, elements: int) -> None:
    seen: list[int] = []
    for_row_blocks(rows, elements, lambda start, stop: seen.extend(range(start, stop)))
    assert sorted(seen) == list(range(rows))


def test_both_threads_take_blocks() -> None:
    together = threading.Barrier(2)
    names = set()

    def block(start: int, stop: int) -> None:
        if start in (0, 1):
            together.wait(30)
        names.add(threading.get_ident())

    for_row_blocks(2, LARGE, block)
    assert len(names) == 2


def test_threads_that_are_busy_elsewhere_are_not_waited_for() -> None:
    go = threading.Event()
    others = [row_blocks._executor().submit(go.wait, 60) for _ in range(row_blocks._executor()._max_workers)]
    try:
        names = []
        for_row_blocks(64, LARGE, lambda start, stop: names.append(threading.get_ident()))
        assert set(names) == {threading.get_ident()}
        assert not any(other.done() for other in others)
    finally:
        go.set()


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_an_error_in_any_thread_is_raised_here_when_all_blocks_under_way_are_done(where: str) -> None:
    together, caller, done = threading.Barrier(2), threading.get_ident(), []

    def block(start: int, stop: int) -> None:
        if start > 1:
            return
        together.wait(30)
        if (threading.get_ident() == caller) == (where == "here"):
            raise ZeroDivisionError
        done.append(start)

    with pytest.raises(ZeroDivisionError):
        for_row_blocks(2, LARGE, block)
    assert len(done) == 1


@pytest.mark.parametrize("columns", [1, 2048, LARGE])
@pytest.mark.parametrize("rows", [0, 1, 7, 5000])
def test_rows_in_turn_are_each_taken_once(rows: int, columns: int) -> None:
    counts = np.zeros(rows, np.int64)
    for _ in range(20):
        for_rows_in_turn(rows, columns, lambda turn: _count(counts, columns, turn))
    assert (counts == 20).all()


def test_rows_are_taken_by_one_thread_only_when_another_reads_the_counter_at_the_same_time() -> None:
    together = threading.Barrier(2)
    counts, begun = np.zeros((2, 1_000_000), np.int64), set()

    def thread(turn: np.ndarray) -> None:
        together.wait(30)
        begun.add(threading.get_ident())
        _count(counts[len(begun) - 1], LARGE, turn)

    for_rows_in_turn(counts.shape[1], LARGE, thread)
    assert len(begun) == 2
    assert (counts.sum(0) == 1).all()


def test_a_counter_of_another_type_is_refused() -> None:
    with pytest.raises(Exception, match="int64"):
        _count(np.zeros(3, np.int64), 1, np.zeros(1, np.int32))
