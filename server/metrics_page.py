"""Where a worker's figures are shown: on loopback in the open, and elsewhere with mutual TLS."""

import ssl

from blindtune.common.listening import host_and_port, is_loopback
from blindtune.common.metrics_page import MetricsPage
from blindtune.errors import ConfigurationError
from blindtune.server.transport import TlsFiles

__all__ = ["open_page"]


def open_page(listen: str, tls: TlsFiles | None) -> MetricsPage:
    """Takes an address for the metrics of a worker.

    Args:
        listen: ``HOST:PORT``.
        tls: used where the address is not this machine's loopback, and needed there.

    Raises:
        ConfigurationError: no such address, one that is taken, or one that others can reach without TLS.
    """
    if is_loopback(host_and_port(listen)[0]):
        return MetricsPage.open(listen)
    if tls is None:
        raise ConfigurationError(
            f"--metrics-listen {listen} can be reached from other machines, which needs --tls-cert, "
            "--tls-key and --tls-client-ca: give them, or a loopback address such as 127.0.0.1"
        )
    return MetricsPage.open(listen, _context(tls))


def _context(tls: TlsFiles) -> ssl.SSLContext:
    tls.credentials()  # says clearly what is wrong with a file
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(tls.client_ca)
    context.load_cert_chain(tls.certificate, tls.key)
    return context
