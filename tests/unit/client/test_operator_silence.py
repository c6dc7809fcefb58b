"""Workers that take a request and say nothing: what is sent meanwhile, and whose answer counts."""

import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.buffers import WatchedBuffers
from support.transports import LocalWorker, VirtualTime

from benchmarks.resilience.silent_worker import SilentServer
from blindtune.client.config.blind_config import Operator
from blindtune.client.kit.kit import Kit
from blindtune.client.operators import habits, policy
from blindtune.client.operators.decisions import Failure
from blindtune.client.operators.manifest import Expectations
from blindtune.client.operators.messages import WorkRequest
from blindtune.client.operators.operator import OperatorClient
from blindtune.client.operators.timers import Timers
from blindtune.client.operators.transport import GrpcTransport, StopRequest, Transport, TransportError
from blindtune.client.rounds.connect import expectations
from blindtune.client.rounds.multiplier import RemoteMultiplier
from blindtune.errors import OperatorUnavailableError
from blindtune.protocol.masks import Share
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Direction, Product, Span, forward_products
from blindtune.protocol.shares.source import ShareSource
from blindtune.protocol.verification import CheckVectors, check_vectors, secret_vectors
from blindtune.protocol.weights import IntegerLayer
from blindtune.server.daemon import serve
from blindtune.server.store import LayerStore
from blindtune.server.transport import Endpoint

ATTENTION = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
(FORWARD,) = forward_products(ATTENTION, 32)
TEST_SECONDS = 30.0  # until a test that hangs fails
GONE = TransportError(Failure.UNREACHABLE, "UNAVAILABLE: connection reset")


class Stuck(LocalWorker):
    """Answers until it is told to be silent, and then only when it is told to go on or is stopped.

    Attributes:
        silent: whether it is.
        acknowledges: whether it says at once that a request has a place.
        was_heard: whether the client has taken note of that.
        says: what it does with an answer before that comes.
        first: how many rows it answers at once all the same.
        lies_late: whether it gives a wrong answer at the moment when it is stopped.
        ended: how many requests are over, whatever came of them.
    """

    silent = False
    acknowledges = False
    was_heard = False
    first = 0
    lies_late = False
    ended = 0

    def __init__(self, multiplier: Multiplier) -> None:
        super().__init__(multiplier)
        self.says: Callable[[NDArray[np.uint32]], None] = lambda answer: None
        self.goes_on = threading.Event()

    def multiply(
        self,
        request: WorkRequest,
        timeout: float,
        answer: NDArray[np.uint32],
        stop: StopRequest | None = None,
    ) -> Generator[int, None, None]:
        if not self.silent:
            yield from super().multiply(request, timeout, answer, stop)
            return
        self.requests.append(request)
        assert stop is not None
        stop.by(self.goes_on.set)
        right = self.multiplier.multiply(request.product, request.share.residues, Q31)
        try:
            if self.acknowledges:
                yield 0
                self.was_heard = True
            if self.first:
                answer[: self.first] = right[: self.first]
                yield self.first
            assert self.goes_on.wait(TEST_SECONDS)
            if stop.called:
                answer[:] = 7  # too late: what it still writes is nobody's
                if self.lies_late:
                    yield len(answer)
                raise TransportError(Failure.UNREACHABLE, "CANCELLED")
            if self.failures:
                raise self.failures.pop(0)
            answer[self.first :] = right[self.first :]
            self.says(answer)
            yield len(answer)
        finally:
            self.ended += 1


