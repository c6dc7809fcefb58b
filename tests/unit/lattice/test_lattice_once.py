"""No row of a mask is handed out twice, and no secret serves two blocks, whatever happens."""

import copy
import gc
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from lattice_reference import (
    PUBLIC_SEED,
    TOY,
    KnownRandomness,
    Worker,
    backward,
    block_of_masks,
    product,
    secrets_of,
)
from support.forked import in_a_child

from blindtune.protocol.kernels import process
from blindtune.protocol.lattice.parameters import DEGREE, MLWE1280, LatticeParameters
from blindtune.protocol.lattice.source import LatticeSource
from blindtune.protocol.lattice.stock import shared_rows
from blindtune.protocol.products import Product, forward_products

COLUMNS = 8
WHICH = product(COLUMNS)
HINT = np.zeros((1, 1, DEGREE, 16), np.int32)


def toy_source(
    randomness: Callable[[int], bytes] | None = None, kept_bytes: int = 1 << 28
) -> tuple[LatticeSource, KnownRandomness]:
    known = KnownRandomness()
    return LatticeSource(TOY, PUBLIC_SEED, lambda _: HINT, randomness or known, kept_bytes), known


def masks(source: LatticeSource, rows: int, which: Product = WHICH) -> list[bytes]:
    """Rows of masks: what is sent for an operand of zeros."""
    zero = np.zeros((rows, which.contraction), np.int32)
    return [row.tobytes() for row in source.hide_integers(zero, which).shares[0].residues]


def rows_of_blocks(secrets: list[bytes], which: Product = WHICH) -> list[bytes]:
    return [row.tobytes() for secret in secrets for row in block_of_masks(TOY, which, secret)]


def handed_out(secrets: list[bytes], operands: Sequence[int]) -> list[bytes]:
    """Rows of masks in the order of operands, which are handed out as the documentation says."""
    blocks = [[row.tobytes() for row in block_of_masks(TOY, WHICH, secret)] for secret in secrets]
    fresh, shared = iter(blocks), iter(list[bytes]())
    rows: list[bytes] = []
    for count in operands:
        last = count % DEGREE
        if last and 8 * (DEGREE - last) <= count:
            last = 0
        own = count - last
        for start in range(0, own, DEGREE):
            rows += next(fresh)[: min(DEGREE, own - start)]
        for _ in range(last):
            row = next(shared, None)
            if row is None:
                shared = iter(next(fresh))
                row = next(shared)
            rows.append(row)
    assert next(fresh, None) is None, "no block was drawn and not used"
    return rows


KEPT = pytest.mark.parametrize("kept_bytes", [0, 1 << 28], ids=["computed again", "kept"])


@KEPT
def test_short_operands_get_the_rows_of_a_block_in_order(kept_bytes: int) -> None:
    source, randomness = toy_source(kept_bytes=kept_bytes)
    drawn = []
    for rows in (1, 1, 3, 1, 60, 100, 1, 0, 89, 1):
        drawn += masks(source, rows)
        assert len(randomness.drawn) == math.ceil(len(drawn) / DEGREE)
    assert len(drawn) == DEGREE + 1
    assert drawn == rows_of_blocks(randomness.drawn)[: len(drawn)]


@KEPT
def test_operands_across_block_borders_get_each_row_once(kept_bytes: int) -> None:
    source, randomness = toy_source(kept_bytes=kept_bytes)
    operands = (200, 2, 256, 300, 700, 55, 1, 100, 400, 512, 255, 3)
    drawn = [row for rows in operands for row in masks(source, rows)]
    assert drawn == handed_out(randomness.drawn, operands)
    assert len(set(drawn)) == len(drawn)


