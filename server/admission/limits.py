"""What one request and one client may ask for, and how many requests may run and wait."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import NamedTuple, TypeVar, cast

from blindtune.errors import ConfigurationError

__all__ = ["Limit", "Limits"]

_Number = TypeVar("_Number", int, float)


class Limit(NamedTuple):
    """What is known of one limit.

    Attributes:
        name: of the field.
        kind: ``int`` or ``float``.
        default: unless another is given.
        smallest, largest: bounds, both allowed.
        meaning: one sentence for ``--help``.
    """

    name: str
    kind: type
    default: float
    smallest: float
    largest: float
    meaning: str


def _limit(default: _Number, smallest: float, largest: float, meaning: str) -> _Number:
    return field(default=default, metadata={"smallest": smallest, "largest": largest, "meaning": meaning})


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on requests. Those of an operand are stated in the manifest: clients cut theirs to fit.

    An operand has rows times columns times 4 bytes, whether its rows are sent or expanded. What the limits of
    requests that wait do is told in `fair_queue`, and in `watchdog` of those that wait for their client.

    Raises:
        ConfigurationError: a limit is too small or too large.
    """

    max_rows: int = _limit(16_384, 1, 2**32 - 1, "Rows of one operand.")
    max_operand_bytes: int = _limit(512 << 20, 1, 2**63 - 1, "Bytes of one operand.")
    max_concurrent: int = _limit(8, 1, 1024, "Requests at the same time.")
    max_concurrent_per_client: int = _limit(4, 1, 1024, "Those of one client.")
    max_waiting: int = _limit(256, 0, 4096, "Requests that wait for their turn.")
    max_waiting_per_client: int = _limit(32, 0, 4096, "Those of one client.")
    max_waiting_bytes: int = _limit(
        512 << 20, 0, 2**63 - 1, "Memory of those that wait, up to 4 MiB of each operand."
    )
    max_waiting_bytes_per_client: int = _limit(128 << 20, 0, 2**63 - 1, "Memory of those of one client.")
    max_requests_per_second: float = _limit(
        1000.0, 0.01, 1e6, "Requests of one client, on average; twice as many may come at once."
    )
    patience_seconds: float = _limit(
        20.0, 0.1, 3600, "How long a request may wait for a client that neither sends nor reads."
    )
    min_bytes_per_second: int = _limit(
        64 << 10, 1, 2**40, "Bytes that a client must move for its waiting not to count."
    )
    handshake_seconds: float = _limit(10.0, 0.1, 3600, "How long a new connection may take to stand.")

    def __post_init__(self) -> None:
        for limit in self.known():
            value = getattr(self, limit.name)
            if not limit.smallest <= value <= limit.largest:
                raise ConfigurationError(
                    f"{limit.name} is {value}, but must be between {limit.smallest} and {limit.largest}"
                )

    @classmethod
    def known(cls) -> Iterator[Limit]:
        """All there are, in order."""
        for x in fields(cls):
            kind, default = cast("type", x.type), cast("float", x.default)
            yield Limit(x.name, kind, default, **x.metadata)
