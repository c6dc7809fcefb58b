"""A worker in this process, asked over a real connection."""

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from queue import Queue

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from blindtune.client.config.blind_config import Operator
from blindtune.client.operators.messages import WorkRequest
from blindtune.client.operators.policy import Failure
from blindtune.client.operators.transport import GrpcTransport, TransportError
from blindtune.proto import MAX_MESSAGE_BYTES, PROTOCOL_VERSION, worker_pb2, worker_pb2_grpc
from blindtune.protocol.expansion import Seed
from blindtune.protocol.masks import Share
from blindtune.protocol.operands import SeededRows
from blindtune.protocol.parameters import Q31, ParameterSet
from blindtune.protocol.products import Direction, Product, Span, backward_products, forward_products
from blindtune.protocol.residues import Residues
from blindtune.protocol.weights import INT8, IntegerLayer
from blindtune.server.admission.limits import Limits
from blindtune.server.admission.places import WINDOW_BYTES
from blindtune.server.daemon import SERVICE_NAME, RunningWorker, serve
from blindtune.server.hooks import Multiplying, Observer
from blindtune.server.store import LayerStore
from blindtune.server.transport import Endpoint
from blindtune.server.wire import Request

SHAPES = {
    "q": (24, 16),
    "k": (40, 16),
    "down": (16, 24),
    "long": (8, 70_000),
    "head": (70_000, 8),
    # One row of its outputs is longer than a message; cut, it has the lengths that "head" has.
    "wide": (32 * 32_768 + 4_464, 8),
}
QK_FORWARD = Product(Direction.FORWARD, (Span("q", 0, 16), Span("k", 0, 16)))
QK_BACKWARD = Product(Direction.BACKWARD, (Span("q", 0, 24), Span("k", 0, 40)))
DOWN_FORWARD = Product(Direction.FORWARD, (Span("down", 0, 24),))
DOWN_BACKWARD = Product(Direction.BACKWARD, (Span("down", 0, 16),))
EACH_PRODUCT = pytest.mark.parametrize(
    "product", [QK_FORWARD, QK_BACKWARD, DOWN_FORWARD, DOWN_BACKWARD], ids=lambda p: p.label
)
KEY = bytes(range(100, 132))
STATUS = grpc.StatusCode
PATIENCE = 60  # seconds until a test that hangs fails; no test takes anywhere near as long

Message = worker_pb2.MultiplyRequest
Start = Callable[..., "Worker"]


class Worker:
    """A running worker and a connection to it."""

    def __init__(self, running: RunningWorker) -> None:
        self.running = running
        self.channel = grpc.insecure_channel(running.address)
        self.stub = worker_pb2_grpc.WorkerStub(self.channel)

    def ask(self, messages: Iterable[Message]) -> Iterator[worker_pb2.MultiplyResponse]:
        return self.stub.Multiply(iter(messages), timeout=PATIENCE)

    def answer(self, messages: Iterable[Message], outputs: int) -> Residues:
        data = b"".join(response.residues for response in self.ask(messages))
        return np.frombuffer(data, "<u4").reshape(-1, outputs)

    def refusal(self, messages: Iterable[Message]) -> tuple[STATUS, str]:
        with pytest.raises(grpc.RpcError) as caught:
            list(self.ask(messages))
        return caught.value.code(), caught.value.details()

    def health(self, service: str = SERVICE_NAME) -> int:
        request = health_pb2.HealthCheckRequest(service=service)
        return health_pb2_grpc.HealthStub(self.channel).Check(request, timeout=PATIENCE).status

    def close(self) -> None:
        self.channel.close()
        self.running.stop(drain_seconds=0)


@pytest.fixture(scope="module")
def store() -> LayerStore:
    generator = np.random.default_rng(7)

    def layers() -> Iterator[tuple[str, IntegerLayer]]:
        for name, shape in SHAPES.items():
            integers = generator.integers(-127, 128, shape, dtype=np.int8)
            yield name, IntegerLayer(torch.from_numpy(integers), np.ones(shape[0], np.float32))

    return LayerStore.from_layers(layers(), model="tiny")


