"""What one request and one client may ask for, and how many requests may run and wait."""

from dataclasses import dataclass

from blindtune.errors import ConfigurationError

__all__ = ["Limits"]

_BOUNDS: tuple[tuple[str, float, float], ...] = (
    ("max_rows", 1, 2**32 - 1),
    ("max_operand_bytes", 1, 2**63 - 1),
    ("max_concurrent", 1, 1024),
    ("max_concurrent_per_client", 1, 1024),
    ("max_waiting", 0, 4096),
    ("max_waiting_per_client", 0, 4096),
    ("max_waiting_bytes", 0, 2**63 - 1),
    ("max_waiting_bytes_per_client", 0, 2**63 - 1),
    ("max_requests_per_second", 0.01, 1e6),
    ("patience_seconds", 0.1, 3600),
    ("min_bytes_per_second", 1, 2**40),
    ("handshake_seconds", 0.1, 3600),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on requests. Those of an operand are stated in the manifest: clients cut theirs to fit.

    Attributes:
        max_rows: rows of one operand.
        max_operand_bytes: rows times columns times 4, whether the rows are sent or expanded.
        max_concurrent: requests that run at the same time; more wait, see `fair_queue`.
        max_concurrent_per_client: the same for those of one client.
        max_waiting: requests that wait for their turn; more are turned away.
        max_waiting_per_client: the same for those of one client.
        max_waiting_bytes: memory that those that wait hold: of each operand up to 4 MiB.
        max_waiting_bytes_per_client: the same for those of one client.
        max_requests_per_second: of one client, on average; up to twice as many at once.
        patience_seconds: how long a request may wait for its client, see `watchdog`.
        min_bytes_per_second: what a client must move for its request to wait no longer than that.
        handshake_seconds: how long a connection may take to become one.

    Raises:
        ConfigurationError: a limit is too small or too large.
    """

    max_rows: int = 16_384
    max_operand_bytes: int = 512 << 20
    max_concurrent: int = 8
    max_concurrent_per_client: int = 4
    max_waiting: int = 256
    max_waiting_per_client: int = 32
    max_waiting_bytes: int = 512 << 20
    max_waiting_bytes_per_client: int = 128 << 20
    max_requests_per_second: float = 1000.0
    patience_seconds: float = 20.0
    min_bytes_per_second: int = 64 << 10
    handshake_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name, smallest, largest in _BOUNDS:
            value = getattr(self, name)
            if not smallest <= value <= largest:
                raise ConfigurationError(f"{name} is {value}, but must be between {smallest} and {largest}")