class Setting:
    """An operator of two workers that answered some requests, and a clock that the test moves."""

    def __init__(self, kit: Kit, honest: Multiplier, index: int = 1) -> None:
        self.kit, self.honest, self.time = kit, honest, VirtualTime()
        self.workers = [Stuck(honest), Stuck(honest)]
        named: list[tuple[str, Transport]] = [
            (f"10.0.0.{i}:7100", worker) for i, worker in enumerate(self.workers)
        ]
        self.client = OperatorClient(
            index,
            "alpha",
            named,
            expectations(kit, Q31),
            60.0,
            300.0,
            clock=self.time.clock,
            sleep=self.time.sleep,
            later=self.time.later,
        )
        self.misused: list[str] = []
        self.buffers = WatchedBuffers(self.misused.append).given_to(self.client)
        self.check = kit.check_vectors(FORWARD, Q31)
        self.index = index
        for _ in range(60):
            self.client.multiply(self.request(), self.check)
        for worker in self.workers:
            worker.requests.clear()
        self.before = self.client.statistics

    def request(self, rows: int = 4) -> WorkRequest:
        operand = np.random.default_rng().integers(-1000, 1000, (rows, FORWARD.contraction)).astype(np.int32)
        share = ShareSource(2, Q31).hide_integers(operand, FORWARD).shares[self.index]
        return WorkRequest(self.kit.description.fingerprint, Q31.name, FORWARD, share, 64)

    def ask(self, meanwhile: Callable[[], None]) -> None:
        """Asks for a product, does something once a worker that is silent has it, and checks the answer."""
        request = self.request()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(self.client.multiply, request, self.check)
            wait_until(lambda: any(x.silent and x.requests for x in self.workers))
            meanwhile()
            answer = asked.result(TEST_SECONDS)
        assert np.array_equal(answer, self.honest.multiply(FORWARD, request.share.residues, Q31))
        for worker in self.workers:
            assert all(x is request for x in worker.requests), "other bytes than those"
        assert [x.in_flight for x in self.client._policy._workers] == [0, 0]
        self.buffers.judge()
        assert not self.misused

    def figures(self) -> dict[str, int]:
        """What was counted since the beginning."""
        now, before = self.client.statistics, self.before
        names = ("requests", "retries", "hedges", "hedges_won", "verified_responses")
        return {name: getattr(now, name) - getattr(before, name) for name in names}


def wait_until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + TEST_SECONDS
    while not what():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture(params=[0, 1], ids=["seeds", "residues"])
def setting(kit: Kit, honest: Multiplier, request: pytest.FixtureRequest) -> Iterator[Setting]:
    found = Setting(kit, honest, request.param)
    found.workers[0].silent = True
    yield found
    found.client.close()


def test_a_replica_answers_the_same_bytes_while_the_first_worker_is_silent(setting: Setting) -> None:
    silent, replica = setting.workers
    setting.ask(lambda: setting.time.sleep(1.0))
    assert len(silent.requests) == len(replica.requests) == silent.ended == 1
    assert setting.figures() == {
        "requests": 2,
        "retries": 0,
        "hedges": 1,
        "hedges_won": 1,
        "verified_responses": 1,
    }
    # What the loser wrote when it was stopped is not in an answer that comes later either.
    silent.silent = False
    request = setting.request()
    answer = setting.client.multiply(request, setting.check)
    assert np.array_equal(answer, setting.honest.multiply(FORWARD, request.share.residues, Q31))


def test_the_first_worker_wins_if_it_answers_before_its_replica(setting: Setting) -> None:
    silent, replica = setting.workers
    replica.silent = True

    def meanwhile() -> None:
        setting.time.sleep(1.0)
        wait_until(lambda: bool(replica.requests))
        silent.goes_on.set()

    setting.ask(meanwhile)
    assert replica.ended == 1, "the loser has ended when the answer is there"
    assert setting.figures()["hedges"] == 1 and setting.figures()["hedges_won"] == 0


def wrong(answer: NDArray[np.uint32]) -> None:
    answer[-1, -1] ^= 1