@KEPT
def test_whole_blocks_and_last_ones_with_little_left_serve_one_operand(kept_bytes: int) -> None:
    """Or an operand could depend on noise of its own block, which Module-LWE says nothing about."""
    source, randomness = toy_source(kept_bytes=kept_bytes)
    operands = (1000, 5, 256, 240, 7, 300, 1000)
    drawn = [masks(source, rows) for rows in operands]
    place = {row: index // DEGREE for index, row in enumerate(rows_of_blocks(randomness.drawn))}
    served: dict[int, set[int]] = {}
    for operand, rows in enumerate(drawn):
        for row in rows:
            served.setdefault(place[row], set()).add(operand)
    assert [shared_rows(x) for x in operands] == [0, 5, 0, 0, 7, 44, 0]
    assert [sorted(x) for x in served.values() if len(x) > 1] == [[1, 4, 5]]


def test_what_is_given_up_is_at_most_an_eighth_of_an_operand() -> None:
    for rows in range(5000):
        shared = shared_rows(rows)
        assert shared in (0, rows % DEGREE)
        assert 8 * (-(rows - shared) % DEGREE) <= rows
    assert all(shared_rows(rows) == 0 for rows in (1000, 2048, *range(2040, 5000)))


@pytest.mark.parametrize("rows", [1, 7, 64, 256, 300])
def test_blocks_are_drawn_when_rows_are_needed_and_not_before(rows: int) -> None:
    source, randomness = toy_source()
    assert randomness.drawn == []
    for count in range(1, 30):
        masks(source, rows)
        shared = shared_rows(rows)
        own = (rows - shared) // DEGREE
        assert len(randomness.drawn) == count * own + math.ceil(count * shared / DEGREE)


def test_every_product_has_blocks_of_its_own() -> None:
    source, randomness = toy_source()
    products = [WHICH, product(COLUMNS, "other"), backward(COLUMNS)]
    products += forward_products(["layer", "other"], COLUMNS)
    drawn = {which: masks(source, 3, which) for which in products}
    assert len(randomness.drawn) == len(products)
    again = {which: masks(source, 3, which) for which in products}
    assert len(randomness.drawn) == len(products)
    for which, secret in zip(products, randomness.drawn, strict=True):
        assert drawn[which] + again[which] == rows_of_blocks([secret], which)[:6]


def test_the_same_product_described_twice_shares_a_block() -> None:
    source, randomness = toy_source()
    drawn = masks(source, 3, product(COLUMNS)) + masks(source, 3, product(COLUMNS))
    assert len(randomness.drawn) == 1 and len(set(drawn)) == 6


def test_one_secret_would_still_give_every_product_and_set_another_s_and_e() -> None:
    # The labels separate sub-streams even under randomness that repeats.
    stuck = bytes(range(32))
    larger = LatticeParameters(name="larger toy", rank=2, eta=2, security="none")
    seen = set()
    for parameters in (TOY, larger):
        for which in (WHICH, product(COLUMNS, "other"), backward(COLUMNS)):
            s, e = secrets_of(parameters, which, stuck, DEGREE)
            seen |= {s[0].tobytes(), e[0].tobytes()}
    assert len(seen) == 12
    source, _ = toy_source(lambda size: stuck)
    first = masks(source, 2 * DEGREE)
    assert first[:DEGREE] == first[DEGREE:]  # so fresh bytes are what keeps blocks apart
    assert set(masks(source, 5, product(COLUMNS, "other"))).isdisjoint(first)


def test_s_and_e_are_fresh_in_every_block() -> None:
    randomness = KnownRandomness()
    for _ in range(50):
        randomness(32)
    secrets = [secrets_of(MLWE1280, WHICH, secret, COLUMNS) for secret in randomness.drawn]
    for part in (0, 1):
        seen = [row.tobytes() for secret in secrets for row in secret[part]]
        assert len(set(seen)) == len(seen)


def test_the_public_matrix_does_not_depend_on_secrets_nor_they_on_it() -> None:
    # Even a secret equal to the public seed: its streams have keys of their own.
    source, _ = toy_source(lambda size: PUBLIC_SEED)
    drawn = np.frombuffer(b"".join(masks(source, DEGREE)), np.uint32).reshape(DEGREE, COLUMNS)
    other, _ = toy_source()
    a = other._public.packed(COLUMNS)
    assert np.array_equal(a, source._public.packed(COLUMNS))
    assert np.array_equal(drawn, block_of_masks(TOY, WHICH, PUBLIC_SEED))
    s, _ = secrets_of(TOY, WHICH, PUBLIC_SEED, COLUMNS)
    assert np.unique(s).size == 5


@KEPT
def test_a_deep_copy_takes_from_the_same_stock(kept_bytes: int) -> None:
    source, randomness = toy_source(kept_bytes=kept_bytes)
    model = {"layers": [source, source]}
    drawn = masks(source, 10)
    for _ in range(5):
        model = copy.deepcopy(model)
        drawn += masks(model["layers"][0], 7) + masks(copy.copy(source), 7) + masks(source, 7)
    assert len(randomness.drawn) == 1
    assert drawn == rows_of_blocks(randomness.drawn)[: len(drawn)]


def test_two_sources_with_one_public_seed_share_nothing() -> None:
    hints = {WHICH: HINT}
    a, b = (LatticeSource(TOY, PUBLIC_SEED, hints.__getitem__) for _ in range(2))
    drawn = [row for _ in range(30) for source in (a, b) for row in masks(source, 10)]
    assert len(set(drawn)) == len(drawn) == 600


@KEPT
def test_threads_that_hammer_one_source_never_share_a_row(kept_bytes: int) -> None:
    randomness = KnownRandomness()

    def slow(size: int) -> bytes:
        time.sleep(0.002)  # lets the other threads in, in the middle of a draw
        return randomness(size)

    source, _ = toy_source(slow, kept_bytes)
    drawn: list[list[bytes]] = [[], [], []]
    ready = threading.Barrier(len(drawn))

    def hammer(mine: list[bytes], seed: int) -> None:
        sizes = np.random.default_rng(seed).choice([1, 1, 2, 3, 17, 100, 256, 257, 300], 40)
        ready.wait()
        for rows in sizes:
            mine += masks(source, int(rows))

    threads = [threading.Thread(target=hammer, args=(mine, i)) for i, mine in enumerate(drawn)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = [row for mine in drawn for row in mine]
    assert len(set(randomness.drawn)) == len(randomness.drawn)
    assert len(set(together)) == len(together)
    # Nothing else was used, and of shared blocks all but what is left of the last one.
    whole = rows_of_blocks(randomness.drawn)
    assert set(together) <= set(whole)
    left = len(whole) - len(together)
    assert left < DEGREE


@KEPT
def test_threads_get_right_results_from_shared_blocks(kept_bytes: int) -> None:
    integers = np.random.default_rng(0).integers(-127, 128, (30, COLUMNS))
    worker = Worker(integers)
    hint = worker.hint(TOY, WHICH)
    source = LatticeSource(TOY, PUBLIC_SEED, lambda _: hint, kept_bytes=kept_bytes)
    bound = source.noise(int(np.abs(integers).sum(1).max()))
    worst: list[int] = []

    def work(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for rows in generator.choice([1, 2, 5, 90, 300], 40):
            x = generator.integers(-1000, 1000, (int(rows), COLUMNS)).astype(np.int32)
            masked = source.hide_integers(x, WHICH)
            result = masked.reveal_integers([worker.multiply(WHICH, masked.shares[0].residues)])
            worst.append(int(np.abs(result - x @ integers.T).max()))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(worst) == 120 and max(worst) <= bound


def test_rows_drawn_for_an_operand_that_failed_are_lost_and_not_reused() -> None:
    fail_at = [3]

    def unreliable(size: int) -> bytes:
        fail_at[0] -= 1
        if fail_at[0] == 0:
            raise OSError("no randomness")
        return known(size)

    known = KnownRandomness()
    source, _ = toy_source(unreliable)
    drawn = masks(source, 200)
    with pytest.raises(OSError, match="no randomness"):
        masks(source, 356)  # a block of its own, what is left of the first, and another one
    drawn += masks(source, 356)
    assert len(set(drawn)) == len(drawn) == 556
    blocks = rows_of_blocks(known.drawn)
    assert set(drawn) <= set(blocks) and drawn[200:] == blocks[2 * DEGREE : 2 * DEGREE + 356]


# Forks.


def split(answer: bytes) -> list[bytes]:
    size = 4 * COLUMNS
    return [answer[i : i + size] for i in range(0, len(answer), size)]


forking = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning"),
]


def apply(*marks: pytest.MarkDecorator) -> Callable:
    def decorate(test: Callable) -> Callable:
        for mark in marks:
            test = mark(test)
        return test

    return decorate


@apply(*forking)
@KEPT
def test_a_forked_child_takes_nothing_from_its_parents_stock(kept_bytes: int) -> None:
    source = LatticeSource(TOY, PUBLIC_SEED, lambda _: HINT, kept_bytes=kept_bytes)
    drawn = masks(source, 10)
    for _ in range(3):
        child = split(in_a_child(lambda: b"".join(masks(source, 10) + masks(source, 10))))
        assert len(child) == 20
        drawn += child + masks(source, 10)
    assert len(set(drawn)) == len(drawn) == 10 + 3 * 30


@apply(*forking)
def test_a_child_draws_its_own_bytes_and_the_parent_keeps_its_block() -> None:
    source, randomness = toy_source(lambda size: os.urandom(size))
    before = source._stock
    masks(source, 10)
    count = [0]
    urandom = os.urandom

    def counted(size: int) -> bytes:
        count[0] += 1
        return urandom(size)

    source._stock._random_bytes = counted  # type: ignore[assignment]

    def child() -> bytes:
        masks(source, 10)
        own = count[0]
        masks(source, 10)
        return bytes([own, count[0], source._stock is before])

    assert in_a_child(child) == bytes([1, 1, False])
    masks(source, 10)
    assert count[0] == 0 and source._stock is before
    assert randomness.drawn == []


@apply(*forking)
def test_grandchildren_and_a_fork_before_the_first_draw_share_nothing() -> None:
    source = LatticeSource(TOY, PUBLIC_SEED, lambda _: HINT)

    def draw() -> bytes:
        return b"".join(masks(source, 10))

    # The child forks before it has drawn anything itself.
    def child() -> bytes:
        return in_a_child(draw) + in_a_child(draw) + draw() + in_a_child(draw)

    drawn = split(in_a_child(draw)) + masks(source, 10) + split(in_a_child(child)) + masks(source, 10)
    assert len(set(drawn)) == len(drawn) == 10 * 7


@apply(*forking)
def test_a_child_forked_while_another_thread_draws_does_not_hang() -> None:
    started, release = threading.Event(), threading.Event()

    def slow(size: int) -> bytes:
        if threading.current_thread() is thread:
            started.set()
            release.wait(30)
        return os.urandom(size)

    source, _ = toy_source(slow)
    thread = threading.Thread(target=masks, args=(source, 5))
    thread.start()
    assert started.wait(30)  # the thread holds the lock
    try:
        assert len(split(in_a_child(lambda: b"".join(masks(source, 5))))) == 5
    finally:
        release.set()
        thread.join()


@apply(*forking)
def test_a_process_pool_that_forks_shares_nothing() -> None:
    source, _ = toy_source(os.urandom)
    drawn = masks(source, 10)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    children = [context.Process(target=lambda: queue.put(masks(source, 10))) for _ in range(2)]
    for child in children:
        child.start()
    for _ in children:
        drawn += queue.get()
    for child in children:
        child.join()
    drawn += masks(source, 10)
    assert len(set(drawn)) == len(drawn) == 40


# Memory.


@pytest.mark.parametrize("more", [0.0, 0.5, 0.99])
def test_kept_rows_stay_within_their_limit_and_go_with_their_blocks(more: float) -> None:
    limit = int((5 + more) * 4 * DEGREE * COLUMNS)
    source, _ = toy_source(kept_bytes=limit)

    def kept() -> int:
        gc.collect()
        return sum(array.nbytes for ref in source._stock._kept if (array := ref()) is not None)

    products = [product(COLUMNS, str(i)) for i in range(20)]
    for which in products:
        masks(source, 1, which)
    assert limit - 4 * DEGREE * COLUMNS < kept() <= limit
    for which in products:
        masks(source, 128, which)
        masks(source, 127, which)
    assert kept() == 0
    masks(source, 1000, products[0])
    assert kept() == 0, "what is given up is not kept"
    for which in products[:3]:
        masks(source, 2, which)
    assert kept() == 3 * 4 * COLUMNS * (DEGREE - 2)


def test_operands_that_fill_their_blocks_leave_nothing_behind() -> None:
    source, _ = toy_source()
    masks(source, DEGREE)
    masks(source, 3 * DEGREE)
    gc.collect()
    assert source._stock._blocks == {}
    assert all(ref() is None for ref in source._stock._kept)


def test_kept_and_computed_rows_give_the_same_bytes_and_results() -> None:
    integers = np.random.default_rng(0).integers(-127, 128, (30, COLUMNS))
    worker = Worker(integers)
    hint = worker.hint(TOY, WHICH)
    results = []
    for kept_bytes in (0, 6_000, 1 << 28):
        source = LatticeSource(TOY, PUBLIC_SEED, lambda _: hint, KnownRandomness(), kept_bytes)
        mine = []
        for rows in (1, 2, 100, 200, 1, 1, 500, 700, 290):
            masked = source.hide_integers(np.full((rows, COLUMNS), 77, np.int32), WHICH)
            answer = worker.multiply(WHICH, masked.shares[0].residues)
            mine += [masked.shares[0].residues.tobytes(), masked.reveal_integers([answer]).tobytes()]
        results.append(mine)
    assert results[0] == results[1] == results[2]


def test_a_process_is_told_from_its_parent_by_more_than_its_number() -> None:
    # Numbers of processes are used again; the mark of this one is an object that a fork replaces.
    source, _ = toy_source()
    stock = source._stock
    assert stock.of_this_process() is stock
    mark = process._process
    try:
        process._become_another()
        assert stock.of_this_process() is not stock
    finally:
        process._process = mark
    assert stock.of_this_process() is stock
