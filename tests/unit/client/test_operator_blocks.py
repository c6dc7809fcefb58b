"""Operands cut into blocks over replicas, and answers that are verified while they arrive."""

import pickle
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.buffers import WatchedBuffers
from support.transports import LocalWorker, VirtualTime, remote_multiplier

from blindtune.client.kit.kit import Kit
from blindtune.client.operators.buffers import Buffers
from blindtune.client.operators.decisions import Failure
from blindtune.client.operators.lanes import cut
from blindtune.client.operators.manifest import Expectations
from blindtune.client.operators.messages import WorkRequest
from blindtune.client.operators.operator import OperatorClient
from blindtune.client.operators.transport import StopRequest, Transport, TransportError
from blindtune.errors import OperatorUnavailableError
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Product, forward_products
from blindtune.protocol.residues import Centred, Residues
from blindtune.protocol.shares.source import ShareSource
from blindtune.protocol.shares.unmasked import UnmaskedSource

ATTENTION = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
(FORWARD,) = forward_products(ATTENTION, 32)
PATIENCE = 60.0  # seconds until a test that hangs fails; no test takes anywhere near as long


def _operand(rows: int, seed: int = 0) -> Centred:
    generator = np.random.default_rng(seed)
    return generator.integers(-(10**6), 10**6, (rows, FORWARD.contraction)).astype(np.int32)


def _expected(honest: Multiplier, operand: Centred) -> Centred:
    masked = UnmaskedSource(Q31).hide_integers(operand, FORWARD)
    return masked.reveal_integers([honest.multiply(FORWARD, masked.shares[0].residues, Q31)])


def _client(kit: Kit, workers: list[Transport]) -> OperatorClient:
    clock = VirtualTime()
    layers = {name: layer.fingerprint for name, layer in kit.layers.items()}
    expected = Expectations("tiny", kit.description.fingerprint, Q31.name, layers)
    named = [(f"10.0.0.{i}:7100", worker) for i, worker in enumerate(workers)]
    return OperatorClient(
        0, "alpha", named, expected, 60.0, 60.0, clock=clock.clock, sleep=clock.sleep, later=clock.later
    )


def _request(kit: Kit, rows: int) -> WorkRequest:
    share = ShareSource(2, Q31).hide_integers(_operand(rows), FORWARD).shares[0]
    return WorkRequest(kit.description.fingerprint, Q31.name, FORWARD, share, 64)


def _answer(honest: Multiplier, request: WorkRequest) -> Residues:
    return honest.multiply(FORWARD, request.share.residues, Q31)


@given(
    rows=st.integers(1, 10_000),
    most=st.integers(1, 5000),
    least=st.integers(1, 300),
    parts=st.integers(1, 20),
)
def test_blocks_cover_all_rows_in_order_and_are_neither_too_long_nor_too_short(
    rows: int, most: int, least: int, parts: int
) -> None:
    blocks = cut(rows, most, least, parts)
    assert blocks[0][0] == 0 and blocks[-1][1] == rows
    assert all(stop == first for (_, stop), (first, _) in pairwise(blocks))
    sizes = [stop - first for first, stop in blocks]
    assert 0 < min(sizes) and max(sizes) <= most and max(sizes) - min(sizes) <= 1
    if len(blocks) > 1 and rows <= most:
        assert min(sizes) >= least and len(blocks) <= parts


def test_rows_split_over_replicas_give_the_same_product(kit: Kit, honest: Multiplier) -> None:
    workers = [[LocalWorker(honest) for _ in range(count)] for count in (2, 3)]
    multiplier = remote_multiplier(kit, workers)
    operand = _operand(2000)
    assert np.array_equal(multiplier.multiply_integers(operand, FORWARD), _expected(honest, operand))
    for replicas in workers:
        requests = [request for worker in replicas for request in worker.requests]
        assert len(requests) > 1
        assert sum(len(request.share.residues) for request in requests) == 2000
        assert min(len(request.share.residues) for request in requests) >= 256
    offsets = [x.share.seed.row_offset for worker in workers[0] for x in worker.requests if x.share.seed]
    assert len(offsets) == len(set(offsets)) > 1 and min(offsets) == 0


def test_one_mask_is_drawn_for_an_operand_however_it_is_split(kit: Kit, honest: Multiplier) -> None:
    workers = [[LocalWorker(honest) for _ in range(2)] for _ in range(2)]
    multiplier = remote_multiplier(kit, workers)
    drawn = []
    mask = multiplier.source.hide_integers

    def watched(operand: Centred, product: Product) -> object:
        drawn.append(mask(operand, product))
        return drawn[-1]

    multiplier.source.hide_integers = watched  # type: ignore[method-assign,assignment]
    multiplier.multiply_integers(_operand(1024), FORWARD)
    (masked,) = drawn
    for replicas, share in zip(workers, masked.shares, strict=True):
        for request in (request for worker in replicas for request in worker.requests):
            if share.seed is not None:
                assert request.share.seed is not None and request.share.seed.key == share.seed.key
            else:
                assert request.share.residues.base is share.residues


