"""Where a process's time goes: the parts of the main thread's time, and what other threads did meanwhile."""

import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Stopwatch", "thread_seconds"]


class Stopwatch:
    """Adds up the time spent in functions, without what other timed functions took inside them.

    So the parts of the main thread add up to the time that it was watched.

    Attributes:
        main: seconds of the main thread in each part.
        beside: seconds in each part of all other threads together, which may have run at the same time.
        absent: functions that were to be timed and don't exist.
    """

    def __init__(self) -> None:
        self.main: Counter[str] = Counter()
        self.beside: Counter[str] = Counter()
        self.absent: list[str] = []
        self._local = threading.local()
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Starts anew."""
        with self._lock:
            self.main.clear()
            self.beside.clear()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the block to a part."""
        # Seconds of the timed blocks inside each block that this thread is in.
        stack: list[float] = self._local.__dict__.setdefault("stack", [])
        stack.append(0.0)
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            inside = stack.pop()
            if stack:
                stack[-1] += seconds
            where = self.main if threading.current_thread() is threading.main_thread() else self.beside
            with self._lock:
                where[name] += seconds - inside

    def watch(
        self,
        owner: Any,
        function: str,
        part: str,
        then: Callable[[Any], object] = lambda result: None,
        static: bool = False,
    ) -> None:
        """Times a function wherever it is looked up in its owner.

        Args:
            owner: module, class or object.
            function: its attribute.
            part: what its time is counted to.
            then: called with each result.
            static: it is a static method.
        """
        original = getattr(owner, function, None)
        if original is None:
            self.absent.append(f"{getattr(owner, '__name__', type(owner).__name__)}.{function}")
            return

        @functools.wraps(original)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.part(part):
                result = original(*arguments, **options)
            then(result)
            return result

        setattr(owner, function, staticmethod(timed) if static else timed)


def thread_seconds() -> Counter[str]:
    """Processor seconds of this process's threads, by what they are for."""
    python = {thread.native_id: thread.name for thread in threading.enumerate()}
    found: Counter[str] = Counter()
    for task in Path("/proc/self/task").iterdir():
        try:
            seconds = int((task / "schedstat").read_text().split()[0]) / 1e9
            command = (task / "comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        # Threads of a pool differ by what follows the last underscore.
        name = python.get(int(task.name), f"native {command}")
        found[name.rpartition("_")[0] or name] += seconds
    return found
