"""Hostile clients that speak gRPC: what they send, and what they are told."""

import itertools
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2

from blindtune.proto import MAX_MESSAGE_BYTES, PROTOCOL_VERSION, worker_pb2
from blindtune.protocol.parameters import Q31

__all__ = ["CALLS", "FLOODS", "STRANGERS_CALLS", "Attack", "Target"]

MULTIPLY = "/blindtune.v1.Worker/Multiply"
MANIFEST = "/blindtune.v1.Worker/GetManifest"
WATCH = "/grpc.health.v1.Health/Watch"
CHECK = "/grpc.health.v1.Health/Check"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
ROWS = 8
_PATIENCE = 120.0
_THREADS = 16
_AT_ONCE = 300

Statuses = Counter[str]
Attack = Callable[["Target", int], Statuses]


@dataclass
class Target:
    """The worker under attack, and what the attacker has.

    Attributes:
        address: ``HOST:PORT``.
        ca: certificate of the worker's authority.
        cert, key: the attacker's own certificate, which is valid; none where tokens say who is let in.
        foreign: folder of certificates of another authority.
        token: the attacker's own, valid.
        fingerprint, layer, columns, outputs: of a product that the worker can do.
        source: address to call from, where frames are made by hand; any unless given.
    """

    address: str
    ca: Path
    cert: Path | None
    key: Path | None
    foreign: Path
    token: str | None
    fingerprint: str
    layer: str
    columns: int
    outputs: int
    source: str = ""

    def channel(self, cert: Path | None = None, key: Path | None = None) -> grpc.Channel:
        """A connection of its own, as the attacker unless another certificate is given."""
        cert, key = cert or self.cert, key or self.key
        credentials = grpc.ssl_channel_credentials(
            self.ca.read_bytes(),
            key.read_bytes() if key else None,
            cert.read_bytes() if cert else None,
        )
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_metadata_size", 1 << 24),
            ("grpc.enable_retries", 0),
        ]
        return grpc.secure_channel(self.address, credentials, options)

    def header(self, rows: int = ROWS, **changes: Any) -> worker_pb2.MultiplyRequest:
        """The header of a request that is right, but for what is changed."""
        header = worker_pb2.MultiplyHeader(
            protocol_version=PROTOCOL_VERSION,
            fingerprint=self.fingerprint,
            parameter_set=Q31.name,
            product=worker_pb2.Product(
                direction=worker_pb2.FORWARD,
                spans=[worker_pb2.Span(layer=self.layer, start=0, stop=self.columns)],
            ),
            rows=rows,
            columns=self.columns,
        )
        for name, value in changes.items():
            field = getattr(header, name)
            if hasattr(field, "CopyFrom"):
                field.CopyFrom(value)
            else:
                setattr(header, name, value)
        return worker_pb2.MultiplyRequest(header=header)

    def rows(self, rows: int) -> worker_pb2.MultiplyRequest:
        """So many rows of residues."""
        words = np.random.default_rng().integers(0, Q31.modulus, (rows, self.columns), dtype=np.uint32)
        return worker_pb2.MultiplyRequest(residues=words.tobytes())

    def metadata(self, token: str | None = None) -> list[tuple[str, str]]:
        """What says who calls."""
        token = token or self.token
        return [("authorization", f"Bearer {token}")] if token else []


def _status(call: Any) -> str:
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def _begin(
    channel: grpc.Channel, method: str, messages: Iterable[bytes], metadata: list[tuple[str, str]]
) -> Any:
    """A call that sends these messages; its answer is read by whoever goes through it."""
    calls: Any = channel.stream_stream(method)
    return calls(iter(messages), timeout=_PATIENCE, metadata=metadata)


def _ask(
    channel: grpc.Channel, method: str, messages: Iterable[bytes], metadata: list[tuple[str, str]]
) -> str:
    """The status of a call that sends these messages, once its whole answer was read."""
    return _status(_begin(channel, method, messages, metadata))


def _encoded(messages: Iterable[worker_pb2.MultiplyRequest]) -> Iterator[bytes]:
    return (message.SerializeToString() for message in messages)


def _concurrently(count: int, one: Callable[[int], str], threads: int) -> Statuses:
    with ThreadPoolExecutor(threads) as pool:
        return Counter(pool.map(one, range(count)))


def _over(make: Callable[[Target, int], Iterable[bytes]], method: str = MULTIPLY, threads: int = 3) -> Attack:
    """An attack whose requests differ in their messages alone, over a few connections.

    So few at a time are below the limit for one client, so that each is looked at.
    """

    def attack(target: Target, count: int) -> Statuses:
        channels = [target.channel() for _ in range(4)]
        metadata = target.metadata()
        try:
            return _concurrently(
                count, lambda n: _ask(channels[n % 4], method, make(target, n), metadata), threads
            )
        finally:
            for channel in channels:
                channel.close()

    return attack


