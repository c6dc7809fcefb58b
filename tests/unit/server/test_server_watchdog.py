"""Clients that stall: the rule on a clock of the test's own, and real clients that stop in the middle."""

import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from queue import Queue

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_layer import tiny_header, tiny_store

from blindtune.proto import worker_pb2, worker_pb2_grpc
from blindtune.server.admission.limits import Limits
from blindtune.server.admission.watchdog import Patience, Watchdog
from blindtune.server.daemon import RunningWorker, serve
from blindtune.server.store import LayerStore
from blindtune.server.transport import Endpoint

PATIENCE = 60
KEY = bytes(range(32))
Message = worker_pb2.MultiplyRequest


class Clock:
    """Shows the time that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watchdog(clock: Clock) -> Watchdog:
    return Watchdog(20.0, 100, clock)


def wait(patience: Patience, clock: Clock, seconds: float) -> None:
    with patience.waiting():
        clock.now += seconds


def test_a_client_that_keeps_a_request_waiting_loses_it_once(watchdog: Watchdog, clock: Clock) -> None:
    cancelled: list[str] = []
    with watchdog.watch(lambda: cancelled.append("x")) as patience, patience.waiting():
        clock.now += 20.0
        assert watchdog.sweep() == 0
        clock.now += 0.1
        assert watchdog.sweep() == 1
        assert watchdog.sweep() == 0
    assert cancelled == ["x"]


def test_computing_uses_no_patience_up(watchdog: Watchdog, clock: Clock) -> None:
    cancelled: list[str] = []
    with watchdog.watch(lambda: cancelled.append("x")) as patience:
        clock.now += 10_000
        assert watchdog.sweep() == 0
        wait(patience, clock, 19.0)
        clock.now += 10_000
        with patience.waiting():
            clock.now += 0.9
            assert watchdog.sweep() == 0
            clock.now += 0.2
            assert watchdog.sweep() == 1
    assert cancelled


def test_bytes_win_patience_back_but_no_more_than_there_was(watchdog: Watchdog, clock: Clock) -> None:
    with watchdog.watch(lambda: None) as patience:
        wait(patience, clock, 15.0)
        patience.moved(1000)  # ten seconds' worth
        with patience.waiting():
            clock.now += 14.9
            assert watchdog.sweep() == 0
        patience.moved(10**9)  # otherwise a client could buy itself hours
        with patience.waiting():
            clock.now += 20.1
            assert watchdog.sweep() == 1


def test_a_client_at_the_least_speed_is_never_cancelled(watchdog: Watchdog, clock: Clock) -> None:
    with watchdog.watch(lambda: None) as patience:
        for _ in range(1000):
            with patience.waiting():
                clock.now += 10.0
                assert watchdog.sweep() == 0
            patience.moved(1000)


def test_requests_are_judged_one_by_one_and_forgotten_when_they_end(watchdog: Watchdog, clock: Clock) -> None:
    cancelled: list[str] = []
    with watchdog.watch(lambda: cancelled.append("idle")) as idle, idle.waiting():
        with watchdog.watch(lambda: cancelled.append("ended")) as ended, ended.waiting():
            clock.now += 15
        with watchdog.watch(lambda: cancelled.append("late")) as late, late.waiting():
            clock.now += 6
            assert watchdog.sweep() == 1
    assert cancelled == ["idle"]


def test_a_request_that_waits_gives_way_once_long_before_it_is_cancelled(
    watchdog: Watchdog, clock: Clock
) -> None:
    told: list[float] = []
    with watchdog.watch(lambda: None) as patience:
        wait(patience, clock, 5.0)
        patience.give_way(1.0, lambda: told.append(clock.now))
        wait(patience, clock, 0.6)
        patience.moved(10**6)
        clock.now += 10_000  # it computes
        with patience.waiting():
            clock.now += 0.3
            watchdog.sweep()
            assert not told
            clock.now += 0.2
            watchdog.sweep()
            watchdog.sweep()
        wait(patience, clock, 3.0)
        assert len(told) == 1
        assert patience.waited == pytest.approx(5.0 + 0.6 + 0.5 + 3.0)


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 5000), st.booleans()), max_size=40))
def test_no_request_waits_longer_than_the_formula_says(steps: list[tuple[float, int, bool]]) -> None:
    clock = Clock()
    watchdog = Watchdog(20.0, 100, clock)
    waited, moved = 0.0, 0
    with watchdog.watch(lambda: None) as patience:
        for seconds, count, computes in steps:
            if computes:
                clock.now += seconds
                continue
            with patience.waiting():
                clock.now += seconds
                if watchdog.sweep():
                    return
            waited += seconds
            assert waited <= 20.0 + moved / 100 + 1e-6
            patience.moved(count)
            moved += count


# Wide enough for an answer that no network buffer holds.
COLUMNS, OUTPUTS = 8, 16_384


@pytest.fixture(scope="module")
def store() -> LayerStore:
    return tiny_store(OUTPUTS, COLUMNS)


@contextmanager
def running(store: LayerStore, **limits: float) -> Iterator[RunningWorker]:
    worker = serve(store, Endpoint.parse("127.0.0.1:0", insecure=True), limits=Limits(**limits))  # type: ignore[arg-type]
    try:
        yield worker
    finally:
        worker.stop(drain_seconds=0)


def header(store: LayerStore, rows: int, seed: bool) -> Message:
    message = tiny_header(store.fingerprint, rows, COLUMNS, seed=False)
    if seed:
        message.seed.key = KEY
    return Message(header=message)


def until(condition: object, what: str) -> None:
    """Waits until a condition holds."""
    give_up = time.monotonic() + PATIENCE
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < give_up, what
        time.sleep(0.02)


def answered(stub: worker_pb2_grpc.WorkerStub, store: LayerStore) -> int:
    return sum(len(x.residues) for x in stub.Multiply(iter([header(store, 1, True)]), timeout=PATIENCE))


@pytest.mark.parametrize("sent", ["nothing", "the header", "some rows"])
def test_a_client_that_stops_sending_frees_its_place(
    store: LayerStore, sent: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "blindtune")
    messages: Queue[Message | None] = Queue()
    if sent != "nothing":
        messages.put(header(store, 9, False))
    if sent == "some rows":
        messages.put(Message(residues=bytes(4 * COLUMNS)))
    with (
        running(store, max_concurrent=1, patience_seconds=0.3) as worker,
        grpc.insecure_channel(worker.address) as channel,
    ):
        stub = worker_pb2_grpc.WorkerStub(channel)
        stalled = stub.Multiply(iter(messages.get, None), timeout=PATIENCE)
        with pytest.raises(grpc.RpcError) as caught:
            list(stalled)
        assert caught.value.code() is grpc.StatusCode.CANCELLED
        messages.put(None)
        until(lambda: worker.requests_inside == 0, "the place is not free")
        assert answered(stub, store) == 4 * OUTPUTS
        until(lambda: worker.requests_inside == 0, "the second request has not left")
    lines = [vars(record) for record in caplog.records if record.message == "multiply"]
    assert [(line["status"], line["stalled"]) for line in lines] == [("CANCELLED", True), ("OK", False)]


def test_a_client_that_stops_sending_soon_keeps_nobody_waiting(store: LayerStore) -> None:
    messages: Queue[Message | None] = Queue()
    messages.put(header(store, 9, False))
    with (
        running(store, max_concurrent=1) as worker,
        grpc.insecure_channel(worker.address) as channel,
    ):
        stub = worker_pb2_grpc.WorkerStub(channel)
        slow = stub.Multiply(iter(messages.get, None), timeout=PATIENCE)
        until(lambda: worker.requests_inside == 1, "the request has not begun")
        assert answered(stub, store) == 4 * OUTPUTS
        # It was not cancelled, and goes on where it stopped.
        assert slow.is_active()  # type: ignore[attr-defined]
        messages.put(Message(residues=bytes(9 * 4 * COLUMNS)))
        messages.put(None)
        assert sum(len(x.residues) for x in slow) == 9 * 4 * OUTPUTS


class Unread:
    """A client that asks over HTTP/2 and then takes nothing of the answer: it grants no window."""

    def __init__(self, worker: RunningWorker, message: Message) -> None:
        self.channel = grpc.insecure_channel(worker.address)
        # gRPC reads ahead only one message until the next one is asked for.
        self.call = worker_pb2_grpc.WorkerStub(self.channel).Multiply(iter([message]), timeout=PATIENCE)


def test_a_client_that_does_not_read_frees_its_place(store: LayerStore) -> None:
    rows = 2000  # an answer of 131 MB
    with running(store, max_concurrent=1, patience_seconds=0.3) as worker:
        unread = Unread(worker, header(store, rows, True))
        until(lambda: worker.requests_inside == 1, "the request has not begun")
        until(lambda: worker.requests_inside == 0, "the place is not free")
        with grpc.insecure_channel(worker.address) as channel:
            assert answered(worker_pb2_grpc.WorkerStub(channel), store) == 4 * OUTPUTS
        with pytest.raises(grpc.RpcError) as caught:
            list(unread.call)
        assert caught.value.code() is grpc.StatusCode.CANCELLED
        unread.channel.close()


def test_a_client_that_is_slow_but_fast_enough_is_served(store: LayerStore) -> None:
    rows = [Message(residues=bytes(4 * COLUMNS)) for _ in range(12)]

    def slowly() -> Iterable[Message]:
        yield header(store, len(rows), False)
        for row in rows:
            time.sleep(0.1)
            yield row

    with (
        running(store, patience_seconds=0.5, min_bytes_per_second=100) as worker,
        grpc.insecure_channel(worker.address) as channel,
    ):
        call = worker_pb2_grpc.WorkerStub(channel).Multiply(iter(slowly()), timeout=PATIENCE)
        assert sum(len(x.residues) for x in call) == len(rows) * 4 * OUTPUTS


@pytest.mark.parametrize(
    "method",
    [
        "/blindtune.v1.Worker/GetManifest",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
def test_calls_without_a_request_do_not_use_up_the_threads(store: LayerStore, method: str) -> None:
    ended = threading.Event()

    def nothing() -> Iterator[bytes]:
        ended.wait(PATIENCE)
        yield from ()

    with (
        running(store, max_concurrent=1, patience_seconds=0.3) as worker,
        grpc.insecure_channel(worker.address) as channel,
    ):
        silent = [channel.stream_stream(method)(nothing(), timeout=PATIENCE) for _ in range(9)]
        codes = []
        for call in silent:
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            codes.append(caught.value.code())
        # One client gets so many places, and loses them.
        assert codes.count(grpc.StatusCode.CANCELLED) == 6
        assert codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 3
        ended.set()
        assert answered(worker_pb2_grpc.WorkerStub(channel), store) == 4 * OUTPUTS


def test_whoever_watches_the_health_is_not_cut_off(store: LayerStore) -> None:
    with (
        running(store, max_concurrent=1, patience_seconds=0.2) as worker,
        grpc.insecure_channel(worker.address) as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        time.sleep(0.5)
        stopping = threading.Thread(target=worker.stop)
        stopping.start()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        stopping.join()


def test_watching_the_health_takes_some_threads_and_not_all(store: LayerStore) -> None:
    with (
        running(store, max_concurrent=1) as worker,
        grpc.insecure_channel(worker.address) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        watches = [stub.Watch(request, timeout=PATIENCE) for _ in range(4)]
        for watch in watches:
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.Watch(request, timeout=PATIENCE))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert stub.Check(request, timeout=PATIENCE).status == health_pb2.HealthCheckResponse.SERVING
        assert answered(worker_pb2_grpc.WorkerStub(channel), store) == 4 * OUTPUTS
        watches[0].cancel()

        def watched() -> bool:
            again = stub.Watch(request, timeout=PATIENCE)
            try:
                return next(again).status == health_pb2.HealthCheckResponse.SERVING
            except grpc.RpcError:
                return False

        until(watched, "a watch that has ended is not replaced")


def test_watches_that_come_and_go_stop_nobody(store: LayerStore) -> None:
    """The library's own way to watch came to a standstill here, and the worker with it."""
    with running(store, max_concurrent=1) as worker:
        for _ in range(60):
            with grpc.insecure_channel(worker.address) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                request = health_pb2.HealthCheckRequest()
                for watch in [stub.Watch(request, timeout=PATIENCE) for _ in range(6)]:
                    watch.cancel()
                assert stub.Check(request, timeout=PATIENCE).status == health_pb2.HealthCheckResponse.SERVING


def test_a_connection_that_never_comes_to_stand_is_closed(store: LayerStore) -> None:
    with running(store, handshake_seconds=0.3) as worker:
        with socket.create_connection(("127.0.0.1", worker.port), PATIENCE) as silent:
            while silent.recv(1024):  # the worker's settings, and then the end
                pass