@pytest.fixture(scope="module")
def worker(store: LayerStore) -> Iterator[Worker]:
    worker = Worker(serve(store, Endpoint.parse("127.0.0.1:0", insecure=True)))
    yield worker
    worker.close()


@pytest.fixture
def start(store: LayerStore) -> Iterator[Start]:
    """Starts workers with limits, multipliers or observers of their own."""
    workers: list[Worker] = []

    def start_worker(
        limits: Limits | None = None,
        multiplier: Multiplying | None = None,
        observer: Observer | None = None,
    ) -> Worker:
        endpoint = Endpoint.parse("127.0.0.1:0", insecure=True)
        running = serve(store, endpoint, limits=limits, multiplier=multiplier, observer=observer)
        workers.append(Worker(running))
        return workers[-1]

    yield start_worker
    for worker in workers:
        worker.close()


class Recorder:
    """Remembers what a worker receives."""

    def __init__(self) -> None:
        self.seen: list[tuple[Request, Residues | Seed]] = []

    def operand(self, request: Request, part: Residues | Seed) -> None:
        self.seen.append((request, part))


class Wrapped:
    """An honest multiplier; what it computes passes through ``change``."""

    def __init__(self, store: LayerStore, change: Callable[[Residues], Residues]) -> None:
        self._honest = store.multiplier()
        self._change = change

    def outputs(self, product: Product) -> int:
        return self._honest.outputs(product)

    def multiply(self, product: Product, operand: Residues, parameters: ParameterSet) -> Residues:
        return self._change(self._honest.multiply(product, operand, parameters))


class Held(Wrapped):
    """A multiplier that waits, in the middle of a request, until it is let go."""

    def __init__(self, store: LayerStore) -> None:
        self.entered = threading.Semaphore(0)
        self.let_go = threading.Event()
        super().__init__(store, self._wait)

    def _wait(self, result: Residues) -> Residues:
        self.entered.release()
        assert self.let_go.wait(PATIENCE)
        return result


def residues(rows: int, columns: int) -> Residues:
    x = np.random.default_rng(rows).integers(0, Q31.modulus, (rows, columns), dtype=np.uint32)
    x[0, 0], x[-1, -1] = Q31.modulus - 1, 0
    return x


def header(store: LayerStore, product: Product, rows: int, seed: Seed | None = None) -> Message:
    message = worker_pb2.MultiplyHeader(
        protocol_version=PROTOCOL_VERSION,
        fingerprint=store.fingerprint,
        parameter_set=Q31.name,
        product=product_message(int(product.direction), *product.spans),
        rows=rows,
        columns=product.contraction,
    )
    if seed is not None:
        message.seed.key, message.seed.row_offset = seed.key, seed.row_offset
    return Message(header=message)


def product_message(direction: int, *spans: Span) -> worker_pb2.Product:
    return worker_pb2.Product(
        direction=direction,  # type: ignore[arg-type]
        spans=[worker_pb2.Span(layer=s.layer, start=s.start, stop=s.stop) for s in spans],
    )


def rows_of(operand: Residues, *cuts: int) -> list[Message]:
    """The rows of an operand, in messages that end at ``cuts`` and at its end."""
    bounds = zip((0, *cuts), (*cuts, len(operand)), strict=True)
    return [Message(residues=operand[start:stop].tobytes()) for start, stop in bounds]


def matrix(store: LayerStore, product: Product) -> np.ndarray:
    """The product's M, in 64-bit integers."""
    forward = product.direction is Direction.FORWARD
    parts = []
    for span in product.spans:
        integers = store.layers[span.layer].integers.numpy().astype(np.int64)
        part = integers.T if forward else integers
        parts.append(part[span.start : span.stop])
    return np.concatenate(parts, axis=1 if forward else 0)