def _requests(make: Callable[[Target, int], Iterable[worker_pb2.MultiplyRequest]]) -> Attack:
    return _over(lambda target, n: _encoded(make(target, n)))


def _connection_each(one: Callable[[Target, grpc.Channel, int], str]) -> Attack:
    """An attack with a connection for each request, a few hundred at a time."""

    def attack(target: Target, count: int) -> Statuses:
        def connected(n: int) -> str:
            with target.channel() as channel:
                return one(target, channel, n)

        return _concurrently(count, connected, _AT_ONCE)

    return attack


def _silent(method: str, make: Callable[[Target], list[bytes]]) -> Attack:
    def one(target: Target, channel: grpc.Channel, n: int) -> str:
        over = threading.Event()

        def messages() -> Iterator[bytes]:
            yield from make(target)
            over.wait(_PATIENCE)

        running = _begin(channel, method, messages(), target.metadata())
        running.add_callback(over.set)
        return _status(running)

    return _connection_each(one)


def _drip(target: Target, channel: grpc.Channel, n: int) -> str:
    """A row twice a second, of a request that would take hours like this."""
    over = threading.Event()

    def messages() -> Iterator[bytes]:
        yield target.header(rows=16_384).SerializeToString()
        row = target.rows(1).SerializeToString()
        while not over.wait(0.5):
            yield row

    running = _begin(channel, MULTIPLY, messages(), target.metadata())
    running.add_callback(over.set)
    return _status(running)


def _chatter(target: Target, channel: grpc.Channel, n: int) -> str:
    """One question after the other on one call for as long as it is let, never an end."""
    until = time.monotonic() + 5.0

    def messages() -> Iterator[bytes]:
        while time.monotonic() < until:
            yield b"\x3a\x00"  # list_services
            time.sleep(0.02)

    return _ask(channel, REFLECTION, messages(), target.metadata())


def _unread(target: Target, channel: grpc.Channel, n: int) -> str:
    """Asks for tens of megabytes and takes none of them."""
    seed = worker_pb2.Seed(key=os.urandom(32))
    messages = iter([target.header(rows=16_384, seed=seed).SerializeToString()])
    running = _begin(channel, MULTIPLY, messages, target.metadata())
    ended = threading.Event()
    if running.add_callback(ended.set):
        ended.wait(5.0)
    known = ended.is_set()
    running.cancel()
    return str(running.code().name) if known else "left unread for 5 s"


def _cancelled(target: Target, count: int) -> Statuses:
    channels = [target.channel() for _ in range(4)]

    def one(n: int) -> str:
        messages = _encoded([target.header(), target.rows(ROWS)])
        running = _begin(channels[n % 4], MULTIPLY, messages, target.metadata())
        running.cancel()
        return str(running.code().name)

    try:
        return _concurrently(count, one, _THREADS)
    finally:
        for channel in channels:
            channel.close()


def _watched(target: Target, count: int) -> Statuses:
    """Watches services of made-up names of 200 kB each, for as long as it takes to hear of them."""
    channels = [target.channel() for _ in range(4)]

    def one(n: int) -> str:
        request = health_pb2.HealthCheckRequest(service=f"{n} {'x' * 200_000}").SerializeToString()
        running = _begin(channels[n % 4], WATCH, [request], target.metadata())
        try:
            next(iter(running), None)
            running.cancel()
            return "told of it"
        except grpc.RpcError as error:
            return str(error.code().name)

    try:
        return _concurrently(count, one, _THREADS)
    finally:
        for channel in channels:
            channel.close()


def _metadata_bomb(target: Target, count: int) -> Statuses:
    channels = [target.channel() for _ in range(4)]

    def one(n: int) -> str:
        pairs = [(f"x-{i}", "v" * random.choice([10, 1000])) for i in range(random.choice([10, 100, 1000]))]
        messages = _encoded([target.header(), target.rows(ROWS)])
        return _ask(channels[n % 4], MULTIPLY, messages, [*target.metadata(), *pairs])

    try:
        return _concurrently(count, one, 3)
    finally:
        for channel in channels:
            channel.close()


def _other_token(token: str | None) -> Attack:
    def attack(target: Target, count: int) -> Statuses:
        channels = [target.channel() for _ in range(4)]
        metadata = target.metadata(token) if token else []
        try:
            return _concurrently(
                count,
                lambda n: _ask(
                    channels[n % 4], MULTIPLY, _encoded([target.header(), target.rows(ROWS)]), metadata
                ),
                _THREADS,
            )
        finally:
            for channel in channels:
                channel.close()

    return attack