def test_a_replica_that_lies_when_asked_early_is_out_and_the_first_worker_is_waited_for(
    setting: Setting,
) -> None:
    silent, replica = setting.workers
    replica.silent, replica.says = True, wrong

    def meanwhile() -> None:
        setting.time.sleep(1.0)
        replica.goes_on.set()
        wait_until(lambda: setting.client.statistics.lies == ("10.0.0.1:7100",))
        assert setting.client._policy.is_excluded(1)
        silent.goes_on.set()

    setting.ask(meanwhile)
    assert setting.figures()["requests"] == 2 and setting.figures()["hedges_won"] == 0


def test_who_lies_at_the_moment_when_its_replica_wins_is_out_all_the_same(setting: Setting) -> None:
    silent, _ = setting.workers
    silent.lies_late = True
    setting.ask(lambda: setting.time.sleep(1.0))
    assert setting.client.statistics.lies == ("10.0.0.0:7100",)
    assert setting.client._policy.is_excluded(0)
    assert setting.figures()["hedges_won"] == 1


def test_a_lie_in_a_row_that_the_first_worker_had_answered_already_leaves_that_row_as_it_was(
    setting: Setting,
) -> None:
    silent, replica = setting.workers
    silent.first, replica.silent, replica.says = 3, True, lambda answer: answer.fill(5)

    def meanwhile() -> None:
        wait_until(lambda: setting.client.statistics.bytes_received > 0)
        setting.time.sleep(2.0)
        replica.goes_on.set()
        wait_until(lambda: setting.client.statistics.lies == ("10.0.0.1:7100",))
        silent.goes_on.set()

    setting.ask(meanwhile)


def test_a_first_worker_that_lies_is_out_and_the_answer_of_its_replica_counts(setting: Setting) -> None:
    silent, replica = setting.workers
    silent.says, replica.silent = wrong, True

    def meanwhile() -> None:
        setting.time.sleep(1.0)
        wait_until(lambda: bool(replica.requests))
        silent.goes_on.set()
        wait_until(lambda: setting.client.statistics.lies == ("10.0.0.0:7100",))
        replica.goes_on.set()

    setting.ask(meanwhile)
    assert setting.client._policy.is_excluded(0)
    assert setting.figures()["requests"] == 2 and setting.figures()["hedges_won"] == 1


def test_when_either_of_the_two_fails_the_other_is_waited_for_and_no_third_one_sent(setting: Setting) -> None:
    for fails in (0, 1):
        setting.time.sleep(100.0)
        for worker in setting.workers:
            worker.silent = True
            worker.goes_on.clear()
            worker.requests.clear()
        first, other = setting.workers[fails], setting.workers[1 - fails]
        first.failures.append(GONE)
        failed = setting.client.statistics.failures[Failure.UNREACHABLE]

        def meanwhile() -> None:
            setting.time.sleep(1.0)
            wait_until(lambda: all(worker.requests for worker in setting.workers))
            first.goes_on.set()  # noqa: B023
            wait_until(lambda: setting.client.statistics.failures[Failure.UNREACHABLE] > failed)  # noqa: B023
            other.goes_on.set()  # noqa: B023

        setting.ask(meanwhile)
        assert [len(worker.requests) for worker in setting.workers] == [1, 1]


def test_when_both_of_the_two_fail_nothing_of_their_answers_is_used(setting: Setting) -> None:
    for worker in setting.workers:
        worker.silent, worker.first = True, 2
        worker.failures.append(GONE)

    def meanwhile() -> None:
        setting.time.sleep(1.0)
        wait_until(lambda: all(worker.requests for worker in setting.workers))
        for worker in setting.workers:
            worker.goes_on.set()

    setting.ask(meanwhile)
    assert setting.client.statistics.failures == {Failure.UNREACHABLE: 2}
    assert setting.figures() | {"requests": 3, "hedges": 1, "hedges_won": 0} == setting.figures()