def test_a_faster_replica_answers_more_blocks(kit: Kit, honest: Multiplier) -> None:
    others_done = threading.Event()
    slow, fast = LocalWorker(honest), LocalWorker(honest)
    slow.before = lambda request: others_done.wait(PATIENCE) and None

    def answered(request: WorkRequest) -> None:
        if len(fast.requests) == 7:
            others_done.set()

    fast.before = answered
    client = _client(kit, [slow, fast])
    request = _request(kit, 8 * 256)
    result = client.multiply(request, kit.check_vectors(FORWARD, Q31))
    assert np.array_equal(result, _answer(honest, request))
    assert (len(slow.requests), len(fast.requests)) == (1, 7)


@pytest.mark.parametrize("failing", [0, 1], ids=["in the first lane", "in another lane"])
def test_all_blocks_have_ended_when_one_of_them_fails_and_no_other_begins(
    kit: Kit, honest: Multiplier, failing: int
) -> None:
    both = threading.Barrier(2, timeout=PATIENCE)
    failed, finished = threading.Event(), threading.Event()

    def fail(request: WorkRequest) -> None:
        both.wait()
        failed.set()
        raise RuntimeError("a bug of this client")

    def last(request: WorkRequest) -> None:
        both.wait()
        failed.wait(PATIENCE)
        time.sleep(0.2)
        finished.set()

    workers = [LocalWorker(honest, before=last), LocalWorker(honest, before=last)]
    workers[failing].before = fail
    client = _client(kit, [*workers])
    with pytest.raises(RuntimeError, match="a bug"):
        client.multiply(_request(kit, 8 * 256), kit.check_vectors(FORWARD, Q31))
    assert finished.is_set()
    assert [len(worker.requests) for worker in workers] == [1, 1]


def test_a_block_that_fails_goes_to_a_replica_with_the_same_bytes(kit: Kit, honest: Multiplier) -> None:
    gone = TransportError(Failure.UNREACHABLE, "UNAVAILABLE: connection reset")
    failing, replica = LocalWorker(honest, failures=[gone]), LocalWorker(honest)
    client = _client(kit, [failing, replica])
    request = _request(kit, 1024)
    assert np.array_equal(client.multiply(request, kit.check_vectors(FORWARD, Q31)), _answer(honest, request))
    assert failing.requests[0] in replica.requests + failing.requests[1:]
    assert client.statistics.retries == 1


def test_operands_at_the_same_time_ask_no_worker_for_more_than_it_lets_in(
    kit: Kit, honest: Multiplier
) -> None:
    lock = threading.Lock()
    inside = most = 0

    class Counting(LocalWorker):
        def multiply(
            self,
            request: WorkRequest,
            timeout: float,
            answer: NDArray[np.uint32],
            stop: StopRequest | None = None,
        ) -> Generator[int, None, None]:
            nonlocal inside, most
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.01)
            yield from super().multiply(request, timeout, answer, stop)
            with lock:
                inside -= 1

    multiplier = remote_multiplier(kit, [[Counting(honest)], [LocalWorker(honest)]])
    operands = [_operand(5, seed) for seed in range(16)]
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda operand: multiplier.multiply_integers(operand, FORWARD), operands))
    for operand, result in zip(operands, results, strict=True):
        assert np.array_equal(result, _expected(honest, operand))
    assert 1 < most <= 4
    assert multiplier.rounds().count == 16


def test_rounds_that_overlap_take_their_time_once(kit: Kit, honest: Multiplier) -> None:
    both = threading.Barrier(2, timeout=PATIENCE)

    def together(request: WorkRequest) -> None:
        both.wait()
        time.sleep(0.1)

    multiplier = remote_multiplier(kit, [[LocalWorker(honest, before=together)], [LocalWorker(honest)]])
    kit.check_vectors(FORWARD, Q31)
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda seed: multiplier.multiply_integers(_operand(3, seed), FORWARD), range(2)))
    rounds = multiplier.rounds()
    assert rounds.count == 2
    assert 0.1 <= rounds.seconds <= time.monotonic() - started


class RowByRow(LocalWorker):
    """Lets one row after the other arrive, and notes how far it got.

    Attributes:
        wrong: the row that is not the product.
        sent: rows that arrived.
        ended: whether it was told that nobody waits for more.
    """

    wrong: int | None = None
    sent = 0
    ended = False
    stops_after = 1 << 30

    def multiply(
        self,
        request: WorkRequest,
        timeout: float,
        answer: NDArray[np.uint32],
        stop: StopRequest | None = None,
    ) -> Generator[int, None, None]:
        self.requests.append(request)
        right = self.multiplier.multiply(request.product, request.share.residues, Q31)
        if self.wrong is not None:
            right[self.wrong, -1] ^= 1
        try:
            for row in range(min(len(right), self.stops_after)):
                answer[row] = right[row]
                self.sent = row + 1
                yield self.sent
        finally:
            self.ended = True


