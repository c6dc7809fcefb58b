"""What a run cost and did so far, over all processes that worked on it."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from blindtune.client.multiplier import PrivateMultiplier

__all__ = ["Figures", "traffic"]


@dataclass(frozen=True)
class Figures:
    """Sums over a run.

    Attributes:
        steps: optimizer steps.
        tokens: tokens trained on, padding left out.
        padded_tokens: the same with padding: rows of each operand.
        rounds: products that the operators were asked for.
        requests: requests to workers, retries included.
        bytes_up, bytes_down: payload to and from all operators together.
        verified_responses: answers that passed their check.
        lies: answers that did not.
        seconds: time that training and measuring took.
        waiting_seconds: of it, waiting for workers and the network.
        verification_seconds: of it, checking answers; operators are checked side by side.
    """

    steps: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    rounds: int = 0
    requests: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    verified_responses: int = 0
    lies: int = 0
    seconds: float = 0.0
    waiting_seconds: float = 0.0
    verification_seconds: float = 0.0

    def __add__(self, other: "Figures") -> "Figures":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Figures(*(a + b for a, b in pairs))

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """Figures that were kept with a checkpoint; what a file does not hold is zero."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in names})

    @property
    def padding_share(self) -> float:
        """Share of all rows that is padding."""
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0

    def summary(self, price_per_hour: float | None, price_per_gb: float | None) -> dict[str, Any]:
        """The figures for ``summary.json``; the cost is that of the time and the traffic at these prices."""
        plain = dataclasses.asdict(self)
        seconds = {
            "total": plain.pop("seconds"),
            "waiting": plain.pop("waiting_seconds"),
            "verification": plain.pop("verification_seconds"),
        }
        seconds["client"] = max(0.0, seconds["total"] - seconds["waiting"] - seconds["verification"])
        plain["padding_share"] = self.padding_share
        plain["seconds"] = seconds
        if price_per_hour is not None or price_per_gb is not None:
            hours, gigabytes = self.seconds / 3600, (self.bytes_up + self.bytes_down) / 1e9
            plain["cost"] = hours * (price_per_hour or 0.0) + gigabytes * (price_per_gb or 0.0)
        return plain


def traffic(multiplier: PrivateMultiplier | None) -> Figures:
    """What passed between this process and its workers so far."""
    if multiplier is None:
        return Figures()
    operators = multiplier.statistics().values()
    rounds = multiplier.rounds()
    verification = max((x.verification_seconds for x in operators), default=0.0)
    return Figures(
        rounds=rounds.count,
        requests=sum(x.requests for x in operators),
        bytes_up=sum(x.bytes_sent for x in operators),
        bytes_down=sum(x.bytes_received for x in operators),
        verified_responses=sum(x.verified_responses for x in operators),
        lies=sum(len(x.lies) for x in operators),
        waiting_seconds=max(0.0, rounds.seconds - verification),
        verification_seconds=verification,
    )
