"""Which requests get in: so many at a time, and none once the gate is closed."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from blindtune.server.refusals import Busy, Draining

__all__ = ["Gate"]


class Gate:
    """Admits requests up to a limit. Nobody waits: waiting requests would hold memory without bound."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._inside = 0
        self._open = True
        self._changed = threading.Condition()

    @property
    def inside(self) -> int:
        """How many requests are running."""
        with self._changed:
            return self._inside

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Runs the block as one of the requests inside.

        Raises:
            Draining: the gate is closed.
            Busy: as many requests as allowed are inside.
        """
        with self._changed:
            if not self._open:
                raise Draining("this worker is shutting down")
            if self._inside >= self._limit:
                raise Busy(f"this worker is already serving {self._limit} requests, its limit")
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Admits nobody from now on."""
        with self._changed:
            self._open = False

    def wait_until_empty(self, seconds: float) -> bool:
        """Waits until no request is inside, or that many seconds; returns whether it is empty."""
        with self._changed:
            return self._changed.wait_for(lambda: self._inside == 0, timeout=seconds)