@pytest.mark.parametrize("wrong", range(6))
def test_a_wrong_row_fails_its_answer_at_once_wherever_it_is(
    kit: Kit, honest: Multiplier, wrong: int, caplog: pytest.LogCaptureFixture
) -> None:
    liar, replica = RowByRow(honest), RowByRow(honest)
    liar.wrong = wrong
    client = _client(kit, [liar, replica])
    request = _request(kit, 6)
    assert np.array_equal(client.multiply(request, kit.check_vectors(FORWARD, Q31)), _answer(honest, request))
    assert client.statistics.lies == ("10.0.0.0:7100",)
    # What it would still have said is not waited for.
    assert liar.sent == wrong + 1 and liar.ended
    assert replica.requests == liar.requests == [request]
    assert client.statistics.bytes_received == (wrong + 1 + 6) * 64 * 4
    assert wrong == 0 or f"from row {wrong} on" in caplog.text


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_transport_that_ends_before_the_last_row_gives_no_answer(
    kit: Kit, honest: Multiplier, rows: int
) -> None:
    short, replica = RowByRow(honest), RowByRow(honest)
    short.stops_after = rows
    client = _client(kit, [short, replica])
    request = _request(kit, 6)
    assert np.array_equal(client.multiply(request, kit.check_vectors(FORWARD, Q31)), _answer(honest, request))
    assert client.statistics.lies == ("10.0.0.0:7100",)


def test_an_answers_memory_serves_again_once_it_is_released_and_not_before(
    kit: Kit, honest: Multiplier
) -> None:
    client, check = _client(kit, [LocalWorker(honest)]), kit.check_vectors(FORWARD, Q31)
    requests = [_request(kit, 6) for _ in range(3)]
    first, second = (client.start(request, check) for request in requests[:2])
    assert not np.shares_memory(first.result(), second.result())
    released = first.result()
    first.release()
    third = client.start(requests[2], check)
    assert third.result() is released
    assert np.array_equal(second.result(), _answer(honest, requests[1]))
    assert np.array_equal(third.result(), _answer(honest, requests[2]))


def test_only_so_much_memory_is_kept_for_answers_and_the_oldest_goes_first() -> None:
    buffers = Buffers(most_bytes=2 * 40)
    arrays = [buffers.take(1, 10) for _ in range(3)]
    for array in arrays:
        buffers.give(array)
    buffers.give(np.empty((3, 10), np.uint32))  # larger than all that may be kept
    assert buffers.take(1, 10) is arrays[2]
    assert buffers.take(1, 10) is arrays[1]
    assert buffers.take(1, 10) is not arrays[0]


def test_results_of_earlier_products_do_not_change_with_later_ones(kit: Kit, honest: Multiplier) -> None:
    multiplier = remote_multiplier(kit, [[LocalWorker(honest)] for _ in range(2)])
    misused: list[str] = []
    watched = [WatchedBuffers(misused.append).given_to(x) for x in multiplier._operators]
    operands = [_operand(6, seed) for seed in range(4)]
    results = [multiplier.multiply_integers(operand, FORWARD) for operand in operands]
    for operand, result in zip(operands, results, strict=True):
        assert np.array_equal(result, _expected(honest, operand))
    for buffers in watched:
        buffers.judge()
    assert not misused


class _GoesBack(LocalWorker):
    """Overwrites rows that it said were there, and counts from an earlier one."""

    def multiply(
        self,
        request: WorkRequest,
        timeout: float,
        answer: NDArray[np.uint32],
        stop: StopRequest | None = None,
    ) -> Generator[int, None, None]:
        yield from super().multiply(request, timeout, answer, stop)
        answer[:2] = 1
        yield 1
        yield len(answer)


def test_rows_that_were_verified_are_not_taken_back(kit: Kit, honest: Multiplier) -> None:
    client = _client(kit, [_GoesBack(honest), LocalWorker(honest)])
    request = _request(kit, 8)
    answer = client.multiply(request, kit.check_vectors(FORWARD, Q31))
    assert np.array_equal(answer, honest.multiply(FORWARD, request.share.residues, Q31))
    assert client.statistics.excluded


def test_a_closed_operator_is_asked_for_nothing(kit: Kit, honest: Multiplier) -> None:
    worker = LocalWorker(honest)
    client = _client(kit, [worker])
    client.close()
    with pytest.raises(OperatorUnavailableError, match="was closed"):
        client.multiply(_request(kit, 8), kit.check_vectors(FORWARD, Q31))
    assert not worker.requests


def test_a_share_stays_what_it_is(kit: Kit) -> None:
    share = _request(kit, 8).share
    for name in ("recipient", "shape", "seed", "residues", "expected"):
        with pytest.raises(AttributeError):
            setattr(share, name, None)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(share)
