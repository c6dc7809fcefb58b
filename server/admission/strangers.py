"""Those who show no valid token: they may ask for the health, in a few places of their own, and not for long.

Nothing here is shared with clients that are known: neither places nor threads. Some of the places are kept
for this machine's own address, from which supervisors in the same container ask.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import unquote

import grpc

from blindtune.server.admission.gate import Gate
from blindtune.server.admission.pools import Counted
from blindtune.server.admission.watchdog import Patience, Watchdog

__all__ = ["MOST_STRANGERS", "PLACES_OF_STRANGERS", "Strangers"]

_PLACES, _PLACES_PER_ADDRESS = 8, 2
_PLACES_HERE = 4
PLACES_OF_STRANGERS = _PLACES + _PLACES_HERE
# Besides those with a place, for refusals.
_SPARE_THREADS = 2
# Of calls that were not looked at yet. More are refused without a look at where they come from.
MOST_STRANGERS = 256
_SECONDS = 5.0
_HERE = frozenset({"ipv4:127.0.0.1", "ipv6:[::1]", "ipv6:[::ffff:127.0.0.1]"})


class Strangers:
    """The places of strangers.

    Args:
        seconds: how long a call may take in all, at most.
        clock: monotonic seconds.

    Attributes:
        pool: where their calls run.
        watchdog: ends them, if somebody sweeps it.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.pool = Counted(PLACES_OF_STRANGERS + _SPARE_THREADS, "blindtune-strangers")
        self.watchdog = Watchdog(min(seconds, _SECONDS), float("inf"), clock)
        self._elsewhere = Gate(_PLACES, _PLACES_PER_ADDRESS)
        self._here = Gate(_PLACES_HERE)

    @property
    def are_too_many(self) -> bool:
        """Whether so many calls pile up that another one is refused without a thread."""
        return self.pool.pending >= MOST_STRANGERS

    @contextmanager
    def inside(self, context: grpc.ServicerContext) -> Iterator[Patience]:
        """The block is a stranger's call, which is cancelled when its time is over, whatever it does.

        Raises:
            Busy: there are as many as allowed.
        """
        # No name of a token has a space, and no certificate's.
        address = unquote(context.peer()).rpartition(":")[0]
        gate = self._here if address in _HERE else self._elsewhere
        with (
            gate.admit(f"stranger {address}"),
            self.watchdog.watch(context.cancel) as whole,
            whole.waiting(),
            self.watchdog.watch(context.cancel) as patience,
        ):
            yield patience
