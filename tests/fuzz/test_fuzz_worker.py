"""Requests of any bytes: a worker answers with a typed status, says nothing of the operand, and lives on."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import grpc
import numpy as np
import pytest
from fuzzing import examples, require_plain
from hostile_requests import MARK, streams, valid_request
from hypothesis import given
from hypothesis import strategies as st
from support.operators import running_operators

from blindtune.checkpoint import Checkpoint
from blindtune.proto import worker_pb2, worker_pb2_grpc
from blindtune.protocol.expansion import Seed
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import backward_products, forward_products
from blindtune.server.admission.limits import Limits
from blindtune.server.admission.places import Places, bounds_of
from blindtune.server.service import WorkerService
from blindtune.server.store import LayerStore

LAYERS = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
(FORWARD,) = forward_products(LAYERS, 32)
(BACKWARD,) = backward_products(zip(LAYERS, (32, 16, 16), strict=True))
SEED = Seed(MARK * 8, Q31, 3)
REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
LIMITS = Limits(max_requests_per_second=1e6)
# A block of this model's products, what is multiplied of it, and the messages themselves.
MOST_MEMORY = 8 << 20
PATIENCE = 60


class Aborted(Exception):
    pass


class Context:
    """As much of a call as the service looks at."""

    def __init__(self) -> None:
        self.code: grpc.StatusCode = grpc.StatusCode.OK
        self.details = ""

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return []

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    def peer(self) -> str:
        return "ipv4:127.0.0.1:9"

    def is_active(self) -> bool:
        return True

    def cancel(self) -> None:
        raise AssertionError("cancelled")

    def time_remaining(self) -> float:
        return 60.0

    def add_callback(self, callback: Any) -> bool:
        return True

    def send_initial_metadata(self, metadata: tuple[()]) -> None:
        assert self.code is grpc.StatusCode.OK

    def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        self.code, self.details = code, details
        raise Aborted


@pytest.fixture(scope="module")
def store(checkpoints: dict[str, Path]) -> LayerStore:
    return LayerStore.load(Checkpoint.open(checkpoints["llama"]))


@pytest.fixture(scope="module")
def service(store: LayerStore) -> WorkerService:
    return WorkerService(store, LIMITS, Places(bounds_of(LIMITS)))


def valid_requests(store: LayerStore) -> list[list[worker_pb2.MultiplyRequest]]:
    return [
        valid_request(product, store.fingerprint, 5, seed)
        for product in (FORWARD, BACKWARD)
        for seed in (None, SEED)
    ]


def require_refusal(code: grpc.StatusCode, details: str) -> None:
    assert code in REFUSALS, (code, details)
    require_plain(details, most=1000)
    assert MARK.decode() not in details.replace(f"'{MARK.decode()}'", "")  # a layer may be called so
    assert str(int.from_bytes(MARK, "little")) not in details


def serialized(messages: list[worker_pb2.MultiplyRequest]) -> list[bytes]:
    return [message.SerializeToString() for message in messages]


def ask(service: WorkerService, messages: list[bytes]) -> tuple[Context, bytes]:
    context: Any = Context()
    answer = b""
    try:
        for response in service.Multiply(iter(messages), context):
            answer += worker_pb2.MultiplyResponse.FromString(response).residues
    except Aborted:
        require_refusal(context.code, context.details)
    return context, answer


def test_any_stream_of_messages_is_answered_or_refused_in_little_memory(
    store: LayerStore, service: WorkerService
) -> None:
    valid = [serialized(x) for x in valid_requests(store)]
    expected = [ask(service, x)[1] for x in valid]
    assert all(expected)

    @examples(300)
    @given(stream=streams(valid_requests(store), LAYERS, store.fingerprint))
    def check(stream: list[bytes]) -> None:
        tracemalloc.start()
        try:
            ask(service, stream)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < MOST_MEMORY + 4 * sum(map(len, stream)), peak

    check()
    assert [ask(service, x)[1] for x in valid] == expected


def test_a_header_that_announces_everything_takes_no_memory_for_it(
    store: LayerStore, service: WorkerService
) -> None:
    (header, *_) = valid_request(FORWARD, store.fingerprint, LIMITS.max_rows)
    for rows in (LIMITS.max_rows, 2**32 - 1):
        header.header.rows = rows
        tracemalloc.start()
        context, _ = ask(service, serialized([header]))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert context.code in REFUSALS
        assert peak < MOST_MEMORY


class RawWorker:
    """A worker process, asked in bytes."""

    def __init__(self, address: str, process: Any) -> None:
        self.process = process
        self.channel = grpc.insecure_channel(address)
        self.multiply = self.channel.stream_stream("/blindtune.v1.Worker/Multiply")
        self.manifest = self.channel.unary_unary("/blindtune.v1.Worker/GetManifest")
        self.health = self.channel.unary_unary("/grpc.health.v1.Health/Check")
        self.stub = worker_pb2_grpc.WorkerStub(self.channel)


@pytest.fixture(scope="module")
def raw_worker(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RawWorker]:
    folder, models = tmp_path_factory.mktemp("operators"), {"llama": checkpoints["llama"]}
    with running_operators(folder, models, (1,), secure=False, limits=LIMITS) as (operator,):
        (running,) = operator.workers
        worker = RawWorker(running.addresses["llama"], running)
        yield worker
        worker.channel.close()


def status_of(call: Any) -> tuple[grpc.StatusCode, str, bytes]:
    try:
        return grpc.StatusCode.OK, "", b"".join(call)
    except grpc.RpcError as error:
        return error.code(), error.details() or "", b""


def test_a_worker_process_survives_any_bytes_and_answers_the_next_request(
    store: LayerStore, raw_worker: RawWorker
) -> None:
    valid = valid_requests(store)
    expected = [
        np.frombuffer(
            b"".join(r.residues for r in raw_worker.stub.Multiply(iter(x), timeout=PATIENCE)), "<u4"
        )
        for x in valid
    ]

    @examples(100)
    @given(stream=streams(valid, LAYERS, store.fingerprint) | st.lists(st.binary(max_size=40), max_size=4))
    def check(stream: list[bytes]) -> None:
        code, details, _ = status_of(raw_worker.multiply(iter(stream), timeout=PATIENCE))
        if code is not grpc.StatusCode.OK:
            require_refusal(code, details)

    @examples(20)
    @given(data=st.binary(max_size=40))
    def check_manifest(data: bytes) -> None:
        manifest = raw_worker.manifest(data, timeout=PATIENCE)
        assert worker_pb2.Manifest.FromString(manifest).fingerprint == store.fingerprint
        try:
            raw_worker.health(data, timeout=PATIENCE)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.NOT_FOUND  # of a service

    check()
    check_manifest()
    for messages, answer in zip(valid, expected, strict=True):
        data = b"".join(r.residues for r in raw_worker.stub.Multiply(iter(messages), timeout=PATIENCE))
        assert np.array_equal(np.frombuffer(data, "<u4"), answer)
    assert raw_worker.process.process.is_alive()
    log = raw_worker.process.log
    assert "Traceback" not in log
    assert MARK.decode() not in log


def test_bytes_that_are_no_message_are_an_invalid_argument(store: LayerStore, raw_worker: RawWorker) -> None:
    header = valid_request(FORWARD, store.fingerprint)[0].SerializeToString()
    for stream in ([b"\xff\xff"], [header, b"\xff\xff"], [b"\x0a\x04\x12\x02\xff\xfe"]):
        code, _, _ = status_of(raw_worker.multiply(iter(stream), timeout=PATIENCE))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
