"""What one request may ask for, and how many may run at once."""

from dataclasses import dataclass

from blindtune.protocol.errors import ConfigurationError

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on requests, stated in the manifest so that clients cut their operands to fit.

    Attributes:
        max_rows: rows of one operand.
        max_operand_bytes: rows times columns times 4, whether the rows are sent or expanded.
        max_concurrent: requests that run at the same time; more are turned away, never queued.

    Raises:
        ConfigurationError: a limit is not positive, or too large for the manifest.
    """

    max_rows: int = 16_384
    max_operand_bytes: int = 512 << 20
    max_concurrent: int = 8

    def __post_init__(self) -> None:
        for name, largest in (
            ("max_rows", 2**32 - 1),
            ("max_operand_bytes", 2**63 - 1),
            ("max_concurrent", 1024),
        ):
            value = getattr(self, name)
            if not 1 <= value <= largest:
                raise ConfigurationError(f"{name} is {value}, but must be between 1 and {largest}")
