"""What passed between the client and one operator."""

from collections import Counter
from dataclasses import dataclass, field

from blindtune.client.operators.decisions import Failure

__all__ = ["Exclusion", "OperatorStatistics"]


@dataclass(frozen=True)
class Exclusion:
    """A worker that is not asked again in this run, or not for a while.

    Attributes:
        worker: its address.
        failure: why.
        product: label of the product that it was asked for.
    """

    worker: str
    failure: Failure
    product: str


@dataclass
class OperatorStatistics:
    """What passed between the client and one operator.

    Attributes:
        requests: requests that were sent, retries and hedges included: one for each block of rows.
        retries: of them, those that an earlier attempt had failed.
        hedges: of them, those that repeated one that was under way for long.
        hedges_won: of those, the ones that were answered first.
        rows: rows of their operands.
        bytes_sent, bytes_received: payload, without the framing of gRPC and TLS.
        verified_responses: answers that passed the check.
        verification_seconds: time that checking answers took, summed over answers.
        lies: answers that did not, each with the worker's address.
        excluded: workers that lied or serve something else, one entry for each failure.
        set_aside: workers that were silent again and again, one entry for each time that they were set aside.
        failures: requests that failed, by how they did; those that timed out are SILENT.
    """

    requests: int = 0
    retries: int = 0
    hedges: int = 0
    hedges_won: int = 0
    rows: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    verified_responses: int = 0
    verification_seconds: float = 0.0
    lies: tuple[str, ...] = ()
    excluded: tuple[Exclusion, ...] = ()
    set_aside: tuple[Exclusion, ...] = ()
    failures: Counter[Failure] = field(default_factory=Counter)
