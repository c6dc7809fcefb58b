"""Asking for shares before their operand is known: the same results, and nothing that could be mixed up."""

import threading
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.transports import LocalWorker, manifest_of, remote_multiplier

from blindtune.checkpoint import Checkpoint
from blindtune.client.kit.kit import Kit
from blindtune.client.operators.policy import Failure
from blindtune.client.operators.transport import TransportError
from blindtune.client.rounds.answers_ahead import AnswersAhead, ProductOrder
from blindtune.client.rounds.multiplier import ReferenceMultiplier, RemoteMultiplier
from blindtune.errors import OperatorUnavailableError
from blindtune.protocol.expansion import Seed
from blindtune.protocol.fixed_point import square_budget
from blindtune.protocol.masks import Share
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.operands import SeededRows
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Product, backward_products, forward_products
from blindtune.protocol.shares.source import ShareSource

ATTENTION = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
(FORWARD,) = forward_products(ATTENTION, 32)
(BACKWARD,) = backward_products(zip(ATTENTION, (32, 16, 16), strict=True))
STEP = (FORWARD, BACKWARD)
BUDGET = square_budget(Q31, 64 * 127 * 127)


def _x(product: Product, rows: int = 5, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, product.contraction)).astype(np.float32)


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> ReferenceMultiplier:
    return ReferenceMultiplier(checkpoint, Q31)


def _multiplier(kit: Kit, workers: list[LocalWorker], retry_seconds: float = 60.0) -> RemoteMultiplier:
    return remote_multiplier(kit, [[worker] for worker in workers], retry_seconds, ask_ahead=True)


def _settle(multiplier: RemoteMultiplier) -> None:
    """Waits for what was asked for ahead, so that it has been seen by its worker."""
    assert multiplier._ahead is not None
    for pending in list(multiplier._ahead._pending.values()):
        pending.exception()


@pytest.mark.parametrize("operators", [2, 3])
def test_results_are_the_references_and_masks_are_asked_for_before_their_operand(
    kit: Kit, honest: Multiplier, reference: ReferenceMultiplier, operators: int
) -> None:
    workers = [LocalWorker(honest, manifest_of(kit)) for _ in range(operators)]
    multiplier = _multiplier(kit, workers)
    asked_before = []
    for number in range(8):
        product = STEP[number % 2]
        x = _x(product, seed=number)
        _settle(multiplier)
        asked_before.append(len(workers[0].requests) - number)
        assert np.array_equal(
            multiplier.multiply_reals(x, product, BUDGET), reference.multiply_reals(x, product, BUDGET)
        )
    # The order is known once it was seen: after forward comes backward, and after that forward.
    assert asked_before == [0, 0, 0, 1, 1, 1, 1, 1]
    _settle(multiplier)
    *seeds, rows = workers
    for worker in seeds:
        keys = [request.share.seed.key for request in worker.requests if request.share.seed]
        assert len(set(keys)) == len(keys) == 9  # the last one is in vain
        assert [request.product for request in worker.requests] == [STEP[i % 2] for i in range(9)]
    assert len(rows.requests) == 8 and not any(request.share.seed for request in rows.requests)


def test_nothing_is_asked_ahead_unless_it_is_wanted(kit: Kit, honest: Multiplier) -> None:
    workers = [LocalWorker(honest, manifest_of(kit)) for _ in range(2)]
    multiplier = remote_multiplier(kit, [[worker] for worker in workers])
    for number in range(6):
        multiplier.multiply_reals(_x(STEP[number % 2]), STEP[number % 2], BUDGET)
    assert [len(worker.requests) for worker in workers] == [6, 6]