def test_a_look_that_is_due_as_its_attempt_ends_neither_repeats_it_nor_looks_again(setting: Setting) -> None:
    """It is too late to call it off then."""
    looks: list[Callable[[], None]] = []

    def later(seconds: float, look: Callable[[], None]) -> Callable[[], None]:
        looks.append(look)
        return lambda: None

    setting.client._asking._later = later
    setting.workers[0].silent = False
    setting.client.multiply(setting.request(), setting.check)
    (look,) = looks
    setting.time.sleep(4.0)
    look()
    assert looks == [look]
    assert setting.figures() | {"requests": 1, "hedges": 0} == setting.figures()


def test_a_worker_that_is_silent_for_too_long_has_failed_and_its_replica_is_asked(setting: Setting) -> None:
    """As where the replica had other things to do, or enough was repeated early."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "_HEDGES", 0.0)
        setting.ask(lambda: setting.time.sleep(10.0))
    assert setting.client.statistics.failures == {Failure.SILENT: 1}
    assert setting.figures() | {"hedges": 0, "retries": 1, "requests": 2} == setting.figures()


def test_a_worker_that_acknowledged_a_request_has_time_to_compute(setting: Setting) -> None:
    silent, _ = setting.workers
    silent.acknowledges = True
    setting.client._policy.acknowledges(0, True)

    def meanwhile() -> None:
        wait_until(lambda: silent.was_heard)
        setting.time.sleep(20.0)
        silent.goes_on.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "_HEDGES", 0.0)
        setting.ask(meanwhile)
    assert not setting.client.statistics.failures
    assert setting.figures()["requests"] == 1


def test_a_worker_that_is_silent_again_and_again_is_set_aside(
    setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    silent, replica = setting.workers
    for _ in range(3):
        setting.time.sleep(10.0)
        assert not setting.client.statistics.set_aside
        silent.goes_on.clear()
        silent.requests.clear()
        replica.requests.clear()
        setting.ask(lambda: setting.time.sleep(1.0))
    (found,) = setting.client.statistics.set_aside
    assert (found.worker, found.failure, found.product) == ("10.0.0.0:7100", Failure.SILENT, FORWARD.label)
    assert "10.0.0.0:7100 of operator alpha was silent again and again: for 60 s" in caplog.text
    assert not setting.client.statistics.excluded
    silent.requests.clear()
    for _ in range(10):
        setting.client.multiply(setting.request(), setting.check)
    assert not silent.requests
    assert len(setting.client._asking.ready()) == 1, "an operand is not cut for it"


def test_a_mistake_in_what_repeats_a_request_is_not_hidden(setting: Setting) -> None:
    def mistake(request: WorkRequest) -> None:
        raise RuntimeError("a bug of this client")

    setting.workers[1].before = mistake

    def meanwhile() -> None:
        setting.time.sleep(1.0)
        wait_until(lambda: bool(setting.workers[1].requests))
        setting.workers[0].goes_on.set()

    with pytest.raises(RuntimeError, match="a bug"):
        setting.ask(meanwhile)


def test_closing_ends_both_of_a_pair_at_once(setting: Setting) -> None:
    for worker in setting.workers:
        worker.silent = True
        worker.failures.append(GONE)
        worker.close = worker.goes_on.set  # type: ignore[method-assign]

    def meanwhile() -> None:
        setting.time.sleep(1.0)
        wait_until(lambda: all(worker.requests for worker in setting.workers))
        setting.client.close()

    with pytest.raises(OperatorUnavailableError, match="was closed"):
        setting.ask(meanwhile)
    assert [worker.ended for worker in setting.workers] == [1, 1]


def test_one_mask_hides_an_operand_and_no_other_operator_sees_what_is_repeated(
    kit: Kit, honest: Multiplier
) -> None:
    first, second = Setting(kit, honest, 0), Setting(kit, honest, 1)
    multiplier = RemoteMultiplier(ShareSource(2, Q31), [first.client, second.client], kit)
    second.workers[0].silent = True
    operand = np.arange(4 * FORWARD.contraction, dtype=np.int32).reshape(4, -1)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(multiplier.multiply_integers, operand, FORWARD)
        wait_until(lambda: bool(second.workers[0].requests))
        second.time.sleep(1.0)
        result = asked.result(TEST_SECONDS)
    expected = honest.multiply(FORWARD, (operand % Q31.modulus).astype(np.uint32), Q31)
    assert np.array_equal(result % Q31.modulus, expected)
    assert sum(len(worker.requests) for worker in first.workers) == 1
    assert {id(x.share) for worker in second.workers for x in worker.requests} == {
        id(second.workers[1].requests[0].share)
    }
    multiplier.close()


@pytest.mark.parametrize("acknowledges", [False, True], ids=["old", "acknowledging"])
def test_products_go_on_over_grpc_next_to_a_worker_that_takes_requests_and_never_answers(
    acknowledges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name, seconds in (
        (habits, "_LEAST", 0.4),
        (habits, "_LEAST_QUEUED", 0.4),
        (habits, "_UNKNOWN_SECONDS", 0.04),
        (policy, "_LEAST_BEFORE_HEDGE", 0.1),
    ):
        monkeypatch.setattr(module, name, seconds)
    integers = torch.randint(-127, 128, (48, 32), dtype=torch.int8)
    layer = IntegerLayer(integers, np.ones(48, np.float32))
    store = LayerStore.from_layers(iter([("layer", layer)]), model="none")
    good = serve(store, Endpoint("127.0.0.1", 0, None))
    transports = [GrpcTransport(Operator("alpha", [good.address]), good.address, insecure=True)]
    manifest = transports[0].manifest(TEST_SECONDS)
    manifest.acknowledges = acknowledges
    silent = SilentServer(manifest, acknowledges)
    transports.insert(0, GrpcTransport(Operator("alpha", [silent.address]), silent.address, insecure=True))
    client = OperatorClient(
        0,
        "alpha",
        [(silent.address, transports[0]), (good.address, transports[1])],
        Expectations("none", store.fingerprint, Q31.name, {}),
        60.0,
        TEST_SECONDS,
    )
    product = Product(Direction.FORWARD, (Span("layer", 0, 32),))
    s = secret_vectors(bytes(32), "layer", Direction.FORWARD, 48, Q31)
    check = CheckVectors(s, check_vectors(integers, s, Direction.FORWARD, Q31), Q31)
    generator = np.random.default_rng(0)
    multiplier = store.multiplier()
    started = time.monotonic()
    try:
        client.connect()
        while not client.statistics.set_aside:
            assert time.monotonic() < started + TEST_SECONDS
            words = generator.integers(0, Q31.modulus, (3, 32), dtype=np.uint32)
            request = WorkRequest(store.fingerprint, Q31.name, product, Share(0, words), 48)
            assert np.array_equal(client.multiply(request, check), multiplier.multiply(product, words, Q31))
    finally:
        client.close()
        silent.stop()
        good.stop()
    figures = client.statistics
    assert figures.set_aside[0].worker == silent.address
    assert not figures.lies and not figures.excluded
    assert figures.hedges <= figures.requests / 20


def test_calls_are_made_in_order_of_time_unless_they_are_called_off() -> None:
    timers, made, done = Timers(), [], threading.Event()
    timers.later(0.06, done.set)
    timers.later(0.04, lambda: made.append("late"))
    timers.later(0.02, lambda: made.append(1 // 0 and "failed"))
    off = timers.later(0.01, lambda: made.append("off"))
    timers.later(0.0, lambda: made.append("at once"))
    off()
    assert done.wait(TEST_SECONDS)
    assert made == ["at once", "late"]
    never = threading.Event()
    timers.later(0.2, never.set)
    timers.close()
    timers.later(0.0, never.set)
    assert not never.wait(0.3)


def test_a_request_that_was_stopped_before_it_was_made_ends_when_it_is() -> None:
    stop, ended = StopRequest(), threading.Event()
    stop()
    assert stop.called
    stop.by(ended.set)
    assert ended.is_set()
