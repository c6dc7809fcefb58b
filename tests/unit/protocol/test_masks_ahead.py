"""Masks drawn before their operands: each for one operand, of its product and number of rows alone."""

import os
import threading
from collections import Counter

import numpy as np
import pytest
from support.forked import in_a_child

from blindtune.protocol.expansion import expand, expanded_dots
from blindtune.protocol.fixed_point import quantize_rows, square_budget
from blindtune.protocol.kernels.process import this_process
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Product, forward_products
from blindtune.protocol.residues import dot
from blindtune.protocol.shares.masks_ahead import MasksAhead
from blindtune.protocol.shares.source import ShareSource
from blindtune.protocol.shares.unmasked import UnmaskedSource

COLUMNS = 40
(FIRST,), (OTHER,) = (forward_products([name], COLUMNS) for name in ("first", "other"))
BUDGET = square_budget(Q31, COLUMNS * 127 * 127)
V = np.random.default_rng(5).integers(0, Q31.modulus, (1, COLUMNS), dtype=np.uint32)


def _x(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, COLUMNS)).astype(np.float32)


@pytest.mark.parametrize("rows", [0, 1, 7, 700])
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 1000])
def test_dots_of_an_expansion_are_those_of_its_rows(rows: int, columns: int) -> None:
    key = bytes(range(32))
    vector = np.random.default_rng(0).integers(0, Q31.modulus, 2 * columns, dtype=np.uint32)[::2]
    expected = [dot(row, vector.copy(), Q31.q) for row in expand(key, 0, rows, columns, Q31)]
    (found,) = expanded_dots(key, rows, vector[None], Q31)
    assert found.dtype == np.uint32 and found.tolist() == expected


@pytest.mark.parametrize("operators", [2, 3, 5])
def test_the_next_operand_of_a_product_gets_the_mask_that_was_drawn_ahead(operators: int) -> None:
    source, x = ShareSource(operators, Q31), _x(6)
    ahead = source.draw_ahead(FIRST, 6, V)
    assert [share.recipient for share in ahead] == list(range(operators - 1))
    masked, scales = source.hide_reals(x, FIRST, BUDGET, None, V)
    assert all(a is b for a, b in zip(masked.shares, ahead, strict=False))
    # Their sum is the operand, and what is expected of answers is right.
    operand, expected_scales = quantize_rows(x, BUDGET)
    assert np.array_equal(scales, expected_scales)
    *masks, last = (share.residues.astype(object) for share in masked.shares)
    assert np.array_equal((last - sum(masks)) % Q31.modulus, operand.astype(object) % Q31.modulus)
    for share in masked.shares:
        assert share.expected is not None
        assert np.array_equal(
            share.expected, V.astype(object) @ share.residues.T.astype(object) % Q31.modulus
        )


def test_integers_get_the_mask_that_was_drawn_ahead_as_well() -> None:
    source = ShareSource(2, Q31)
    ahead = source.draw_ahead(FIRST, 3, V)
    operand = quantize_rows(_x(3), BUDGET)[0]
    masked = source.hide_integers(operand, FIRST)
    assert masked.shares[0] is ahead[0]
    assert np.array_equal(masked.reveal_integers([share.residues for share in masked.shares]), operand)


def test_a_mask_drawn_ahead_hides_one_operand() -> None:
    source = ShareSource(2, Q31)
    ahead = source.draw_ahead(FIRST, 2, V)
    seeds = [source.hide_reals(_x(2), FIRST, BUDGET, None, V)[0].shares[0].seed for _ in range(3)]
    assert seeds[0] == ahead[0].seed
    assert len({seed.key for seed in seeds if seed}) == 3


@pytest.mark.parametrize(("product", "rows"), [(OTHER, 2), (FIRST, 1), (FIRST, 3)])
def test_an_operand_of_another_product_or_number_of_rows_gets_another_mask(
    product: Product, rows: int
) -> None:
    source = ShareSource(2, Q31)
    (ahead,) = source.draw_ahead(FIRST, 2, V)
    assert source.hide_reals(_x(rows), product, BUDGET, None, V)[0].shares[0].seed != ahead.seed
    assert source.hide_reals(_x(2), FIRST, BUDGET, None, V)[0].shares[0] is ahead


def test_sources_whose_shares_all_depend_on_the_operand_draw_nothing_ahead() -> None:
    assert UnmaskedSource(Q31).draw_ahead(FIRST, 2, V) == ()


def test_the_oldest_mask_is_used_first_and_forgotten_first() -> None:
    stock: MasksAhead[str] = MasksAhead(most=3)
    for mask in ("first", "second", "third", "fourth"):
        stock.put(FIRST, 2, mask)
    assert [stock.take(FIRST, 2) for _ in range(4)] == ["second", "third", "fourth", None]


def test_threads_never_get_the_same_mask() -> None:
    stock: MasksAhead[int] = MasksAhead(most=3000)
    for number in range(3000):
        stock.put((FIRST, OTHER)[number % 2], number % 3, number)
    taken: list[int] = []

    def work() -> None:
        for product in (FIRST, OTHER):
            for rows in range(3):
                while (mask := stock.take(product, rows)) is not None:
                    taken.append(mask)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(taken) == Counter(range(3000))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_forked_child_and_its_parent_never_use_the_same_mask_drawn_ahead() -> None:
    source, operand = ShareSource(2, Q31), np.zeros((2, COLUMNS), np.int32)
    source.draw_ahead(FIRST, 2, V)

    def key() -> bytes:
        seed = source.hide_integers(operand, FIRST).shares[0].seed
        assert seed
        return seed.key

    keys = [in_a_child(key), in_a_child(key), key()]
    assert all(keys) and len(set(keys)) == 3


def test_another_process_has_none_of_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    stock: MasksAhead[str] = MasksAhead()
    stock.put(FIRST, 2, "mask")
    assert stock.of_this_process() is stock
    monkeypatch.setattr("blindtune.protocol.kernels.process._process", object())
    assert stock._process is not this_process()
    child = stock.of_this_process()
    assert child is not stock and child.take(FIRST, 2) is None