def test_a_mask_for_other_rows_waits_for_an_operand_that_has_as_many(
    kit: Kit, honest: Multiplier, reference: ReferenceMultiplier
) -> None:
    workers = [LocalWorker(honest, manifest_of(kit)) for _ in range(2)]
    multiplier = _multiplier(kit, workers)
    for rows in (5, 5, 5, 3, 5, 3, 3, 5):
        for product in STEP:
            x = _x(product, rows, seed=rows)
            found = multiplier.multiply_reals(x, product, BUDGET)
            assert np.array_equal(found, reference.multiply_reals(x, product, BUDGET))
    _settle(multiplier)
    keys = [request.share.seed.key for request in workers[0].requests if request.share.seed]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(("operators", "failing"), [(2, 0), (3, 0), (3, 1)])
def test_what_failed_ahead_is_asked_for_again_with_the_same_bytes(
    kit: Kit, honest: Multiplier, reference: ReferenceMultiplier, operators: int, failing: int
) -> None:
    workers = [LocalWorker(honest, manifest_of(kit)) for _ in range(operators)]
    worker = workers[failing]
    multiplier = _multiplier(kit, workers, retry_seconds=0.0)
    for product in STEP:
        multiplier.multiply_reals(_x(product), product, BUDGET)

    def fail_the_second(request: Any) -> None:
        # The first of the next two is for the operand, the second is ahead of one.
        worker.before = fail_now

    def fail_now(request: Any) -> None:
        worker.before = lambda request: None
        raise TransportError(Failure.UNREACHABLE, "UNAVAILABLE: restarts")

    worker.before = fail_the_second
    multiplier.multiply_reals(_x(FORWARD), FORWARD, BUDGET)
    _settle(multiplier)
    failed = worker.requests[-1]
    x = _x(BACKWARD)
    found = multiplier.multiply_reals(x, BACKWARD, BUDGET)
    assert np.array_equal(found, reference.multiply_reals(x, BACKWARD, BUDGET))
    _settle(multiplier)
    again = [request for request in worker.requests if request.share is failed.share]
    assert len(again) == 2 and again[1].product == BACKWARD


def test_what_fails_again_fails_the_operand(
    kit: Kit, honest: Multiplier, reference: ReferenceMultiplier
) -> None:
    workers = [LocalWorker(honest, manifest_of(kit)) for _ in range(2)]
    multiplier = _multiplier(kit, workers, retry_seconds=0.0)
    for product in (*STEP, *STEP[:1]):
        multiplier.multiply_reals(_x(product), product, BUDGET)
        _settle(multiplier)
    workers[0].failures += [TransportError(Failure.UNREACHABLE, "UNAVAILABLE: gone")] * 50
    x = _x(BACKWARD)
    # The mask of this operand was multiplied before the worker went away; that of the next one was not.
    found = multiplier.multiply_reals(x, BACKWARD, BUDGET)
    assert np.array_equal(found, reference.multiply_reals(x, BACKWARD, BUDGET))
    with pytest.raises(OperatorUnavailableError, match="alpha"):
        multiplier.multiply_reals(_x(FORWARD), FORWARD, BUDGET)


