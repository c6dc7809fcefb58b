"""The listening socket: mutual TLS, or plaintext that never leaves the machine."""

import ipaddress
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from blindtune.protocol.errors import ConfigurationError

__all__ = ["Endpoint", "TlsFiles"]


@dataclass(frozen=True)
class TlsFiles:
    """Paths of PEM files.

    Attributes:
        certificate: the worker's own, with its chain.
        key: the certificate's private key, unencrypted.
        client_ca: the CA whose client certificates are let in; nobody else is.
    """

    certificate: Path
    key: Path
    client_ca: Path

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials that demand a client certificate.

        Raises:
            ConfigurationError: a file is missing or unusable, or key and certificate don't match.
        """
        try:
            key, certificate, client_ca = (
                path.read_bytes() for path in (self.key, self.certificate, self.client_ca)
            )
        except OSError as error:
            raise ConfigurationError(f"cannot read {error.filename}: {error.strerror}") from error
        # gRPC reports bad files late and vaguely; the standard library says what is wrong with them.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.key, password=lambda: "")
        except ssl.SSLError as error:
            raise ConfigurationError(
                f"certificate {self.certificate} and key {self.key} cannot be used together: {error}"
            ) from error
        try:
            context.load_verify_locations(self.client_ca)
        except ssl.SSLError as error:
            raise ConfigurationError(f"{self.client_ca} holds no CA certificate: {error}") from error
        return grpc.ssl_server_credentials(
            [(key, certificate)], root_certificates=client_ca, require_client_auth=True
        )


@dataclass(frozen=True)
class Endpoint:
    """Where a worker listens and how it is secured.

    Attributes:
        host: a name or address; IPv6 without brackets.
        port: 0 for any free one.
        tls: None for plaintext.
    """

    host: str
    port: int
    tls: TlsFiles | None

    @classmethod
    def parse(cls, listen: str, tls: TlsFiles | None = None, insecure: bool = False) -> "Endpoint":
        """Reads ``HOST:PORT`` (``[::1]:PORT`` for IPv6).

        Args:
            listen: the address.
            tls: for mutual TLS.
            insecure: for plaintext, which needs a host that is this machine alone.

        Raises:
            ConfigurationError: no such address, neither or both of ``tls`` and ``insecure``, or
                plaintext where others could listen in.
        """
        host, colon, port = listen.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not (colon and host and port.isascii() and port.isdigit() and int(port) < 65536):
            raise ConfigurationError(f"{listen!r} is no address to listen at: give HOST:PORT")
        if tls and insecure:
            raise ConfigurationError("choose either the TLS files or --insecure, not both")
        if not tls and not insecure:
            raise ConfigurationError(
                "give --tls-cert, --tls-key and --tls-client-ca, or --insecure for plaintext on loopback"
            )
        if insecure and not _is_loopback(host):
            raise ConfigurationError(
                f"--insecure needs a loopback address such as 127.0.0.1, not {host}: over a network "
                "everyone could read and change the traffic. Use the TLS files there"
            )
        return cls(host, int(port), tls)

    def address(self, port: int) -> str:
        """``HOST:PORT`` as clients write it."""
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"

    def bind(self, server: grpc.Server) -> int:
        """Opens the socket and returns its port.

        Raises:
            ConfigurationError: the TLS files are unusable, or the address is not free or not ours.
        """
        address = self.address(self.port)
        credentials = self.tls.credentials() if self.tls else None
        try:
            if credentials is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConfigurationError(
                f"cannot listen at {address}: it is in use, or no address of this machine"
            ) from error
        return port


def _is_loopback(host: str) -> bool:
    """Whether all addresses of a host are this machine's loopback."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found)
