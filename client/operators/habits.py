"""How long a worker may take, from what it and its replicas took."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from blindtune.client.operators.decisions import Attempt
from blindtune.client.operators.pace import Pace

__all__ = ["Habits"]

_FACTOR = 10
# Seconds without a sign of life: to begin with, in a queue, and before a request is acknowledged.
_LEAST, _LEAST_QUEUED, _LEAST_UNACKNOWLEDGED = 10.0, 30.0, 5.0
# As many times slower than its fastest replica a worker is taken to be at most.
_SLOWER = 4
# What is taken for usual where nothing is known: seconds, and bytes in a second.
_UNKNOWN_SECONDS, _UNKNOWN_RATE, _UNKNOWN_ACKNOWLEDGEMENT = 3.0, 1 << 20, 1.5


@dataclass
class Habits:
    """What requests to one worker took.

    Attributes:
        acknowledges: whether it gives a sign of life as soon as a request has a place.
        answers: from the sending of a request to its answer, by the bytes that travelled.
        acknowledgements: to the first sign of life, whatever the size.
    """

    acknowledges: bool = False
    answers: Pace = field(default_factory=Pace)
    acknowledgements: Pace = field(default_factory=Pace)

    def note(self, attempt: Attempt, now: float) -> None:
        """An attempt was answered."""
        self.answers.note(attempt.size, now - attempt.started)
        if attempt.acknowledged is not None:
            self.acknowledgements.note(1, attempt.acknowledged - attempt.started)

    def usual(self, attempt: Attempt, replicas: Sequence["Habits"]) -> float:
        """Seconds that it usually takes from the start of an attempt to what is waited for.

        A worker can't make its own slowness usual: its fastest replica bounds what is taken for that.
        """
        own = self._known(attempt, self)
        others = [_SLOWER * x for habits in replicas if (x := self._known(attempt, habits)) is not None]
        if own is None and not others:
            if self._waits_for_acknowledgement(attempt):
                return _UNKNOWN_ACKNOWLEDGEMENT
            return _UNKNOWN_SECONDS + attempt.size / _UNKNOWN_RATE
        return min(others if own is None else [own, *others])

    def _known(self, attempt: Attempt, whose: "Habits") -> float | None:
        if self._waits_for_acknowledgement(attempt):
            return whose.acknowledgements.usual(1) if whose.acknowledges else None
        return whose.answers.usual(attempt.size)

    def _waits_for_acknowledgement(self, attempt: Attempt) -> bool:
        return self.acknowledges and attempt.acknowledged is None

    def silence(self, attempt: Attempt, replicas: Sequence["Habits"]) -> float:
        """Seconds without a sign of life after which an attempt has failed."""
        if self._waits_for_acknowledgement(attempt):
            least = _LEAST_UNACKNOWLEDGED
        else:
            least = _LEAST_QUEUED if self.acknowledges and not attempt.has_rows else _LEAST
        return max(least, _FACTOR * self.usual(attempt, replicas))

    def silence_alone(self, attempt: Attempt) -> float:
        """The same where there is no replica; infinite if nothing is known that tells."""
        if not self._waits_for_acknowledgement(attempt) and self.answers.usual(attempt.size) is None:
            return float("inf")
        return self.silence(attempt, ())
