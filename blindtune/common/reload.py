"""A value made from files, made anew when the files change. Files that became unusable change nothing."""

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from blindtune.errors import ConfigurationError

__all__ = ["Reloaded"]

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")
_State = tuple[tuple[int, int, int, int] | None, ...]


class Reloaded(Generic[_T]):
    """Reads files when they have changed, and not otherwise.

    Args:
        what: names the value in the log, such as ``tokens``.
        paths: the files. A link is followed, so that a volume that is switched as a whole is noticed.
        load: makes the value of them.

    Raises:
        ConfigurationError: from ``load``; later it is logged, once for each change, and the value stays.
    """

    def __init__(self, what: str, paths: Sequence[Path], load: Callable[[], _T]) -> None:
        self._what = what
        self._paths = tuple(paths)
        self._load = load
        self._lock = threading.Lock()
        # Looked at before they are read: a change in between is then noticed the next time.
        self._seen = self._state()
        self._value = load()

    def get(self) -> _T:
        """The value of the files as they are now, or as they were when they could last be used."""
        with self._lock:
            state = self._state()
            if state != self._seen:
                self._seen = state
                try:
                    self._value = self._load()
                    _logger.info("reloaded", extra={"what": self._what})
                except ConfigurationError as error:
                    _logger.error(
                        "a changed file cannot be used; what was read before stays in force",
                        extra={"what": self._what, "error": str(error)},
                    )
            return self._value

    def _state(self) -> _State:
        return tuple(_file_state(path) for path in self._paths)


def _file_state(path: Path) -> tuple[int, int, int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