def _truncated(target: Target, n: int) -> Iterable[bytes]:
    header = target.header().SerializeToString()
    return [header[: random.randrange(1, len(header))], *_encoded([target.rows(ROWS)])]


def _absurd(target: Target, n: int) -> Iterable[worker_pb2.MultiplyRequest]:
    rows, columns = random.choice([(2**32 - 1, target.columns), (ROWS, 2**32 - 1), (0, 0), (2**32 - 1,) * 2])
    return [target.header(rows=rows, columns=columns), target.rows(ROWS)]


def _many_spans(target: Target, n: int) -> Iterable[worker_pb2.MultiplyRequest]:
    span = worker_pb2.Span(layer=target.layer, start=0, stop=target.columns)
    spans = [span] * random.choice([65, 1_000, 10_000])
    return [target.header(product=worker_pb2.Product(direction=worker_pb2.FORWARD, spans=spans))]


def _unknown_layer(target: Target, n: int) -> Iterable[worker_pb2.MultiplyRequest]:
    name = random.choice(["", "../../etc/passwd", "x" * 100_000, f"layer {n}"])
    spans = [worker_pb2.Span(layer=name, start=0, stop=target.columns)]
    return [target.header(product=worker_pb2.Product(direction=worker_pb2.FORWARD, spans=spans))]


def _other_contract(target: Target, n: int) -> Iterable[worker_pb2.MultiplyRequest]:
    change: dict[str, Any] = random.choice(
        [{"fingerprint": "0" * 64}, {"protocol_version": 99}, {"parameter_set": "q7"}]
    )
    return [target.header(**change), target.rows(ROWS)]


def _over_modulus(target: Target, n: int) -> Iterable[worker_pb2.MultiplyRequest]:
    words = np.full((ROWS, target.columns), Q31.modulus + n, np.uint32)
    return [target.header(), worker_pb2.MultiplyRequest(residues=words.tobytes())]


def _bad_seed(target: Target, n: int) -> Iterable[worker_pb2.MultiplyRequest]:
    key, offset = random.choice(
        [(b"", 0), (b"k" * 31, 0), (b"k" * 100_000, 0), (b"k" * 32, 2**63), (b"k" * 32, 2**64 - 1)]
    )
    return [target.header(seed=worker_pb2.Seed(key=key, row_offset=offset))]


CALLS: dict[str, Attack] = {
    "random bytes as a message": _over(
        lambda target, n: itertools.repeat(os.urandom(random.choice([1, 40, 4000])), 1 + n % 3)
    ),
    "truncated header": _over(_truncated),
    "absurd rows and columns": _requests(_absurd),
    "spans by the thousand": _requests(_many_spans),
    "unknown layers": _requests(_unknown_layer),
    "other fingerprint or version": _requests(_other_contract),
    "rows fewer than announced": _requests(lambda target, n: [target.header(), target.rows(1 + n % 7)]),
    "rows more than announced": _requests(lambda target, n: [target.header(), target.rows(ROWS + 1 + n % 7)]),
    "words that are no residues": _requests(_over_modulus),
    "messages over 4 MiB": _over(lambda target, n: [b"\x12" + bytes(MAX_MESSAGE_BYTES + 1)]),
    "seed with a wrong key or offset": _requests(_bad_seed),
    "header, then silence": _silent(MULTIPLY, lambda target: [target.header().SerializeToString()]),
    "nothing but silence": _silent(MULTIPLY, lambda target: []),
    "manifest, without asking": _silent(MANIFEST, lambda target: []),
    "reflection, then silence": _silent(REFLECTION, lambda target: []),
    "reflection without an end": _connection_each(_chatter),
    "a row now and then": _connection_each(_drip),
    "answers never read": _connection_each(_unread),
    "opened and cancelled at once": _cancelled,
    "metadata by the megabyte": _metadata_bomb,
}
"""Of a client that is let in."""

FLOODS: dict[str, Attack] = {
    "tiny requests over the rate": _over(
        lambda target, n: _encoded([target.header(rows=1), target.rows(1)]), threads=_THREADS
    ),
    "manifests over the rate": _over(lambda target, n: [b""], MANIFEST, threads=_THREADS),
}
"""Of a client that is let in, where the rate is low."""

STRANGERS_CALLS: dict[str, Attack] = {
    "no token": _other_token(None),
    "wrong token": _other_token("wrong"),
    "health watches of made-up names": _watched,
    "health checks, without asking": _silent(CHECK, lambda target: []),
    "health checks": _over(lambda target, n: [b""], CHECK),
}
"""Of one who is not, where the health service answers everybody."""
