"""A TLS handshake as the client's gRPC makes it, by a library that tells why one fails.

The same things are demanded: a certificate for this host, signed by the pinned CA (or an intermediate
one, when that is what is pinned), and HTTP/2. The reason is what gRPC does not tell.
"""

import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from blindtune.client.config.blind_config import Operator
from blindtune.client.preflight.certificates import check_validity
from blindtune.client.preflight.finding import Finding

__all__ = ["check_plaintext", "check_tls"]

# The client's preface of HTTP/2 and empty settings (RFC 9113, sections 3.4 and 6.5): the answer to it is
# what shows that a client's certificate was let in, since TLS 1.3 ends the client's handshake before.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
# Numbers from OpenSSL's x509_vfy.h.
_NOT_YET_VALID, _EXPIRED, _OTHER_HOST, _OTHER_ADDRESS = 9, 10, 62, 64
_OTHER_CA = (2, 7, 18, 19, 20, 21, 30)
_NO_TLS = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE"}


def check_tls(who: str, operator: Operator, host: str, port: int, seconds: float) -> Iterator[Finding]:
    """Whether worker and client accept each other's certificate.

    Args:
        who: operator and worker, for the findings' names.
        operator: with its files, which were checked.
        host, port: of the worker.
        seconds: for each step of the handshake.
    """
    check = f"{who} TLS"
    try:
        with _connected(operator, host, port, seconds) as connection:
            certificate = x509.load_der_x509_certificate(connection.getpeercert(binary_form=True) or b"")
            yield check_validity(
                f"{who} certificate",
                [certificate],
                datetime.now(UTC),
                f"ask operator {operator.name} to renew it",
            )
            yield _verdict(check, operator, connection)
    except ssl.SSLCertVerificationError as error:
        yield _certificate_refused(f"{who} certificate", operator, host, error)
    except ssl.SSLError as error:
        yield _handshake_failed(check, operator, port, error)
    except TimeoutError:
        yield Finding(
            check,
            "problem",
            f"timeout: no TLS handshake on port {port} within {seconds:g} s",
            "check that a worker listens there and not another service, and that it is not overloaded",
        )
    except OSError as error:
        yield Finding(
            check,
            "problem",
            f"the connection broke off during the handshake ({error.strerror})",
            "check that a worker listens there, without a proxy in between, and read its log",
        )


def check_plaintext(who: str, host: str, port: int, seconds: float) -> Iterator[Finding]:
    """Whether a server speaks TLS although the client is told not to; says nothing if it doesn't."""
    # Who it is doesn't matter here, and it is told nothing.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host, port), seconds) as plain,
            context.wrap_socket(plain, server_hostname=host) as connection,
        ):
            version = connection.version()
    except OSError:
        return
    yield Finding(
        f"{who} TLS",
        "problem",
        f"the server on port {port} speaks {version}, and insecure is set",
        "leave out insecure, and give the operator's ca, cert and key",
    )


def _connected(operator: Operator, host: str, port: int, seconds: float) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC does
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(Path(operator.ca or ""))
    if operator.cert and operator.key:
        # Without a password OpenSSL would ask for one at the terminal.
        context.load_cert_chain(Path(operator.cert), Path(operator.key), password=lambda: "")
    plain = socket.create_connection((host, port), seconds)
    try:
        return context.wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise


def _verdict(check: str, operator: Operator, connection: ssl.SSLSocket) -> Finding:
    """What the worker makes of the client's certificate, or of none, once the client has accepted its own."""
    if connection.selected_alpn_protocol() != "h2":
        return Finding(
            check,
            "problem",
            "the server does not speak HTTP/2: it is no worker, or a proxy in front of one",
            "correct the port, or let the proxy pass TLS through untouched",
        )
    try:
        connection.sendall(_PREFACE)
        answered = bool(connection.recv(9))
    except (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError):
        answered = False
    if not answered:
        return _client_refused(check, operator, "it hung up once it had seen it")
    accepted = (
        "each side accepts the other's certificate"
        if operator.cert
        else "the worker's certificate is accepted"
    )
    return Finding(check, "ok", f"{connection.version()}, {accepted}")


def _client_refused(check: str, operator: Operator, how: str) -> Finding:
    if operator.cert is None:
        return Finding(
            check,
            "problem",
            f"the worker wants a certificate of the client, and no token ({how})",
            f"ask operator {operator.name} for a certificate, or to start its workers with --tokens",
        )
    return Finding(
        check,
        "problem",
        f"the worker does not accept the client's certificate {operator.cert} ({how})",
        f"ask operator {operator.name} for a certificate of the CA that its workers let in (--tls-client-ca)",
    )


def _certificate_refused(
    check: str, operator: Operator, host: str, error: ssl.SSLCertVerificationError
) -> Finding:
    code, message = error.verify_code, error.verify_message
    renew = f"ask operator {operator.name} to renew it"
    if code in _OTHER_CA:
        return Finding(
            check,
            "problem",
            f"not signed by the pinned CA {operator.ca} ({message})",
            f"get operator {operator.name}'s current CA over a channel that you trust; if you have it "
            "already, somebody else answers at this address",
        )
    if code in (_OTHER_HOST, _OTHER_ADDRESS):
        return Finding(
            check,
            "problem",
            f"signed by the pinned CA, but for another host than {host}",
            f"use the name that the certificate is for, or ask operator {operator.name} for one for {host}",
        )
    if code == _EXPIRED:
        return Finding(check, "problem", "expired, by this machine's clock", renew)
    if code == _NOT_YET_VALID:
        return Finding(
            check, "problem", "not valid yet, by this machine's clock", f"set the clock right, or {renew}"
        )
    return Finding(
        check, "problem", f"not acceptable: {message}", f"ask operator {operator.name} for a new one"
    )


def _handshake_failed(check: str, operator: Operator, port: int, error: ssl.SSLError) -> Finding:
    reason = error.reason or "no reason given"
    if reason in _NO_TLS:
        return Finding(
            check,
            "problem",
            f"the server on port {port} does not speak TLS",
            "correct the port, or let the worker be started with its TLS files and without --insecure",
        )
    if "ALERT" in reason and any(word in reason for word in ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED")):
        return _client_refused(check, operator, reason)
    return Finding(
        check,
        "problem",
        f"the handshake failed ({reason})",
        "check that a worker listens there, with TLS 1.2 or newer, and read its log",
    )