def big_product(store: LayerStore, product: Product, operand: Residues) -> Residues:
    """operand . M mod q in Python's integers."""
    exact = operand.astype(object) @ matrix(store, product).astype(object)
    return (exact % Q31.modulus).astype(np.uint32)


@EACH_PRODUCT
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_rows_are_multiplied_as_big_integers(
    store: LayerStore, worker: Worker, product: Product, rows: int
) -> None:
    operand = residues(rows, product.contraction)
    expected = big_product(store, product, operand)
    messages = [header(store, product, rows), *rows_of(operand)]
    assert np.array_equal(worker.answer(messages, expected.shape[1]), expected)


@EACH_PRODUCT
@pytest.mark.parametrize("offset", [0, 3, 2**40])
def test_a_seed_is_multiplied_as_its_expansion(
    store: LayerStore, worker: Worker, product: Product, offset: int
) -> None:
    seed = Seed(KEY, Q31, offset)
    expected = big_product(store, product, seed.expand(9, product.contraction))
    messages = [header(store, product, 9, seed)]
    assert np.array_equal(worker.answer(messages, expected.shape[1]), expected)


def test_4097_rows_in_uneven_messages_come_back_in_order(store: LayerStore, worker: Worker) -> None:
    operand = residues(4097, 16)
    messages = [header(store, QK_FORWARD, 4097), *rows_of(operand, 1, 1000, 1024, 1025, 4000)]
    # No sum reaches 16 * 2^31 * 2^7: 64 bits are exact here, and faster than Python's integers.
    expected = (operand.astype(np.int64) @ matrix(store, QK_FORWARD)) % Q31.modulus
    assert np.array_equal(worker.answer(messages, 64), expected)


def test_4097_rows_of_a_seed_are_those_of_one_expansion(store: LayerStore, worker: Worker) -> None:
    seed = Seed(KEY, Q31, 11)
    expected = (seed.expand(4097, 16).astype(np.int64) @ matrix(store, QK_FORWARD)) % Q31.modulus
    assert np.array_equal(worker.answer([header(store, QK_FORWARD, 4097, seed)], 64), expected)


@pytest.mark.parametrize(
    "products",
    [forward_products(["long"], 70_000), backward_products([("head", 70_000)])],
    ids=["forward", "backward"],
)
def test_each_span_of_a_long_contraction_is_exact(
    store: LayerStore, worker: Worker, products: list[Product]
) -> None:
    assert len(products) == 3
    for product in products:
        operand = residues(2, product.contraction)
        answer = worker.answer([header(store, product, 2), *rows_of(operand)], 8)
        assert np.array_equal(answer, big_product(store, product, operand))


