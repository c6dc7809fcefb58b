"""How long a worker usually takes, from what it took.

    usual(size) = the 0.9-quantile of the last 16 requests of about that size

Sizes count by powers of two, so that short requests say nothing of how slow long ones are. Of a size that was
never asked for, a smaller one gives an upper bound, since time grows no faster than size, and so does a
larger one.
"""

import math
from collections import deque

__all__ = ["Pace"]

_RECENT = 16
_QUANTILE = 0.9


class Pace:
    """What requests to one worker took."""

    def __init__(self) -> None:
        self._recent: dict[int, deque[float]] = {}
        self._usual: dict[int, float] = {}

    def note(self, size: int, seconds: float) -> None:
        """A request of so many bytes was answered."""
        kind = size.bit_length()
        recent = self._recent.setdefault(kind, deque(maxlen=_RECENT))
        recent.append(seconds)
        self._usual[kind] = sorted(recent)[math.ceil(_QUANTILE * len(recent)) - 1]

    def usual(self, size: int) -> float | None:
        """Seconds that a request of so many bytes usually takes; None if none was ever answered."""
        kind = size.bit_length()
        return min((x * 2 ** max(0, kind - known) for known, x in self._usual.items()), default=None)