def test_what_cannot_be_asked_ahead_does_not_fail_the_operand_before_it(
    kit: Kit, honest: Multiplier, reference: ReferenceMultiplier, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = [LocalWorker(honest, manifest_of(kit)) for _ in range(2)]
    multiplier = _multiplier(kit, workers)
    for product in (*STEP, *STEP):
        multiplier.multiply_reals(_x(product), product, BUDGET)

    def no_memory(*arguments: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(ShareSource, "draw_ahead", no_memory)
    for product in STEP:
        found = multiplier.multiply_reals(_x(product), product, BUDGET)
        assert np.array_equal(found, reference.multiply_reals(_x(product), product, BUDGET))


def test_a_closed_multiplier_keeps_no_answers_and_blames_no_worker(
    kit: Kit, honest: Multiplier, caplog: pytest.LogCaptureFixture
) -> None:
    workers = [LocalWorker(honest, manifest_of(kit)) for _ in range(2)]
    multiplier = _multiplier(kit, workers)
    for product in (*STEP, *STEP[:1]):
        multiplier.multiply_reals(_x(product), product, BUDGET)
    _settle(multiplier)
    (closing,) = {operator for operator in multiplier._operators if operator.index == 0}

    def close_now(request: Any) -> None:
        closing._closed.set()
        raise TransportError(Failure.UNREACHABLE, "CANCELLED: Channel closed!")

    inside = threading.Event()
    workers[0].before = lambda request: (inside.set(), close_now(request))
    multiplier.multiply_reals(_x(BACKWARD), BACKWARD, BUDGET)  # and FORWARD is asked for ahead
    assert inside.wait(60)
    multiplier.close()
    assert multiplier._ahead is not None and not multiplier._ahead._pending
    assert not caplog.records
    assert closing.statistics.failures == {}
    assert not any(state.in_flight for state in closing._policy._workers)


def test_next_to_other_rounds_nothing_is_asked_ahead(kit: Kit, honest: Multiplier) -> None:
    workers = [LocalWorker(honest, manifest_of(kit)) for _ in range(2)]
    multiplier = _multiplier(kit, workers)
    for product in (*STEP, *STEP):
        multiplier.multiply_reals(_x(product), product, BUDGET)
    _settle(multiplier)
    held, inside = threading.Event(), threading.Event()

    def hold(request: Any) -> None:
        inside.set()
        held.wait(60)

    workers[1].before = hold
    first = threading.Thread(
        target=lambda: multiplier.multiply_reals(_x(FORWARD, 2), FORWARD, BUDGET), name="first"
    )
    first.start()
    assert inside.wait(60)
    workers[1].before = lambda request: None

    def asked() -> list[Product]:
        return [request.product for request in workers[0].requests if request.share.shape[0] == 5]

    before = asked()
    multiplier.multiply_reals(_x(FORWARD), FORWARD, BUDGET)  # its mask is there since the steps above
    _settle(multiplier)
    assert asked() == before
    held.set()
    first.join()
    multiplier.multiply_reals(_x(BACKWARD), BACKWARD, BUDGET)
    _settle(multiplier)
    assert asked() == [*before, BACKWARD, FORWARD]


def test_the_order_of_products_is_each_threads_own_and_skips_changes_of_rows() -> None:
    order = ProductOrder()
    assert [order.following(x, 5) for x in (FORWARD, BACKWARD)] == [None, None]
    elsewhere = threading.Thread(target=lambda: order.following(BACKWARD, 5))
    elsewhere.start()
    elsewhere.join()
    assert order.following(FORWARD, 5) is BACKWARD
    assert order.following(BACKWARD, 4) is FORWARD
    assert order.following(FORWARD, 4) is None


def test_a_product_with_two_successors_has_none_to_rely_on() -> None:
    # As with gradient checkpointing, where a block is computed again before its backward pass.
    order, (other,) = ProductOrder(), forward_products(ATTENTION[:1], 32)
    found = [order.following(x, 5) for _ in range(3) for x in (FORWARD, other, FORWARD, BACKWARD)]
    assert found[4::4] == [None] * 2 and found[6::4] == [None, None]
    assert found[5::4] == [FORWARD] * 2 and found[7::4] == [FORWARD] * 2


def test_answers_that_are_too_many_or_take_too_much_memory_are_let_go_of_oldest_first() -> None:
    class Answer:
        def __init__(self, nbytes: int) -> None:
            self.nbytes = nbytes

    ahead = AnswersAhead(most_bytes=100)
    shares = [Share(0, SeededRows(Seed(bytes(32), Q31), 1, 1)) for _ in range(4)]
    for share, nbytes in zip(shares, (60, 30, 40, 500), strict=True):
        ahead.put(share, Answer(nbytes))  # type: ignore[arg-type]
        if nbytes == 40:
            assert ahead.take(shares[0]) is None and ahead.take(shares[1]) is not None
    kept = ahead.take(shares[3])
    assert kept is not None and kept.nbytes == 500
    assert ahead.take(shares[2]) is None and ahead.take(shares[3]) is None
    few = AnswersAhead(most=2)
    for share in shares:
        few.put(share, Answer(1))  # type: ignore[arg-type]
    assert [few.take(share) is None for share in shares] == [True, True, False, False]
