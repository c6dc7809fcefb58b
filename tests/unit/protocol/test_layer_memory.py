"""Layers behind each other in memory: which are neighbours, and that a stack of them is what they are."""

import numpy as np
import pytest
import torch

from blindtune.protocol.multiplication import layer_memory
from blindtune.protocol.multiplication.layer_memory import LayerMemory, joined, row_bytes


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.integers(-127, 128, (rows, columns), dtype=np.int8))


@pytest.mark.parametrize("size", [1, 63, 64, 65, 384, 2048, 3072, 8192, 28_672])
def test_rows_are_an_odd_number_of_cache_lines_apart(size: int) -> None:
    distance = row_bytes(size)
    assert size <= distance < size + 128
    assert distance % 128 == 64


def test_what_is_kept_is_a_copy_that_begins_with_a_cache_line() -> None:
    memory, source = LayerMemory(), matrix(5, 70)
    kept = memory.keep(source)
    assert kept.data_ptr() % 64 == 0
    assert kept.stride() == (192, 1)
    wanted = source.clone()
    source.zero_()
    assert torch.equal(kept, wanted)


def test_neighbours_of_one_width_are_joined_in_their_order_only() -> None:
    memory = LayerMemory()
    a, b, c = (matrix(rows, 70, rows) for rows in (5, 3, 7))
    kept = [memory.keep(x) for x in (a, b, c)]
    (whole,) = joined(kept)
    assert torch.equal(whole, torch.cat([a, b, c]))
    assert whole.data_ptr() == kept[0].data_ptr()
    for apart in ([kept[1], kept[0], kept[2]], [kept[0], kept[2]], [kept[0], kept[0]]):
        assert joined(apart) == apart


def test_parts_of_neighbours_are_joined_only_where_no_row_is_left_out() -> None:
    memory = LayerMemory()
    a, b = matrix(5, 70, 1), matrix(3, 70, 2)
    first, second = memory.keep(a), memory.keep(b)
    (columns,) = joined([first[:, 9:40], second[:, 9:40]])
    assert torch.equal(columns, torch.cat([a, b])[:, 9:40])
    (rows,) = joined([first[2:], second[:2]])
    assert torch.equal(rows, torch.cat([a[2:], b[:2]]))
    for apart in ([first[:4], second], [first, second[1:]], [first[:, 9:40], second[:, 8:39]]):
        assert joined(apart) == apart


def test_layers_of_other_widths_or_in_other_pieces_are_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_memory, "_PIECE", 10 * row_bytes(70))
    memory = LayerMemory()
    kept = [memory.keep(x) for x in (matrix(6, 70, 1), matrix(6, 70, 2), matrix(1, 7, 3), matrix(40, 70, 4))]
    for other in kept[1:]:
        assert joined([kept[0], other]) == [kept[0], other]
    assert torch.equal(kept[3], matrix(40, 70, 4))


def test_what_follows_by_chance_in_other_memory_is_not_joined() -> None:
    whole = np.zeros((8, 64), np.int8)
    apart = [torch.from_numpy(whole[:5]), torch.from_numpy(whole[5:])]
    assert joined(apart) == apart
