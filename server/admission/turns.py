"""Which of a connection's answers sends its next message."""

import threading
import weakref

from blindtune.proto.turns import PATIENCE_SECONDS, Turns

__all__ = ["TurnsOfConnections"]


class TurnsOfConnections:
    """What orders the answers that share a connection, for as long as a request holds it.

    Clients that reach the worker through one connection of a proxy share its turns as well.

    Args:
        patience: seconds that a message waits at most.
    """

    def __init__(self, patience: float = PATIENCE_SECONDS) -> None:
        self._patience = patience
        self._lock = threading.Lock()
        self._turns: weakref.WeakValueDictionary[str, Turns] = weakref.WeakValueDictionary()

    def of(self, peer: str) -> Turns:
        """Those of the connection from this address and port."""
        with self._lock:
            return self._turns.setdefault(peer, Turns(self._patience))
