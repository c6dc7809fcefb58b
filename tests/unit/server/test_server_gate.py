"""Who gets in: so many in all, so many of one client, so often, and each client under its own name."""

from contextlib import ExitStack
from typing import Any

import pytest

from blindtune.client.tls.certs import issue_operator_certificates
from blindtune.errors import ConfigurationError
from blindtune.server.admission.gate import Gate
from blindtune.server.admission.identity import LOCAL, by_certificate
from blindtune.server.admission.limits import Limits
from blindtune.server.admission.rate import RateLimit
from blindtune.server.admission.refusals import Busy, Draining


class Clock:
    """Shows the time that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_client_cannot_take_all_places() -> None:
    gate = Gate(3, limit_per_client=2)
    with ExitStack() as greedy:
        for _ in range(2):
            greedy.enter_context(gate.admit("greedy"))
        with pytest.raises(Busy, match="2 requests of this client"), gate.admit("greedy"):
            pass
        with gate.admit("modest"):
            assert gate.inside == 3
            with pytest.raises(Busy, match="already serving 3 requests"), gate.admit("third"):
                pass
    with gate.admit("greedy"):
        assert gate.inside == 1
    assert gate.inside == 0


def test_a_request_that_fails_gives_its_place_back() -> None:
    gate = Gate(1, limit_per_client=1)
    for _ in range(3):
        with pytest.raises(LookupError), gate.admit("x"):
            raise LookupError
    assert gate.wait_until_empty(0)


def test_without_a_limit_of_its_own_a_client_may_take_all_places() -> None:
    gate = Gate(2)
    with gate.admit(), gate.admit():
        assert gate.inside == 2


def test_a_closed_gate_admits_nobody_and_says_why() -> None:
    gate = Gate(1)
    gate.close()
    with pytest.raises(Draining), gate.admit("x"):
        pass


def test_a_burst_of_twice_the_rate_passes_and_then_the_rate() -> None:
    clock = Clock()
    rate = RateLimit(10, clock)

    def passed(count: int) -> int:
        return sum(rate.take("x") for _ in range(count))

    assert passed(50) == 20
    clock.now += 0.55
    assert passed(50) == 5
    clock.now += 1000
    assert passed(50) == 20
    assert rate.take("another")


def test_a_rate_below_one_lets_a_request_through_in_the_end() -> None:
    clock = Clock()
    rate = RateLimit(0.1, clock)
    assert rate.take("x")
    clock.now += 9.9
    assert not rate.take("x")
    clock.now += 0.2
    assert rate.take("x")


def test_clients_that_are_gone_are_forgotten_but_not_those_that_owe() -> None:
    clock = Clock()
    rate = RateLimit(100, clock)
    for number in range(5000):
        clock.now += 0.01
        assert rate.take(f"client-{number}")
    assert len(rate) <= 202  # those of the last two seconds
    for _ in range(200):
        rate.take("busy")
    assert not rate.take("busy")
    clock.now += 1.0
    rate.take("other")
    assert [rate.take("busy") for _ in range(101)] == [True] * 100 + [False]


class Context:
    """What a servicer's context says of the connection."""

    def __init__(self, **auth: list[bytes]) -> None:
        self._auth = auth

    def auth_context(self) -> dict[str, list[bytes]]:
        return self._auth


def identity(**auth: list[bytes]) -> str:
    context: Any = Context(**auth)
    return by_certificate(context)


def test_a_client_is_its_key_and_not_its_certificate(tmp_path: Any) -> None:
    alpha, beta = (issue_operator_certificates(tmp_path, name) for name in ("alpha", "beta"))
    first = identity(x509_pem_cert=[alpha.client.read_bytes()])
    assert len(first) == 16
    assert int(first, 16)
    assert identity(x509_pem_cert=[alpha.client.read_bytes()]) == first
    assert identity(x509_pem_cert=[beta.client.read_bytes()]) != first
    assert identity() == identity(transport_security_type=[b"insecure"]) == LOCAL


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_concurrent_per_client", 0),
        ("max_requests_per_second", 0.0),
        ("max_requests_per_second", float("nan")),
        ("patience_seconds", 0.0),
        ("patience_seconds", float("inf")),
        ("min_bytes_per_second", 0),
        ("handshake_seconds", -1.0),
    ],
)
def test_limits_that_make_no_sense_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=name):
        Limits(**{name: value})  # type: ignore[arg-type]
