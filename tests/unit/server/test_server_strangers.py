"""Clients that are let in, and strangers who may ask for the health alone and briefly, beside each other."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.tiny_layer import tiny_store

from blindtune.client.tls.certs import OperatorCertificates, issue_operator_certificates
from blindtune.errors import OperatorUnavailableError
from blindtune.proto import worker_pb2, worker_pb2_grpc
from blindtune.server.admission.pools import AtOnce, Counted
from blindtune.server.admission.refusals import Busy
from blindtune.server.admission.strangers import Strangers
from blindtune.server.admission.tokens import add_token
from blindtune.server.daemon import RunningWorker, serve
from blindtune.server.probe import probe
from blindtune.server.transport import Endpoint, TlsFiles

PATIENCE = 60
CHECK = "/grpc.health.v1.Health/Check"
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> OperatorCertificates:
    return issue_operator_certificates(tmp_path_factory.mktemp("certificates"), "alpha")


@pytest.fixture
def tokens(operator: OperatorCertificates, tmp_path: Path) -> dict[str, list[tuple[str, str]]]:
    file = tmp_path / "tokens"
    return {name: [("authorization", f"Bearer {add_token(file, name)}")] for name in ("alice", "bob")}


@pytest.fixture
def worker(
    operator: OperatorCertificates, tokens: dict[str, list[tuple[str, str]]], tmp_path: Path
) -> Iterator[RunningWorker]:
    tls = TlsFiles(operator.worker, operator.worker_key, None)
    endpoint = Endpoint.parse("127.0.0.1:0", tls, tokens=tmp_path / "tokens")
    worker = serve(tiny_store(8), endpoint)
    yield worker
    worker.stop(drain_seconds=0)


@pytest.fixture
def channel(worker: RunningWorker, operator: OperatorCertificates) -> Iterator[grpc.Channel]:
    credentials = grpc.ssl_channel_credentials(operator.ca.read_bytes())
    with grpc.secure_channel(worker.address, credentials) as channel:
        yield channel


@pytest.mark.parametrize(("who", "places"), [("alice", 6), ("a stranger", 4)])
def test_one_who_keeps_many_calls_open_takes_no_place_from_others(
    who: str, places: int, channel: grpc.Channel, tokens: dict[str, list[tuple[str, str]]]
) -> None:
    over = threading.Event()

    def nothing() -> Iterator[bytes]:
        over.wait(PATIENCE)
        yield from ()

    silent = [
        channel.stream_stream(CHECK)(nothing(), timeout=PATIENCE, metadata=tokens.get(who)) for _ in range(40)
    ]
    # All but those that have a place are refused at once, while those wait for their client.
    give_up = time.monotonic() + PATIENCE
    while sum(call.is_active() for call in silent) > places:
        assert time.monotonic() < give_up
        time.sleep(0.02)
    manifest = worker_pb2_grpc.WorkerStub(channel).GetManifest(
        worker_pb2.GetManifestRequest(), timeout=PATIENCE, metadata=tokens["bob"]
    )
    assert manifest.model == "tiny"
    asked = health_pb2.HealthCheckRequest()
    assert (
        health_pb2_grpc.HealthStub(channel).Check(asked, timeout=PATIENCE, metadata=tokens["bob"]).status
        == SERVING
    )
    assert sum(call.is_active() for call in silent) == places
    over.set()


class Context:
    """A call, as far as the places of strangers look at it."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self.cancelled = False

    def peer(self) -> str:
        return self._peer

    def cancel(self) -> None:
        self.cancelled = True


def test_strangers_from_many_addresses_leave_places_for_this_machine() -> None:
    strangers = Strangers(20.0)

    def admitted(peer: str) -> bool:
        context: Any = Context(peer)
        try:
            held.enter_context(strangers.inside(context))
        except Busy:
            return False
        return True

    with ExitStack() as held:
        hostile = [f"ipv4:192.0.2.{i}:{port}" for i in range(5) for port in range(1000, 1006)]
        assert [admitted(peer) for peer in hostile] == 4 * [*[True] * 2, *[False] * 4] + [False] * 6
        assert not admitted("ipv6:%5B2001:db8::1%5D:7")
        # Other addresses of the loopback network are what anybody on this machine may call from.
        assert not admitted("ipv4:127.0.0.2:7")
        here = ["ipv4:127.0.0.1:7", "ipv6:%5B::1%5D:7", "ipv6:%5B::ffff:127.0.0.1%5D:7", "ipv4:127.0.0.1:8"]
        assert [admitted(peer) for peer in [*here, "ipv4:127.0.0.1:9"]] == [True] * 4 + [False]
    with ExitStack() as held:
        assert admitted(hostile[0])


def test_a_stranger_is_cut_off_however_much_it_moves() -> None:
    now = 0.0
    strangers = Strangers(20.0, lambda: now)
    context: Any = Context("ipv4:192.0.2.1:7")
    with strangers.inside(context) as patience:
        for second in range(5):
            now = float(second)
            assert list(patience.incoming([bytes(10**6)])) and list(patience.outgoing([bytes(10**6)]))
            assert strangers.watchdog.sweep() == 0
        now = 5.1
        assert strangers.watchdog.sweep() == 1
    assert context.cancelled


def test_refusals_take_no_thread_and_none_piles_up() -> None:
    began: list[int] = []
    with AtOnce() as pool:
        failed = pool.submit(lambda: 1 // 0)
        assert pool.submit(lambda: began.append(threading.get_ident())).done()
    assert began == [threading.get_ident()]
    assert isinstance(failed.exception(), ZeroDivisionError)
    let_go = threading.Event()
    with Counted(1, "x") as counted:
        waits = [counted.submit(let_go.wait, PATIENCE) for _ in range(3)]
        assert counted.pending == 3
        let_go.set()
        assert all(future.result() for future in waits)
    assert counted.pending == 0


class RefusesOnce(health_pb2_grpc.HealthServicer):
    """Serves, but tells the first who asks something else."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code
        self.asked = 0

    def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        self.asked += 1
        if self.asked == 1:
            context.abort(self._code, "this time")
        return health_pb2.HealthCheckResponse(status=SERVING)


@pytest.mark.parametrize(
    ("code", "asks_again"),
    [("RESOURCE_EXHAUSTED", True), ("CANCELLED", True), ("UNAVAILABLE", False), ("UNAUTHENTICATED", False)],
)
def test_the_probe_asks_again_where_too_many_others_ask(code: str, asks_again: bool) -> None:
    health = RefusesOnce(grpc.StatusCode[code])
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        with nullcontext() if asks_again else pytest.raises(OperatorUnavailableError, match=code):
            probe(address, None, insecure=True, seconds=PATIENCE)
        server.stop(None).wait()
    assert health.asked == (2 if asks_again else 1)


def test_a_name_that_somebody_made_up_is_not_watched(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    # The library remembers every name that was ever watched.
    for name in ("made up", "x" * 100_000):
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.Watch(health_pb2.HealthCheckRequest(service=name), timeout=PATIENCE))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="blindtune.v1.Worker"), timeout=PATIENCE)
    assert next(watch).status == SERVING
    watch.cancel()
