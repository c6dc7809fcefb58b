"""A run's figures for Prometheus: a page on loopback, a file for node_exporter, or both."""

import contextlib
import ipaddress
import logging
import socket
import socketserver
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, MetricsHandler, write_to_textfile
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from blindtune.client.metrics import Collector
from blindtune.client.multiplier import PrivateMultiplier
from blindtune.protocol.errors import ConfigurationError

__all__ = ["Monitor", "monitoring"]

_logger = logging.getLogger(__name__)
_SECONDS = 10


class Monitor(TrainerCallback):
    """Shows the figures of a run's multiplier until it is closed.

    Args:
        listen: ``HOST:PORT`` on loopback of the page ``/metrics``; none if None.
        file: written at each log event and at the end, whole or not at all; none if None. node_exporter
            reads files that end in ``.prom``.

    Attributes:
        address: where the page is.

    Raises:
        ConfigurationError: the page would be open to other machines, its address is taken, or the file can't
            be written.
    """

    def __init__(self, listen: str | None = None, file: Path | None = None) -> None:
        self._registry = CollectorRegistry()
        self._file = file
        self._warned = False
        self._server: _Server | None = None
        self.address: str | None = None
        if file is not None:
            try:
                write_to_textfile(str(file), self._registry)
            except OSError as error:
                raise ConfigurationError(
                    f"--metrics-file {file}: cannot write it: {error.strerror}"
                ) from None
        if listen is not None:
            self._server = _open(listen, self._registry)
            host = listen.rpartition(":")[0]
            self.address = f"{host}:{self._server.server_address[1]}"
            threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def watch(self, multiplier: PrivateMultiplier) -> None:
        """Shows this multiplier's figures from now on."""
        self._registry.register(Collector(multiplier))
        self.write()

    def write(self) -> None:
        """Writes the file. A file that can't be written is no reason to lose a run: one warning says so."""
        if self._file is None:
            return
        try:
            write_to_textfile(str(self._file), self._registry)
        except OSError as error:
            if not self._warned:
                _logger.warning("cannot write the metrics to %s: %s", self._file, error.strerror)
            self._warned = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        # The losses that are logged are left where they are.
        self.write()

    def close(self) -> None:
        """Writes the file a last time and takes the page down."""
        self.write()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class _Handler(MetricsHandler):
    timeout = _SECONDS
    server_version = "blindtune"
    sys_version = ""

    def do_GET(self) -> None:
        if urlsplit(self.path).path == "/metrics":
            super().do_GET()
        else:
            self.send_error(404)


class _Server(ThreadingHTTPServer):
    allow_reuse_port = False

    def __init__(self, family: int, address: Any, registry: CollectorRegistry) -> None:
        self.address_family = family
        super().__init__(address, _Handler.factory(registry))

    def server_bind(self) -> None:
        # The stock method looks the host's name up, for which it may ask a name server.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        _logger.debug("a reader of the metrics failed", exc_info=True)


def _open(listen: str, registry: CollectorRegistry) -> _Server:
    host, colon, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 65536):
        raise ConfigurationError(f"--metrics-listen {listen!r} is no address: give HOST:PORT")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"--metrics-listen {listen}: {error}") from None
    if not all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found):
        raise ConfigurationError(
            f"--metrics-listen {listen} can be reached from other machines: choose 127.0.0.1, or "
            "--metrics-file"
        )
    family, *_, address = found[0]
    try:
        return _Server(family, address, registry)
    except OSError as error:
        raise ConfigurationError(
            f"--metrics-listen {listen}: cannot listen there: {error.strerror}"
        ) from None


@contextlib.contextmanager
def monitoring(listen: str | None, file: Path | None) -> Iterator[Monitor | None]:
    """A monitor for as long as the block runs, where one is wanted."""
    if listen is None and file is None:
        yield None
        return
    monitor = Monitor(listen, file)
    try:
        yield monitor
    finally:
        monitor.close()
