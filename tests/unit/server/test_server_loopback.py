"""What counts as this machine alone, when a host is a name."""

import socket
from typing import Any

import pytest

from blindtune.common.listening import is_loopback


def _resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    def resolve(host: str, *arguments: Any, **options: Any) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


@pytest.mark.parametrize("addresses", [("127.0.0.1", "192.0.2.7"), ("192.0.2.7", "127.0.0.1")])
def test_a_name_with_an_address_beyond_loopback_is_not_loopback(
    monkeypatch: pytest.MonkeyPatch, addresses: tuple[str, ...]
) -> None:
    _resolve_to(monkeypatch, "127.0.0.1", "127.0.0.2")
    assert is_loopback("name")
    _resolve_to(monkeypatch, *addresses)
    assert not is_loopback("name")


def test_a_name_without_addresses_is_not_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    _resolve_to(monkeypatch)
    assert not is_loopback("name")
