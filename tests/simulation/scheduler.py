"""Tasks that run one at a time on a virtual clock, in an order that a seed decides.

A task runs until it waits: for time to pass, or for a `Signal`. What is due at the same moment runs in
random order. Nothing here uses threads, so code under simulation must wait through the scheduler alone.
"""

import heapq
import random
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self

from greenlet import getcurrent, greenlet

__all__ = ["Deadlock", "Killed", "Pool", "Scheduler", "Signal", "Task"]

_MOST_EVENTS = 200_000


class Killed(BaseException):
    """Thrown into a task that is ended from outside."""


class Deadlock(AssertionError):
    """Nothing can happen any more, or things happen without end."""


class Task:
    """A function that runs on its own.

    Attributes:
        owner: the process that it belongs to.
        done: whether it ended.
        has_begun: whether it is past the point where it can still be called off.
        error: what it raised, if it did.
    """

    def __init__(self, scheduler: "Scheduler", function: Callable[[], Any], owner: str) -> None:
        self.owner = owner
        self.done = False
        self.has_begun = True
        self.value: Any = None
        self.error: BaseException | None = None
        self._scheduler = scheduler
        self._function = function
        self._ended = Signal(scheduler)
        self._greenlet = greenlet(self._run, scheduler.hub)
        self._waits = 0  # a wake-up for an earlier wait is stale

    def _run(self) -> None:
        try:
            self.value = self._function()
        except Killed as error:
            self.error = error
        except Exception as error:
            self.error = error
        self.done = True
        self._ended.notify()

    def exception(self) -> BaseException | None:
        """Waits until it has ended. With `result`, the part of a future that the client needs."""
        while not self.done:
            self._ended.wait()
        return self.error

    def result(self) -> Any:
        """Waits until it has ended, and returns its value or raises."""
        if error := self.exception():
            raise error
        return self.value

    def cancel(self) -> bool:
        """Calls it off if it has not begun; whether it did. As with a future."""
        if self.has_begun:
            return False
        self.kill()
        return True

    def kill(self) -> None:
        """Ends it where it waits; a task that has not begun never does."""
        if self.done:
            return
        self._waits += 1
        if self._greenlet:
            self._scheduler.call_later(0, self._throw)
        else:
            self.done, self.error = True, Killed()
            self._ended.notify()

    def _throw(self) -> None:
        if not self.done:
            self._greenlet.throw(Killed())

    def _wake(self, wait: int) -> None:
        if not self.done and wait == self._waits:
            self._greenlet.switch()

    def start(self) -> None:
        """Called by the scheduler."""
        if not self.done:
            self._greenlet.switch()

    def suspend(self, arrange: Callable[[Callable[[], None]], None]) -> None:
        """Waits until the function that is handed to ``arrange`` has been called."""
        self._waits += 1
        wait = self._waits
        arrange(lambda: self._wake(wait))
        self._scheduler.hub.switch()


class Signal:
    """Something to wait for, which can happen again and again."""

    def __init__(self, scheduler: "Scheduler") -> None:
        self._scheduler = scheduler
        self._waiting: list[Callable[[], None]] = []

    def wait(self, until: float | None = None) -> None:
        """Waits until it happens, or until a moment of the virtual clock."""

        def arrange(wake: Callable[[], None]) -> None:
            self._waiting.append(wake)
            if until is not None:
                self._scheduler.call_later(max(0.0, until - self._scheduler.now), wake)

        self._scheduler.current.suspend(arrange)

    def notify(self) -> None:
        """Lets it happen: all who wait go on."""
        waiting, self._waiting = self._waiting, []
        for wake in waiting:
            self._scheduler.call_later(0, wake)


class Scheduler:
    """The clock, and whose turn it is.

    Attributes:
        now: seconds since the beginning.
        random: for everything that the seed decides.
        tasks: all that were ever started.
    """

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.random = random.Random(seed)
        self.hub = getcurrent()
        self.tasks: list[Task] = []
        self._events: list[tuple[float, float, int, Callable[[], None]]] = []
        self._count = 0
        self._by_greenlet: dict[greenlet, Task] = {}

    @property
    def current(self) -> Task:
        """The task that is running."""
        return self._by_greenlet[getcurrent()]

    def call_later(self, seconds: float, function: Callable[[], None]) -> None:
        """Calls a function that doesn't wait."""
        self._count += 1
        heapq.heappush(self._events, (self.now + seconds, self.random.random(), self._count, function))

    def later(self, seconds: float, function: Callable[[], None]) -> Callable[[], None]:
        """The same for one that can be called off, by what this returns."""
        functions = [function]

        def call() -> None:
            for function in functions:
                function()

        self.call_later(seconds, call)
        return functions.clear

    def spawn(self, function: Callable[[], Any], owner: str | None = None) -> Task:
        """Starts a task, of the process that starts it unless another is named."""
        if owner is None:
            spawner = self._by_greenlet.get(getcurrent())
            owner = spawner.owner if spawner else ""
        task = Task(self, function, owner)
        self._by_greenlet[task._greenlet] = task
        self.tasks.append(task)
        self.call_later(0, task.start)
        return task

    def sleep(self, seconds: float) -> None:
        """Lets time pass for the task that calls it."""
        self.current.suspend(lambda wake: self.call_later(max(0.0, seconds), wake))

    def run(self, task: Task) -> None:
        """Runs until a task has ended.

        Raises:
            Deadlock: it never would.
        """
        for _ in range(_MOST_EVENTS):
            if task.done:
                return
            if not self._events:
                raise Deadlock(f"at {self.now:.3f} s everybody waits for somebody else")
            self.now, _, _, function = heapq.heappop(self._events)
            function()
        raise Deadlock(f"no end after {_MOST_EVENTS} events, at {self.now:.3f} s")

    def drain(self, seconds: float) -> None:
        """Lets what is still under way come to an end, for some time at most."""
        end = self.now + seconds
        for _ in range(_MOST_EVENTS):
            if not self._events or self._events[0][0] > end:
                return
            self.now, _, _, function = heapq.heappop(self._events)
            function()
        raise Deadlock("what was left over came to no end")

    def kill(self, owner: str) -> None:
        """Ends all tasks of a process."""
        for task in self.tasks:
            if task.owner == owner:
                task.kill()

    def end(self) -> None:
        """Ends all tasks."""
        for task in self.tasks:
            task.kill()
        self.drain(0)


class Pool:
    """Stands in for a ThreadPoolExecutor."""

    def __init__(self, scheduler: Scheduler, size: int) -> None:
        self._scheduler = scheduler
        self._free = size
        self._changed = Signal(scheduler)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Task:
        def run() -> Any:
            while not self._free:
                self._changed.wait()
            self._free -= 1
            task.has_begun = True
            try:
                return function(*arguments)
            finally:
                self._free += 1
                self._changed.notify()

        task = self._scheduler.spawn(run)
        task.has_begun = False
        return task

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        tasks = [self.submit(function, item) for item in items]
        return (task.result() for task in tasks)

    def shutdown(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