def test_results_travel_as_whole_rows_far_below_the_message_limit(store: LayerStore, worker: Worker) -> None:
    product = Product(Direction.FORWARD, (Span("head", 0, 8),))
    sizes = [len(r.residues) for r in worker.ask([header(store, product, 5, Seed(KEY, Q31))])]
    assert sum(sizes) == 5 * 70_000 * 4
    assert all(size % (70_000 * 4) == 0 and size < MAX_MESSAGE_BYTES // 4 for size in sizes)


Change = Callable[[worker_pb2.MultiplyHeader], object]


def field(name: str, value: object) -> Change:
    return lambda message: setattr(message, name, value)


def spans(direction: int, *spans: Span) -> Change:
    return lambda message: message.product.CopyFrom(product_message(direction, *spans))


def seed(key: bytes, row_offset: int = 0) -> Change:
    return lambda message: message.seed.MergeFrom(worker_pb2.Seed(key=key, row_offset=row_offset))


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        (field("protocol_version", 2), STATUS.FAILED_PRECONDITION, "upgrade the worker"),
        (field("protocol_version", 0), STATUS.FAILED_PRECONDITION, "upgrade the client"),
        (field("fingerprint", "00" * 32), STATUS.FAILED_PRECONDITION, "same checkpoint and revision"),
        (field("parameter_set", "q99"), STATUS.FAILED_PRECONDITION, "choose one of q31"),
        (field("columns", 15), STATUS.INVALID_ARGUMENT, "15 columns, but the product takes 16"),
        (field("rows", 0), STATUS.INVALID_ARGUMENT, "no rows"),
        (spans(0, Span("q", 0, 16)), STATUS.INVALID_ARGUMENT, "0 is no direction"),
        (spans(3, Span("q", 0, 16)), STATUS.INVALID_ARGUMENT, "3 is no direction"),
        (spans(1), STATUS.INVALID_ARGUMENT, "names no layers"),
        (spans(1, Span("v", 0, 16)), STATUS.NOT_FOUND, "does not hold a layer 'v'"),
        (spans(1, Span("v" * 9999, 0, 16)), STATUS.NOT_FOUND, r"'v{97}\.\.\.'"),
        (spans(1, Span("q", 0, 15)), STATUS.INVALID_ARGUMENT, "0:15 is none of the spans"),
        (spans(1, Span("q", 16, 0)), STATUS.INVALID_ARGUMENT, "16:0 is none of the spans"),
        (spans(1, Span("q", 1, 17)), STATUS.INVALID_ARGUMENT, "not lie within the 16 input features"),
        (spans(1, Span("q", 0, 16), Span("down", 0, 24)), STATUS.INVALID_ARGUMENT, "the same features"),
        (spans(2, Span("q", 0, 24), Span("down", 0, 16)), STATUS.INVALID_ARGUMENT, "the same features"),
        (spans(1, *[Span("q", 0, 16)] * 65), STATUS.OUT_OF_RANGE, "65 spans"),
        (seed(bytes(31)), STATUS.INVALID_ARGUMENT, "32 bytes, not 31"),
        (seed(b""), STATUS.INVALID_ARGUMENT, "32 bytes, not 0"),
        (seed(bytes(32), 1 << 63), STATUS.INVALID_ARGUMENT, "63-bit"),
        (seed(bytes(32), (1 << 63) - 1), STATUS.INVALID_ARGUMENT, r"end at 2\^63"),
    ],
)
def test_a_wrong_header_is_refused_with_its_own_status(
    store: LayerStore, worker: Worker, change: Change, code: STATUS, text: str
) -> None:
    message = header(store, QK_FORWARD, 2)
    change(message.header)
    found, details = worker.refusal([message, *rows_of(residues(2, 16))])
    assert found is code
    assert re.search(text, details), details


@pytest.mark.parametrize(
    ("rows", "limits", "text"),
    [
        (6, Limits(max_rows=5), "6 rows, more than this worker's limit 5"),
        (6, Limits(max_operand_bytes=6 * 16 * 4 - 1), "384 bytes, more than this worker's limit 383"),
    ],
)
@pytest.mark.parametrize("seed", [None, Seed(KEY, Q31)], ids=["rows", "seed"])
def test_an_operand_over_the_limits_is_refused(
    store: LayerStore, start: Start, rows: int, limits: Limits, text: str, seed: Seed | None
) -> None:
    worker = start(limits)
    code, details = worker.refusal([header(store, QK_FORWARD, rows, seed)])
    assert code is STATUS.OUT_OF_RANGE
    assert text in details
    fits = header(store, QK_FORWARD, rows - 1, Seed(KEY, Q31))
    assert len(worker.answer([fits], 64)) == rows - 1


def test_a_row_of_results_that_fits_no_message_is_refused(store: LayerStore, worker: Worker) -> None:
    product = Product(Direction.FORWARD, (Span("wide", 0, 8),))
    code, details = worker.refusal([header(store, product, 1, Seed(KEY, Q31))])
    assert code is STATUS.OUT_OF_RANGE
    assert "ask for fewer layers at once" in details


