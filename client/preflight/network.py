"""The way to a worker's port: its name, and a connection."""

import errno
import socket
from collections.abc import Iterator

from blindtune.client.preflight.finding import Finding

__all__ = ["check_address", "check_connection"]

_UNREACHABLE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EADDRNOTAVAIL)


def check_address(who: str, host: str, port: int) -> Iterator[Finding]:
    """Whether a name resolves. The resolver takes as long as the system lets it."""
    check = f"{who} address"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no valid name"
        yield Finding(
            check,
            "problem",
            f"{host} does not resolve: {reason}",
            "correct the worker's address in the configuration, or this machine's DNS",
        )
    else:
        addresses = dict.fromkeys(str(entry[4][0]) for entry in found)
        yield Finding(check, "ok", f"{host} is {', '.join(addresses)}")


def check_connection(who: str, host: str, port: int, seconds: float) -> Iterator[Finding]:
    """Whether something accepts TCP connections.

    Args:
        who: operator and worker, for the finding's name.
        host, port: of the worker.
        seconds: for each of the host's addresses.
    """
    check = f"{who} connection"
    try:
        with socket.create_connection((host, port), seconds):
            yield Finding(check, "ok", f"port {port} accepts connections")
    except ConnectionRefusedError:
        yield Finding(
            check,
            "problem",
            f"refused: {host} is there, and nothing listens on port {port}",
            "start the worker, or correct the port",
        )
    except TimeoutError:
        yield Finding(
            check,
            "problem",
            f"timeout: {host} does not answer on port {port} within {seconds:g} s",
            f"check that the machine runs, and that firewalls on both sides let TCP port {port} through",
        )
    except OSError as error:
        unreachable = error.errno in _UNREACHABLE
        yield Finding(
            check,
            "problem",
            f"{'unreachable: no route to' if unreachable else 'no connection to'} {host} ({error.strerror})",
            "check this machine's network, and VPN if the worker is behind one",
        )
