"""Where a process listens: the form of an address, and whether others can reach it."""

import ipaddress
import socket

from blindtune.errors import ConfigurationError

__all__ = ["host_and_port", "is_loopback"]


def host_and_port(listen: str) -> tuple[str, int]:
    """The two parts of ``HOST:PORT``; an IPv6 host loses its brackets.

    Raises:
        ConfigurationError: it is nothing of the kind.
    """
    host, colon, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 65536):
        raise ConfigurationError(f"{listen!r} is no address to listen at: give HOST:PORT")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether all addresses of a host are this machine's loopback."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found)