def test_a_client_does_not_send_again_what_is_too_large(store: LayerStore, start: Start) -> None:
    running = start(Limits(max_rows=5)).running
    transport = GrpcTransport(Operator("alpha", [running.address]), running.address, insecure=True)
    request = WorkRequest(
        store.fingerprint, Q31.name, QK_FORWARD, Share(0, SeededRows(Seed(KEY, Q31), 6, 16)), outputs=64
    )
    with pytest.raises(TransportError, match="OUT_OF_RANGE: the operand has 6 rows") as caught:
        list(transport.multiply(request, PATIENCE, np.empty((6, 64), np.uint32)))
    assert caught.value.failure is Failure.INCOMPATIBLE
    transport.close()


FULL = residues(3, 16).tobytes()


@pytest.mark.parametrize(
    ("chunks", "text"),
    [
        ([FULL[:-1]], "no whole rows of 64 bytes"),
        ([FULL, b""], "0 bytes, which are no whole rows"),
        ([FULL, FULL[:64]], "more rows arrived than the 3 announced"),
        ([FULL[:64]], "ended after 1 of 3 rows"),
        ([], "ended after 0 of 3 rows"),
    ],
)
def test_rows_that_do_not_match_the_header_are_refused_before_any_arithmetic(
    store: LayerStore, start: Start, chunks: list[bytes], text: str
) -> None:
    recorder = Recorder()
    messages = [header(store, QK_FORWARD, 3), *(Message(residues=chunk) for chunk in chunks)]
    code, details = start(observer=recorder).refusal(messages)
    assert code is STATUS.INVALID_ARGUMENT
    assert text in details
    assert not recorder.seen


@pytest.mark.parametrize("word", [Q31.modulus, Q31.modulus + 5, 2**32 - 1])
def test_a_word_that_is_no_residue_is_refused_before_any_arithmetic(
    store: LayerStore, start: Start, word: int
) -> None:
    multiplied: list[Residues] = []
    worker = start(multiplier=Wrapped(store, lambda y: multiplied.append(y) or y))
    operand = residues(3, 16)
    operand[2, 15] = word
    code, details = worker.refusal([header(store, QK_FORWARD, 3), *rows_of(operand)])
    assert code is STATUS.INVALID_ARGUMENT
    assert "no residue mod q" in details
    assert not multiplied


def test_a_stream_without_header_or_with_two_is_refused(store: LayerStore, worker: Worker) -> None:
    first = header(store, QK_FORWARD, 3)
    for messages, text in [
        ([], "must be its header"),
        ([Message()], "must be its header"),
        ([Message(residues=FULL), first], "must be its header"),
        ([first, first], "must carry rows"),
        ([first, Message()], "must carry rows"),
        ([header(store, QK_FORWARD, 3, Seed(KEY, Q31)), Message(residues=FULL)], "is a seed, and yet"),
    ]:
        code, details = worker.refusal(messages)
        assert code is STATUS.INVALID_ARGUMENT
        assert text in details


def test_the_manifest_tells_all_that_a_client_compares(store: LayerStore, start: Start) -> None:
    worker = start(Limits(max_rows=77, max_operand_bytes=88, max_concurrent=1))
    manifest = worker.stub.GetManifest(worker_pb2.GetManifestRequest(), timeout=PATIENCE)
    assert list(manifest.protocol_versions) == [PROTOCOL_VERSION]
    assert (manifest.model, manifest.revision, manifest.scheme) == ("tiny", "", INT8.identifier)
    assert manifest.fingerprint == store.fingerprint
    assert {m.name: (m.out_features, m.in_features) for m in manifest.layers} == SHAPES
    assert all(m.fingerprint == store.layers[m.name].fingerprint for m in manifest.layers)
    assert list(manifest.parameter_sets) == ["q31", "q24"]
    limits = manifest.limits
    assert (limits.max_rows, limits.max_operand_bytes) == (77, 88)
    assert limits.max_message_bytes == MAX_MESSAGE_BYTES
    assert manifest.product_method == store.product_method


