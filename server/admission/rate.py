"""How often a client may ask: a token bucket for each client that asked lately."""

import time
from collections import OrderedDict
from collections.abc import Callable

__all__ = ["RateLimit"]

_BURST_SECONDS = 2.0


class RateLimit:
    """Token buckets of one size. Not safe for threads by itself: `Places` asks under its lock.

    A bucket that is full again says no more than none, so it is dropped: memory is bounded by the clients
    of the last moments, however many come by in a day.

    Args:
        per_second: requests of one client; twice as many may come at once.
        clock: monotonic seconds.
    """

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_second = per_second
        self._burst = max(1.0, per_second * _BURST_SECONDS)
        self._clock = clock
        # Requests left and when that was so, in the order of the last request.
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, client: str) -> bool:
        """Whether one more request of a client is within its rate; if so, it counts."""
        now = self._clock()
        self._drop_full(now)
        left, then = self._buckets.pop(client, (self._burst, now))
        left = min(self._burst, left + (now - then) * self.per_second)
        allowed = left >= 1.0
        self._buckets[client] = (left - 1.0 if allowed else left, now)
        return allowed

    def _drop_full(self, now: float) -> None:
        # Whatever was left then, after this time a bucket is full.
        while self._buckets:
            client, (_, then) = next(iter(self._buckets.items()))
            if (now - then) * self.per_second < self._burst:
                return
            del self._buckets[client]
