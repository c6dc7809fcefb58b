"""Addresses of workers, ``host:port``, and which machine each leads to.

There is one way to write a host: a name, an IPv4 address in four decimal numbers, or an IPv6 address in
brackets. Whatever else gRPC or a resolver would take (``dns:///``, ``ipv4:``, ``unix:``, ``127.1``,
``0x7f000001``) is refused: it would hide from us where it leads, and two operators at one machine would
pass for two machines.
"""

import ipaddress
import re
import socket

from blindtune.errors import ConfigurationError

__all__ = ["THIS_MACHINE", "grpc_target", "is_loopback", "machines", "split_address"]

THIS_MACHINE = "this machine"
"""What `machines` calls every address of the machine that this process runs on."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Underscores are no hostname's, and names of containers have them.
_NAME = re.compile(r"(?=.{1,254}\Z)(?:(?!-)[A-Za-z0-9_-]{1,63}(?<!-)\.)*(?!-)[A-Za-z0-9_-]{1,63}(?<!-)\.?")
# A name does not end in a number (https://url.spec.whatwg.org/#ends-in-a-number-checker).
_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0[xX][0-9A-Fa-f]*)\.?")
_INTERFACE = re.compile(r"[A-Za-z0-9._-]*")
# IPv4 addresses in the last 32 bits: as each host writes them, translated, and as anyone may translate them.
_EMBEDDED = [ipaddress.IPv6Network(x) for x in ("::/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48")]


def split_address(address: str, operator: str) -> tuple[str, int]:
    """Host and port of an address.

    Raises:
        ConfigurationError: it is not ``host:port``.
    """
    host, _, port = address.rpartition(":")
    if not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536 and _is_host(host)):
        raise ConfigurationError(
            f"operator {operator}: worker address {address[:100]!r} is not host:port: write a name, "
            "four decimal numbers, or an IPv6 address in brackets, and no prefix such as dns:///"
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def grpc_target(address: str) -> str:
    """An address for gRPC, which would take a host of the name ``unix`` for a prefix otherwise."""
    return f"dns:///{address}"


def is_loopback(host: str) -> bool:
    """Whether a host is written as this machine alone; no other name is asked for."""
    found = _literal(host)
    if found is None:
        return host.lower() == "localhost"
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def machines(host: str) -> set[str]:
    """What tells whether two hosts are one machine: they have something in common then.

    The addresses of a host, and its name too, since a name may lead elsewhere each time it is asked for.
    """
    literal = _literal(host)
    if literal is not None:
        return {_machine(literal)}
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return {THIS_MACHINE}
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):  # a label of a name can be too long to be asked for
        found = set()
    return {name} | {_machine(x) for x in map(_literal, found) if x is not None}


def _is_host(text: str) -> bool:
    if text.startswith("[") and text.endswith("]"):
        number, _, interface = text[1:-1].partition("%")
        return ":" in number and _literal(number) is not None and _INTERFACE.fullmatch(interface) is not None
    if _NUMBER.fullmatch(text):
        return _literal(text) is not None
    return _NAME.fullmatch(text) is not None


def _literal(host: str) -> Address | None:
    """The address that a host is written as; None for a name."""
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None


def _inside(address: Address) -> Address:
    """The IPv4 address that an IPv6 address leads to, or the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if int(address) > 1 and any(address in x for x in _EMBEDDED):  # 0 and 1 are this machine
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else address)


def _machine(address: Address) -> str:
    address = _inside(address)
    local = address.is_loopback or address.is_unspecified or _is_ours(address)
    return THIS_MACHINE if local else str(address)


def _is_ours(address: Address) -> bool:
    """Whether one of this machine's interfaces has an address: only then can a socket be bound to it."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as attempt:
            attempt.bind((str(address), 0))
    except OSError:
        return False
    return True