def test_a_request_is_acknowledged_before_anything_of_it_is_computed(store: LayerStore, start: Start) -> None:
    held = Held(store)
    worker = start(Limits(max_concurrent=1), multiplier=held)
    assert worker.stub.GetManifest(worker_pb2.GetManifestRequest(), timeout=PATIENCE).acknowledges
    call = worker.ask([header(store, QK_FORWARD, 3, Seed(KEY, Q31))])
    assert held.entered.acquire(timeout=PATIENCE)
    told: Queue[object] = Queue()
    threading.Thread(target=lambda: told.put(call.initial_metadata()), daemon=True).start()  # type: ignore[attr-defined]
    assert told.get(timeout=PATIENCE) == ()
    held.let_go.set()
    assert sum(len(response.residues) for response in call) == 3 * 64 * 4


def test_an_observer_sees_the_rows_or_the_seed(store: LayerStore, start: Start) -> None:
    recorder = Recorder()
    worker = start(observer=recorder)
    operand = residues(2000, 16)
    worker.answer([header(store, QK_FORWARD, 2000), *rows_of(operand)], 64)
    blocks = [part for _, part in recorder.seen]
    assert np.array_equal(np.concatenate(blocks), operand)
    recorder.seen.clear()
    worker.answer([header(store, QK_FORWARD, 2000, Seed(KEY, Q31, 4))], 64)
    [(request, part)] = recorder.seen
    assert part == Seed(KEY, Q31, 4)
    assert (request.product, request.rows) == (QK_FORWARD, 2000)


def test_a_wrapped_multiplier_makes_a_worker_lie(store: LayerStore, start: Start) -> None:
    def lie(result: Residues) -> Residues:
        result[0, 0] = (result[0, 0] + 1) % Q31.modulus
        return result

    operand = residues(4, 16)
    messages = [header(store, QK_FORWARD, 4), *rows_of(operand)]
    wrong = start(multiplier=Wrapped(store, lie)).answer(messages, 64) != big_product(
        store, QK_FORWARD, operand
    )
    assert wrong[0, 0]
    assert wrong.sum() == 1


def test_every_request_leaves_one_line_without_operand_or_key(
    store: LayerStore, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "blindtune.server.service")
    messages = [header(store, QK_BACKWARD, 9, Seed(KEY, Q31))]
    result = b"".join(
        r.residues for r in worker.stub.Multiply(iter(messages), metadata=[("x-request-id", "run-7_a")])
    )
    worker.refusal([header(store, DOWN_FORWARD, 3), Message(residues=residues(2, 24).tobytes())])
    worker.refusal([])
    done, early, empty = [r.__dict__ for r in caplog.records if r.message == "multiply"]
    assert done["request_id"] == "run-7_a"
    assert done["peer"].startswith("ipv4:127.0.0.1:")
    wanted = {"direction": "backward", "layers": 2, "rows": 9, "columns": 64, "operand": "seed"}
    assert wanted.items() <= done.items()
    assert done["bytes_in"] == messages[0].ByteSize()
    assert done["bytes_out"] >= len(result) == 9 * 16 * 4
    assert (done["status"], early["status"], empty["status"]) == ("OK", *["INVALID_ARGUMENT"] * 2)
    assert early["bytes_in"] > 2 * 24 * 4
    logged = "".join(str(r.__dict__) for r in caplog.records)
    assert str(KEY) not in logged
    assert KEY.hex() not in logged
    assert str(int(np.frombuffer(result, "<u4")[0])) not in logged


def test_a_request_shows_no_key(store: LayerStore, start: Start) -> None:
    recorder = Recorder()
    start(observer=recorder).answer([header(store, QK_FORWARD, 1, Seed(KEY, Q31))], 64)
    assert "seed" not in repr(recorder.seen[0][0]).lower()
    assert str(KEY) not in repr(recorder.seen)


