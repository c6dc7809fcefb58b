"""What a run cost and did so far, over all processes that worked on it."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from blindtune.client.rounds.certified import Certificates
from blindtune.client.rounds.multiplier import PrivateMultiplier

__all__ = ["Figures", "Prices", "certificates", "traffic"]


@dataclass(frozen=True)
class Prices:
    """What the machine and the traffic cost.

    Attributes:
        per_hour: of the run's time.
        per_gb: of 10^9 bytes, either way.
    """

    per_hour: float | None = None
    per_gb: float | None = None

    def cost(self, seconds: float, payload: int) -> dict[str, float]:
        """The entry ``cost`` of a summary; none without prices.

        Args:
            seconds: that the run took.
            payload: bytes, both ways together.
        """
        if self.per_hour is None and self.per_gb is None:
            return {}
        return {"cost": seconds / 3600 * (self.per_hour or 0.0) + payload / 1e9 * (self.per_gb or 0.0)}


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
        wraps: rows whose results wrapped around the modulus of a certified parameter set, and were corrected.
        reasks: rows that had to be asked for again since their wraps could not be told.
        seconds: time that training and measuring took.
        waiting_seconds: of it, waiting for workers and the network.
        verification_seconds: of it, checking answers; operators are checked side by side.
        decoding_seconds: of it, telling wraps.
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
    wraps: int = 0
    reasks: int = 0
    seconds: float = 0.0
    waiting_seconds: float = 0.0
    verification_seconds: float = 0.0
    decoding_seconds: float = 0.0

    def __add__(self, other: "Figures") -> "Figures":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Figures(*(a + b for a, b in pairs))

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """Figures that were kept with a checkpoint; what a file does not hold is zero.

        Raises:
            TypeError: what a file holds is no number.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        found = {name: value for name, value in content.items() if name in names}
        for name, value in found.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**63:
                raise TypeError(f"{name} is no number of this kind")
        return cls(**found)

    @property
    def padding_share(self) -> float:
        """Share of all rows that is padding."""
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0

    def summary(self, prices: Prices) -> dict[str, Any]:
        """The figures for ``summary.json``; the cost is that of the time and the traffic."""
        plain = dataclasses.asdict(self)
        seconds = {
            "total": plain.pop("seconds"),
            "waiting": plain.pop("waiting_seconds"),
            "verification": plain.pop("verification_seconds"),
            "decoding": plain.pop("decoding_seconds"),
        }
        seconds["client"] = max(0.0, seconds["total"] - seconds["waiting"] - seconds["verification"])
        plain["padding_share"] = self.padding_share
        plain["seconds"] = seconds
        return plain | prices.cost(self.seconds, self.bytes_up + self.bytes_down)


def traffic(multiplier: PrivateMultiplier | None) -> Figures:
    """What passed between this process and its workers so far."""
    if multiplier is None:
        return Figures()
    operators = multiplier.statistics().values()
    rounds = multiplier.rounds()
    found = Certificates() if multiplier.certified is None else multiplier.certified.certificates()
    verification = max((x.verification_seconds for x in operators), default=0.0)
    return Figures(
        rounds=rounds.count,
        requests=sum(x.requests for x in operators),
        bytes_up=sum(x.bytes_sent for x in operators),
        bytes_down=sum(x.bytes_received for x in operators),
        verified_responses=sum(x.verified_responses for x in operators),
        lies=sum(len(x.lies) for x in operators),
        wraps=found.wraps,
        reasks=found.reasks,
        waiting_seconds=max(0.0, rounds.seconds - verification),
        verification_seconds=verification,
        decoding_seconds=found.decoding_seconds,
    )


def certificates(multiplier: PrivateMultiplier | None) -> dict[str, Any]:
    """The entry ``scales`` of a summary: K and the expected relative error of each product, as they ended.

    None where the parameter set is no certified one.
    """
    if multiplier is None or multiplier.certified is None:
        return {}
    scales = multiplier.certified.certificates().scales
    return {"scales": {label: dataclasses.asdict(scale) for label, scale in scales.items()}}
