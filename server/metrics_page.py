"""The page that Prometheus reads: ``/metrics`` and nothing else, on loopback or with mutual TLS."""

import logging
import socket
import socketserver
import ssl
import threading
from http.server import ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, MetricsHandler

from blindtune.protocol.errors import ConfigurationError
from blindtune.server.transport import Endpoint, TlsFiles, host_and_port, is_loopback

__all__ = ["MetricsPage"]

_logger = logging.getLogger(__name__)
_SECONDS = 10
_READERS = 16


class MetricsPage:
    """Where a registry is shown, from `open` to `close`.

    Attributes:
        address: ``HOST:PORT``.
        scheme: ``http`` or ``https``.
    """

    def __init__(self, server: "_Server", endpoint: Endpoint) -> None:
        self._server = server
        self.scheme = "https" if endpoint.tls else "http"
        self.address = endpoint.address(int(server.server_address[1]))

    @classmethod
    def open(cls, listen: str, tls: TlsFiles | None) -> Self:
        """Takes the address; the page answers once it is given a registry.

        Args:
            listen: ``HOST:PORT``.
            tls: used where the address is not this machine's loopback, and needed there.

        Raises:
            ConfigurationError: no such address, one that is taken, or one that others can reach without TLS.
        """
        endpoint = _endpoint(listen, tls)
        context = _context(endpoint.tls) if endpoint.tls else None
        try:
            family, *_, address = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)[0]
            return cls(_Server(family, address, context), endpoint)
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
    server_version = "blindtune-worker"
    sys_version = ""

    def do_GET(self) -> None:
        if urlsplit(self.path).path == "/metrics":
            super().do_GET()
        else:
            self.send_error(404)


class _Server(ThreadingHTTPServer):
    allow_reuse_port = False  # a second worker at the same address must fail

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
        # Without a bound, readers that hang would use up the threads that the worker itself needs.
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


def _endpoint(listen: str, tls: TlsFiles | None) -> Endpoint:
    host, port = host_and_port(listen)
    if is_loopback(host):
        return Endpoint(host, port, None)
    if tls is None:
        raise ConfigurationError(
            f"--metrics-listen {listen} can be reached from other machines, which needs --tls-cert, "
            "--tls-key and --tls-client-ca: give them, or a loopback address such as 127.0.0.1"
        )
    return Endpoint(host, port, tls)


def _context(tls: TlsFiles) -> ssl.SSLContext:
    tls.credentials()  # says clearly what is wrong with a file
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(tls.client_ca)
    context.load_cert_chain(tls.certificate, tls.key)
    return context