def test_an_error_inside_the_worker_is_not_told_to_the_client(store: LayerStore, start: Start) -> None:
    def fail(result: Residues) -> Residues:
        raise LookupError(f"a word of the result is {result[0, 0]}")

    code, details = start(multiplier=Wrapped(store, fail)).refusal(
        [header(store, QK_FORWARD, 1, Seed(KEY, Q31))]
    )
    assert code is STATUS.INTERNAL
    assert re.fullmatch(r"internal error of this worker, request [0-9a-f]{32} in its log", details)


def test_running_out_of_memory_asks_for_fewer_rows(store: LayerStore, start: Start) -> None:
    def fail(result: Residues) -> Residues:
        raise torch.OutOfMemoryError("no room")

    code, details = start(multiplier=Wrapped(store, fail)).refusal(
        [header(store, QK_FORWARD, 1, Seed(KEY, Q31))]
    )
    assert code is STATUS.RESOURCE_EXHAUSTED
    assert "send fewer rows" in details


def test_one_request_too_many_is_turned_away_and_the_others_finish(store: LayerStore, start: Start) -> None:
    held = Held(store)
    worker = start(Limits(max_concurrent=2, max_waiting=1), multiplier=held)
    message = header(store, QK_FORWARD, 3, Seed(KEY, Q31))
    running = [worker.ask([message]) for _ in range(2)]
    for _ in running:
        assert held.entered.acquire(timeout=PATIENCE)
    # One that waits is acknowledged, and computes nothing.
    running.append(worker.ask([message]))
    assert running[-1].initial_metadata() == ()  # type: ignore[attr-defined]
    assert (worker.running.requests_inside, worker.running.requests_waiting) == (2, 1)
    code, details = worker.refusal([message])
    assert code is STATUS.RESOURCE_EXHAUSTED
    assert "2 requests running and 1 waiting" in details
    assert not held.entered.acquire(blocking=False)
    held.let_go.set()
    expected = big_product(store, QK_FORWARD, Seed(KEY, Q31).expand(3, 16))
    for call in running:
        assert b"".join(r.residues for r in call) == expected.tobytes()


def test_a_client_that_goes_away_gives_its_place_back(store: LayerStore, start: Start) -> None:
    worker = start(Limits(max_concurrent=1))
    open_end: Queue[Message | None] = Queue()
    open_end.put(header(store, QK_FORWARD, 2000))
    open_end.put(rows_of(residues(1500, 16))[0])
    call = worker.stub.Multiply(iter(open_end.get, None))
    assert len(next(call).residues) == 256 * 64 * 4
    assert worker.running.requests_inside == 1
    call.cancel()
    open_end.put(None)
    give_up = time.monotonic() + PATIENCE
    while worker.running.requests_inside and time.monotonic() < give_up:
        time.sleep(0.01)
    assert len(worker.answer([header(store, QK_FORWARD, 3, Seed(KEY, Q31))], 64)) == 3


def test_of_an_operand_that_waits_the_worker_takes_in_little(store: LayerStore, start: Start) -> None:
    held = Held(store)
    worker = start(Limits(max_concurrent=1), multiplier=held)
    product = Product(Direction.FORWARD, (Span("long", 0, 32_768),))
    running = worker.ask([header(store, product, 1, Seed(KEY, Q31))])
    assert held.entered.acquire(timeout=PATIENCE)
    chunk = rows_of(residues(8, 32_768))[0]
    taken: list[int] = []

    def messages() -> Iterator[Message]:
        yield header(store, product, 8 * 32)
        for number in range(32):
            taken.append(number)
            yield chunk

    waits = worker.stub.Multiply(messages(), timeout=PATIENCE)
    assert waits.initial_metadata() == ()  # type: ignore[attr-defined]
    give_up, seen = time.monotonic() + PATIENCE, -1
    while len(taken) > seen and time.monotonic() < give_up:
        seen = len(taken)
        time.sleep(0.3)
    # Of 1 MiB each: a window of them, one on each side that is half there, and one more that the client made.
    assert 1 <= len(taken) <= WINDOW_BYTES // 2**20 + 3
    held.let_go.set()
    assert sum(len(response.residues) for response in running) == 8 * 4
    assert sum(len(response.residues) for response in waits) == 8 * 32 * 8 * 4
    assert len(taken) == 32


