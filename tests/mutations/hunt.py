"""Plants every mutation, each in a copy of the code, and sees which test notices."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory

from mutations.executed import executed_by_training
from mutations.mutation import Mutation, check, check_paths
from mutations.workplace import ROOT, Outcome, Workplace

__all__ = ["Finding", "hunt"]

_AT_ONCE = 2
_SECONDS_FOR_ALL = 3600


@dataclass(frozen=True)
class Finding:
    """What came of one mutation."""

    mutation: Mutation
    outcome: Outcome
    seconds: float

    @property
    def verdict(self) -> str:
        """The test that caught it, or what went wrong."""
        if self.outcome.caught:
            return self.outcome.failed[0]
        if self.outcome.cannot_run:
            return f"BROKEN (what is planted cannot run: {self.outcome.cannot_run})"
        return "SURVIVED" if self.outcome.passed else f"BROKEN (pytest ended with {self.outcome.status})"


def hunt(
    mutations: Sequence[Mutation], progress: Callable[[Finding], None] = lambda finding: None
) -> list[Finding]:
    """Tries mutations, two at a time.

    Raises:
        RuntimeError: an edit does not find its place, a test is not there, a mutation is not on the path that
            it names, or the tests fail on the code as it is, so that a failure would say nothing.
    """
    with _workplaces() as places, ThreadPoolExecutor(_AT_ONCE) as pool:
        if wrong := check(mutations, ROOT):
            raise RuntimeError("\n".join(wrong))
        files = sorted({file for mutation in mutations for file in mutation.files})
        if wrong := check_paths(mutations, ROOT, executed_by_training(files)):
            raise RuntimeError("\n".join(wrong))

        def unmutated(tests: Sequence[str]) -> Outcome:
            place = places.get()
            try:
                place.require_own_modules(files)
                return place.test(tests, _SECONDS_FOR_ALL)
            finally:
                places.put(place)

        # Files stay together: many share fixtures that take long.
        by_file: dict[str, set[str]] = {}
        for mutation in mutations:
            for test in mutation.tests:
                by_file.setdefault(test.partition("::")[0], set()).add(test)
        shares: list[list[str]] = [[] for _ in range(_AT_ONCE)]
        for tests in sorted(by_file.values(), key=len, reverse=True):
            min(shares, key=len).extend(sorted(tests))
        for outcome in pool.map(unmutated, [share for share in shares if share]):
            if not outcome.passed:
                raise RuntimeError(f"the tests fail without any mutation:\n{outcome.output}")

        def tried(mutation: Mutation) -> Finding:
            place = places.get()
            started = time.monotonic()
            try:
                with place.with_mutation(mutation):
                    outcome = place.test(mutation.tests)
            finally:
                places.put(place)
            finding = Finding(mutation, outcome, time.monotonic() - started)
            progress(finding)
            return finding

        return list(pool.map(tried, mutations))


@contextmanager
def _workplaces() -> Iterator["SimpleQueue[Workplace]"]:
    with TemporaryDirectory(prefix="blindtune-mutations-") as folder:
        places: SimpleQueue[Workplace] = SimpleQueue()
        for number in range(_AT_ONCE):
            place = Path(folder, str(number))
            place.mkdir()
            places.put(Workplace(place))
        yield places
