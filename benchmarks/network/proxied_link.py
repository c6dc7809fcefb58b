"""A link of a given bandwidth and delay without root: a proxy before each worker.

    python -m benchmarks.network.proxied_link BYTES_PER_SECOND SECONDS HOST:PORT ...

Each connection goes through a process that passes bytes on as fast as the link would, all connections
together, and so many seconds later. Where there is root, `shaped_link` is the better likeness: here TCP
sees no delay, and only the windows of HTTP/2 are tested. The process prints, as a line of JSON, the
addresses to connect to.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Proxy", "proxied"]

_CHUNK = 64 << 10


@dataclass(frozen=True)
class Proxy:
    """A running proxy.

    Attributes:
        pid: of its process.
        addresses: where each operator's worker is reached through it.
    """

    pid: int
    addresses: dict[str, str]


@contextmanager
def proxied(workers: Mapping[str, str], bandwidth: float, one_way: float) -> Iterator[Proxy]:
    """The block has a proxy before each worker.

    Args:
        workers: address of each operator's worker.
        bandwidth: bytes a second in each direction, of all connections together.
        one_way: seconds of delay in each direction.
    """
    command = [sys.executable, str(Path(__file__)), str(bandwidth), str(one_way), *workers.values()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            addresses = json.loads(process.stdout.readline())
            yield Proxy(process.pid, dict(zip(workers, addresses, strict=True)))
        finally:
            process.kill()


class _Direction:
    """One direction of the link: when bytes that come now are through."""

    def __init__(self, bandwidth: float, delay: float) -> None:
        self._bandwidth = bandwidth
        self._delay = delay
        self._free = 0.0
        # What is on the link: its bandwidth times its delay, and two chunks of each of a few connections.
        self.bytes_on_the_way = int(bandwidth * delay) + 8 * _CHUNK

    def sent(self, size: int, now: float) -> tuple[float, float]:
        """When the last of so many bytes has left, and when it arrives."""
        self._free = max(self._free, now) + size / self._bandwidth
        return self._free, self._free + self._delay


class _OneWay(asyncio.Protocol):
    """Reads from one end of a connection, and writes to the other when it is time.

    Reading stops while what has been read has not left yet, so that the sender feels the link's rate, and
    while the receiver does not read.
    """

    def __init__(self, direction: _Direction) -> None:
        self._direction = direction
        self._loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.other: _OneWay | None = None
        self._on_the_way = 0
        self._blocked = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        left, arrives = self._direction.sent(len(data), self._loop.time())
        self._on_the_way += len(data)
        assert self.transport is not None
        self.transport.pause_reading()
        self._loop.call_at(left, self._go_on)
        self._loop.call_at(arrives, self._deliver, data)

    def _go_on(self) -> None:
        room = self._on_the_way < self._direction.bytes_on_the_way
        if self.transport is not None and room and not self._blocked and not self.transport.is_closing():
            self.transport.resume_reading()

    def _deliver(self, data: bytes) -> None:
        self._on_the_way -= len(data)
        assert self.other is not None and self.other.transport is not None
        self.other.transport.write(data)
        self._go_on()

    def pause_writing(self) -> None:
        if self.other is not None:
            self.other._blocked = True

    def resume_writing(self) -> None:
        if self.other is not None:
            self.other._blocked = False
            self.other._go_on()

    def connection_lost(self, error: Exception | None) -> None:
        if self.other is not None and self.other.transport is not None:
            last = self._direction.sent(0, self._loop.time())[1]
            self._loop.call_at(last, self.other.transport.close)


async def _forward(worker: str, up: _Direction, down: _Direction) -> str:
    """Listens in a worker's stead; returns the address."""
    loop = asyncio.get_running_loop()
    host, port = worker.rsplit(":", 1)
    connecting: set[asyncio.Task[None]] = set()

    async def connect(client: _OneWay) -> None:
        server = _OneWay(down)
        try:
            await loop.create_connection(lambda: server, host, int(port))
        except OSError:
            assert client.transport is not None
            client.transport.abort()
            return
        client.other, server.other = server, client
        assert client.transport is not None
        with suppress(RuntimeError):  # it is gone already
            client.transport.resume_reading()

    class Accepted(_OneWay):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            assert self.transport is not None
            self.transport.pause_reading()  # until the worker is there
            task = loop.create_task(connect(self))
            connecting.add(task)
            task.add_done_callback(connecting.discard)

    listening = await loop.create_server(lambda: Accepted(up), host, 0)
    _listening.append(listening)
    return f"{host}:{listening.sockets[0].getsockname()[1]}"


_listening: list[asyncio.Server] = []


async def main() -> None:
    bandwidth, delay = float(sys.argv[1]), float(sys.argv[2])
    up, down = _Direction(bandwidth, delay), _Direction(bandwidth, delay)
    print(json.dumps([await _forward(worker, up, down) for worker in sys.argv[3:]]), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