@pytest.mark.parametrize("ending", ["cancelled", "too late"])
def test_who_waits_no_longer_takes_no_turn(store: LayerStore, start: Start, ending: str) -> None:
    held = Held(store)
    worker = start(Limits(max_concurrent=1), multiplier=held)
    message = header(store, QK_FORWARD, 3, Seed(KEY, Q31))
    running = worker.ask([message])
    assert held.entered.acquire(timeout=PATIENCE)
    waits = worker.stub.Multiply(iter([message]), timeout=PATIENCE if ending == "cancelled" else 0.2)
    assert waits.initial_metadata() == ()  # type: ignore[attr-defined]
    if ending == "cancelled":
        waits.cancel()
    give_up = time.monotonic() + PATIENCE
    while worker.running.requests_waiting and time.monotonic() < give_up:
        time.sleep(0.01)
    assert worker.running.requests_waiting == 0
    assert worker.running.requests_inside == 1
    held.let_go.set()
    assert sum(len(response.residues) for response in running) == 3 * 64 * 4
    assert not held.entered.acquire(blocking=False)


def test_draining_refuses_requests_that_wait_or_are_new_and_finishes_those_inside(
    store: LayerStore, start: Start
) -> None:
    held = Held(store)
    worker = start(Limits(max_concurrent=1), multiplier=held)
    message = header(store, QK_FORWARD, 3, Seed(KEY, Q31))
    running = worker.ask([message])
    assert held.entered.acquire(timeout=PATIENCE)
    assert worker.health() == worker.health("") == health_pb2.HealthCheckResponse.SERVING
    waits = worker.ask([message])
    assert waits.initial_metadata() == ()  # type: ignore[attr-defined]

    finished: Queue[bool] = Queue()
    watch = health_pb2_grpc.HealthStub(worker.channel).Watch(
        health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=PATIENCE
    )
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    stopper = threading.Thread(target=lambda: finished.put(worker.running.stop(PATIENCE)))
    stopper.start()
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()
    assert worker.health("") == health_pb2.HealthCheckResponse.NOT_SERVING
    code, details = worker.refusal([message])
    assert code is STATUS.UNAVAILABLE
    assert "shutting down" in details
    # One that waits is told at once, so that its client asks a replica.
    with pytest.raises(grpc.RpcError) as caught:
        next(waits)
    assert caught.value.code() is STATUS.UNAVAILABLE
    assert finished.empty()

    held.let_go.set()
    expected = big_product(store, QK_FORWARD, Seed(KEY, Q31).expand(3, 16))
    assert b"".join(r.residues for r in running) == expected.tobytes()
    stopper.join(PATIENCE)
    assert finished.get_nowait() is True
    assert worker.running.stop() is True


def test_a_request_that_does_not_finish_in_time_is_cut_off(store: LayerStore, start: Start) -> None:
    held = Held(store)
    worker = start(multiplier=held)
    running = worker.ask([header(store, QK_FORWARD, 3, Seed(KEY, Q31))])
    assert held.entered.acquire(timeout=PATIENCE)
    assert worker.running.stop(drain_seconds=0) is False
    with pytest.raises(grpc.RpcError):
        next(running)
    held.let_go.set()


def test_health_of_a_service_that_is_not_there_is_not_found(worker: Worker) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        worker.health("no.such.Service")
    assert caught.value.code() is STATUS.NOT_FOUND


def test_reflection_lists_the_service(worker: Worker) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    stub = reflection_pb2_grpc.ServerReflectionStub(worker.channel)
    [response] = stub.ServerReflectionInfo(iter([request]), timeout=PATIENCE)
    names = {service.name for service in response.list_services_response.service}
    assert {SERVICE_NAME, "grpc.health.v1.Health"} <= names
