"""The page that Prometheus reads: ``/metrics`` and nothing else.

The server of ``prometheus_client`` answers every path, has a thread for whoever comes, and waits for one
reader's TLS handshake before it takes the next.
"""

import logging
import socket
import socketserver
import ssl
import threading
from http.server import ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, MetricsHandler

from blindtune.common.listening import host_and_port
from blindtune.errors import ConfigurationError

__all__ = ["MetricsPage"]

_logger = logging.getLogger(__name__)
_SECONDS = 10
_READERS = 16


class MetricsPage:
    """Where a registry is shown, from `open` to `close`. It has no rule about who may read it.

    Attributes:
        address: ``HOST:PORT``.
        scheme: ``http`` or ``https``.
    """

    def __init__(self, server: "_Server", host: str, scheme: str) -> None:
        self._server = server
        self.scheme = scheme
        self.address = f"[{host}]:{server.server_port}" if ":" in host else f"{host}:{server.server_port}"

    @classmethod
    def open(cls, listen: str, tls: ssl.SSLContext | None = None) -> Self:
        """Takes the address; the page answers once it is given a registry.

        Args:
            listen: ``HOST:PORT``.
            tls: with it, the page is read over HTTPS.

        Raises:
            ConfigurationError: no such address, or one that is taken.
        """
        host, port = host_and_port(listen)
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            return cls(_Server(family, address, tls), host, "https" if tls else "http")
        except (OSError, UnicodeError) as error:
            raise ConfigurationError(f"--metrics-listen {listen}: cannot listen there: {error}") from error

    def show(self, registry: CollectorRegistry) -> None:
        """Answers from now on, in threads of its own."""
        self._server.RequestHandlerClass = _Handler.factory(registry)
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Stops answering a page that is shown."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(MetricsHandler):
    """Sends the registry to whoever asks for ``/metrics``."""

    timeout = _SECONDS
    server_version = "blindtune"
    sys_version = ""

    def do_GET(self) -> None:
        if urlsplit(self.path).path == "/metrics":
            super().do_GET()
        else:
            self.send_error(404)


class _Server(ThreadingHTTPServer):
    allow_reuse_port = False  # a second one at the same address must fail

    def __init__(self, family: int, address: Any, context: ssl.SSLContext | None) -> None:
        self.address_family = family
        self._context = context
        self._free = threading.BoundedSemaphore(_READERS)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # The stock method looks the host's name up, for which it may ask a name server.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        # Without a bound, readers that hang would use up the threads that the process itself needs.
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self._context is None:
            super().finish_request(request, client_address)
            return
        # In the connection's own thread, so that a handshake that hangs keeps nobody else waiting.
        request.settimeout(_SECONDS)
        with self._context.wrap_socket(request, server_side=True) as secured:
            super().finish_request(secured, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        _logger.debug("a reader of the metrics failed", exc_info=True)
