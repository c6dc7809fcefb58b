"""What a check found, and what to do about it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from blindtune.errors import BlindtuneError

__all__ = ["Finding", "Status", "problem_of", "until_a_problem"]

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """The result of one check. It never holds keys, data or scales.

    Attributes:
        check: a short name, such as ``alpha alpha.example:7100 certificate``.
        status: with a ``problem`` a run would fail or not be private, with a ``warning`` it may.
        detail: what was found.
        fix: what to do.

    Raises:
        ValueError: there is a problem or a warning and nothing to do about it.
    """

    check: str
    status: Status
    detail: str
    fix: str = ""

    def __post_init__(self) -> None:
        if self.status != "ok" and not self.fix:
            raise ValueError(f"the {self.status} {self.check!r} does not say what to do")

    @property
    def line(self) -> str:
        """All of it in one line."""
        return ": ".join(x for x in (self.status, self.check, self.detail, self.fix) if x)


def problem_of(check: str, error: BlindtuneError, otherwise: str) -> Finding:
    """A problem from an error of ours: what to do stands behind the last colon.

    Args:
        check: name of the finding.
        error: ends in what to do, as a rule.
        otherwise: what to do where it doesn't.
    """
    what, _, fix = str(error).rpartition(": ")
    return Finding(check, "problem", what, fix) if what else Finding(check, "problem", fix, otherwise)


def until_a_problem(*steps: Iterable[Finding]) -> Iterator[Finding]:
    """The findings of steps that build on each other, up to and including the first problem.

    Args:
        steps: generators, of which none begins before those in front of it went well.
    """
    for finding in chain.from_iterable(steps):
        yield finding
        if finding.status == "problem":
            return
