"""Which requests get in: so many at a time, in all and of one client, and none once the gate is closed."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from blindtune.server.admission.identity import LOCAL
from blindtune.server.admission.refusals import Busy, Draining

__all__ = ["Gate"]


class Gate:
    """Admits requests up to a limit. Nobody waits: waiting requests would hold memory without bound.

    Args:
        limit: requests inside at a time.
        limit_per_client: those of one client; as many as of all unless given.
    """

    def __init__(self, limit: int, limit_per_client: int | None = None) -> None:
        self._limit = limit
        self._limit_per_client = limit if limit_per_client is None else limit_per_client
        self._inside: Counter[str] = Counter()
        self._open = True
        self._changed = threading.Condition()

    @property
    def inside(self) -> int:
        """How many requests are running."""
        with self._changed:
            return self._inside.total()

    @contextmanager
    def admit(self, client: str = LOCAL) -> Iterator[None]:
        """Runs the block as one of the requests inside.

        Raises:
            Draining: the gate is closed.
            Busy: as many requests as allowed are inside.
        """
        with self._changed:
            if not self._open:
                raise Draining("this worker is shutting down")
            if self._inside.total() >= self._limit:
                raise Busy(f"this worker is already serving {self._limit} requests, its limit")
            if self._inside[client] >= self._limit_per_client:
                raise Busy(
                    f"this worker is already serving {self._limit_per_client} requests of this client, the "
                    "limit for each"
                )
            self._inside[client] += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside[client] -= 1
                if not self._inside[client]:
                    del self._inside[client]
                self._changed.notify_all()

    def close(self) -> None:
        """Admits nobody from now on."""
        with self._changed:
            self._open = False

    def wait_until_empty(self, seconds: float) -> bool:
        """Waits until no request is inside, or that many seconds; returns whether it is empty."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._inside.total(), timeout=seconds)
