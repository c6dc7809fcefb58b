"""What the client computes itself is counted as it would be on paper."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from blindtune.client.plan.local_work import LARGE_BYTES, LocalWork, counted
from blindtune.protocol.kernels import allocator

ROWS, WIDTH, OUT = 6, 8, 10


def counts(model: nn.Module, step: Any) -> LocalWork:
    work = LocalWork()
    with counted(work, model):
        step()
    return work


def test_matrix_products_are_counted_forward_and_backward() -> None:
    with torch.device("meta"):
        layer, x = nn.Linear(WIDTH, OUT, bias=False), torch.empty(ROWS, WIDTH, requires_grad=True)
    forward = counts(layer, lambda: layer(x))
    assert forward.flops == 2 * ROWS * WIDTH * OUT
    both = counts(layer, lambda: layer(x).sum().backward())
    assert both.flops == 3 * forward.flops
    assert both.half_flops == 0
    assert both.trained == WIDTH * OUT


def test_products_in_bfloat16_are_counted_apart() -> None:
    with torch.device("meta"):
        layer, x = nn.Linear(WIDTH, OUT, dtype=torch.bfloat16), torch.empty(ROWS, WIDTH, dtype=torch.bfloat16)
    work = counts(layer, lambda: layer(x))
    assert (work.flops, work.half_flops) == (0, 2 * ROWS * WIDTH * OUT)


def test_other_operations_are_counted_by_the_bytes_they_touch_and_views_touch_none() -> None:
    x, y = torch.zeros(ROWS, WIDTH), torch.zeros(ROWS, WIDTH)
    work = counts(nn.Identity(), lambda: (x + y).t().contiguous().view(-1)[0])
    added = 3 * 4 * ROWS * WIDTH
    # Making the transpose contiguous copies, and the rest are views.
    assert work.moved == added + 2 * 4 * ROWS * WIDTH
    assert work.calls > 2
    assert work.flops == 0


def test_bytes_of_bfloat16_are_counted_apart() -> None:
    x = torch.zeros(ROWS, WIDTH)
    work = counts(nn.Identity(), lambda: x.to(torch.bfloat16).float())
    assert work.moved == 2 * 4 * ROWS * WIDTH
    assert work.half_moved == 2 * 2 * ROWS * WIDTH


def test_threads_share_an_operation_of_many_elements_and_none_that_gives_a_view() -> None:
    few, many = (torch.zeros(size, device="meta") for size in (32_768, 32_769))
    work = counts(nn.Identity(), lambda: (few + 1, many.view(-1)[:9]))
    assert work.shared == 0
    assert counts(nn.Identity(), lambda: many.sum()).shared == 1, "what it reads counts as well"


def test_an_embedding_reads_only_the_rows_that_it_gives() -> None:
    with torch.device("meta"):
        table, ids = torch.empty(10_000, WIDTH), torch.zeros(ROWS, dtype=torch.long)
    work = counts(nn.Identity(), lambda: functional.embedding(ids, table))
    assert work.moved == 2 * 4 * ROWS * WIDTH


def test_attention_is_fused_and_keeps_no_scores() -> None:
    heads, tokens, size = 4, 64, 8
    with torch.device("meta"):
        q, k, v = (torch.empty(1, heads, tokens, size, requires_grad=True) for _ in "qkv")
    work = counts(nn.Identity(), lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert work.flops == 2 * 2 * heads * tokens * tokens * size
    assert work.saved == 4 * 4 * heads * tokens * size, "q, k, v and the output, and no tokens x tokens"
    back = counts(
        nn.Identity(),
        lambda: functional.scaled_dot_product_attention(query=q, key=k, value=v).sum().backward(),
    )
    assert back.flops == 3.5 * work.flops
    assert (back.attended, back.half_attended) == (heads * 2, 0), "32 queries of each head at once"
    assert work.attended == 0, "not in the forward pass"


def test_queries_are_attended_in_blocks_of_which_the_last_may_be_smaller() -> None:
    work = LocalWork()
    for queries, blocks in ((1, 1), (32, 1), (33, 2)):
        before = work.half_attended
        work.add_attended(torch.Size((2, 3, queries, 8)), torch.bfloat16)
        assert work.half_attended - before == 2 * 3 * blocks
    assert work.attended == 0


def test_what_is_kept_for_the_backward_pass_counts_once_and_parameters_do_not() -> None:
    layer = nn.Linear(WIDTH, OUT)
    x = torch.zeros(ROWS, WIDTH)
    work = counts(layer, lambda: (layer(x), layer(x).relu()))
    assert work.saved == x.nbytes + 4 * ROWS * OUT


def test_what_is_held_at_once_is_the_most_that_was_alive_together() -> None:
    size = 4 * ROWS * WIDTH

    def one_after_the_other() -> torch.Tensor:
        y = torch.zeros(ROWS, WIDTH, device="meta")
        for _ in range(10):
            y = y + 1
        return y

    def all_together() -> list[torch.Tensor]:
        kept = [torch.zeros(ROWS, WIDTH, device="meta") for _ in range(10)]
        return [x.view(-1) for x in kept]

    assert counts(nn.Identity(), one_after_the_other).held == 2 * size
    assert counts(nn.Identity(), all_together).held == 10 * size, "a view is no memory of its own"


def test_large_arrays_are_held_apart_as_their_memory_is_not_kept() -> None:
    small, large = LARGE_BYTES - 4, LARGE_BYTES

    def work() -> torch.Tensor:
        x = torch.zeros(small // 4, device="meta")
        for _ in range(2):
            y = torch.zeros(large // 4, device="meta")
            del y
        return x

    found = counts(nn.Identity(), work)
    assert (found.held_small, found.held_large, found.held) == (small, large, small + large)
    assert found.fresh == 2 * large, "each time anew"


def test_large_is_what_the_allocator_does_not_keep() -> None:
    assert allocator._VALUES[allocator._MMAP_THRESHOLD] == LARGE_BYTES


def test_parameters_are_not_among_what_is_held() -> None:
    layer = nn.Linear(WIDTH, OUT, bias=False)
    work = counts(layer, lambda: layer(torch.zeros(ROWS, WIDTH)))
    assert work.held == 4 * ROWS * (WIDTH + OUT)


def test_counting_changes_no_number() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(WIDTH, OUT), torch.randn(ROWS, WIDTH)
    plain = layer(x)
    work = LocalWork()
    with counted(work, layer):
        assert torch.equal(layer(x), plain)
