"""The listening socket: TLS, for clients with certificates or tokens, or plaintext on loopback alone."""

import errno
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from blindtune.common.listening import host_and_port, is_loopback
from blindtune.common.reload import Reloaded
from blindtune.errors import ConfigurationError

__all__ = ["Endpoint", "TlsFiles"]


@dataclass(frozen=True)
class TlsFiles:
    """Paths of PEM files.

    Attributes:
        certificate: the worker's own, with its chain.
        key: the certificate's private key, unencrypted.
        client_ca: the CA whose client certificates are let in; nobody else is. None where tokens say who
            is let in, and clients need no certificates.
    """

    certificate: Path
    key: Path
    client_ca: Path | None

    @property
    def paths(self) -> tuple[Path, ...]:
        """All of the files."""
        return (self.key, self.certificate, *((self.client_ca,) if self.client_ca else ()))

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials that follow the files: each new connection gets the certificates that are there then.

        Connections that are open keep theirs. Files that became unusable change nothing.

        Raises:
            ConfigurationError: a file is missing or unusable, or key and certificate don't match.
        """
        configuration = Reloaded("certificates", self.paths, self._configuration)
        current = configuration.get()

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal current
            found = configuration.get()
            if found is current:
                return None
            current = found
            return found

        return grpc.dynamic_ssl_server_credentials(
            current,
            changed,  # type: ignore[arg-type]  # None says that there is nothing new
            require_client_authentication=self.client_ca is not None,
        )

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        key, certificate, *client_ca = self._contents()
        self._require_usable()
        if [key, certificate, *client_ca] != self._contents():
            raise ConfigurationError(f"{self.certificate} or a file with it changes right now: try again")
        return grpc.ssl_server_certificate_configuration(
            [(key, certificate)], root_certificates=client_ca[0] if client_ca else None
        )

    def _contents(self) -> list[bytes]:
        try:
            return [path.read_bytes() for path in self.paths]
        except OSError as error:
            raise ConfigurationError(f"cannot read {error.filename}: {error.strerror}") from error

    def _require_usable(self) -> None:
        # gRPC reports bad files late and vaguely; the standard library says what is wrong with them.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.key, password=lambda: "")
        except ssl.SSLError as error:
            raise ConfigurationError(
                f"certificate {self.certificate} and key {self.key} cannot be used together: {error}"
            ) from error
        except OSError as error:
            raise ConfigurationError(
                f"cannot read {self.certificate} or {self.key}: {error.strerror}"
            ) from error
        if self.client_ca is None:
            return
        try:
            context.load_verify_locations(self.client_ca)
        except ssl.SSLError as error:
            raise ConfigurationError(f"{self.client_ca} holds no CA certificate: {error}") from error
        except OSError as error:
            raise ConfigurationError(f"cannot read {self.client_ca}: {error.strerror}") from error


@dataclass(frozen=True)
class Endpoint:
    """Where a worker listens and how it is secured.

    Attributes:
        host: a name or address; IPv6 without brackets.
        port: 0 for any free one.
        tls: None for plaintext.
        tokens: file of the tokens of clients, which then need no certificates.
    """

    host: str
    port: int
    tls: TlsFiles | None
    tokens: Path | None = None

    @classmethod
    def parse(
        cls, listen: str, tls: TlsFiles | None = None, insecure: bool = False, tokens: Path | None = None
    ) -> "Endpoint":
        """Reads ``HOST:PORT`` (``[::1]:PORT`` for IPv6).

        Args:
            listen: the address.
            tls: the worker's certificate, and the CA of its clients unless there are tokens.
            insecure: for plaintext, which needs a host that is this machine alone.
            tokens: file of the tokens of clients.

        Raises:
            ConfigurationError: no such address, neither or both of ``tls`` and ``insecure``, neither or
                both of client certificates and tokens, or plaintext where others could listen in.
        """
        host, port = host_and_port(listen)
        if tls and insecure:
            raise ConfigurationError("choose either the TLS files or --insecure, not both")
        if not tls and not insecure:
            raise ConfigurationError(
                "give --tls-cert and --tls-key with --tls-client-ca or --tokens, or --insecure for plaintext "
                "on loopback"
            )
        if tokens and insecure:
            raise ConfigurationError(
                "--tokens needs TLS, since everyone on the way could read and use them: give --tls-cert and "
                "--tls-key"
            )
        if tls and (tls.client_ca is None) == (tokens is None):
            raise ConfigurationError(
                "who is let in? Give either --tls-client-ca for clients with certificates, or --tokens for "
                "clients with tokens, and not both"
            )
        if insecure and not is_loopback(host):
            raise ConfigurationError(
                f"--insecure needs a loopback address such as 127.0.0.1, not {host}: over a network "
                "everyone could read and change the traffic. Use the TLS files there"
            )
        return cls(host, port, tls, tokens)

    def address(self, port: int) -> str:
        """``HOST:PORT`` as clients write it."""
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"

    def require_free(self) -> None:
        """Finds out whether the address can be listened at, without keeping it.

        Raises:
            ConfigurationError: it is in use, not of this machine, or not for this user.
        """
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except (OSError, UnicodeError) as error:
            raise ConfigurationError(f"cannot listen at {self.host}: it does not resolve") from error
        failed: list[OSError] = []
        for family, kind, protocol, _, address in found:
            try:
                with socket.socket(family, kind, protocol) as probe:
                    # As gRPC does: connections that have just ended are no reason to refuse.
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(address)
            except OSError as error:
                failed.append(error)
        taken = [error for error in failed if error.errno == errno.EADDRINUSE]
        if taken or (failed and len(failed) == len(found)):
            reason = (taken or failed)[0].strerror
            raise ConfigurationError(
                f"cannot listen at {self.address(self.port)}: {reason}. Stop what listens there, or choose "
                "another --listen"
            )

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
