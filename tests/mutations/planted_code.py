"""A plugin for pytest that tells when a test failed because what was planted could not run.

A mistake that is a misspelt name is no mistake that anybody could make: every test that comes past it fails,
whatever it looks at.
"""

import json
import os
import traceback
from collections.abc import Iterator

import pytest
from numba.core.errors import NumbaError

__all__ = ["CANNOT_RUN", "PLANTED"]

PLANTED = "BLINDTUNE_PLANTED"
"""Variable of the environment: planted lines by file, as JSON."""
CANNOT_RUN = "what is planted cannot run"
_ERRORS = (NameError, AttributeError, TypeError, ImportError, SyntaxError)
# An error may come from a frame or two inside of what the planted line called, as that of a frozen dataclass.
_FRAMES = 2


def pytest_exception_interact(call: "pytest.CallInfo[object]") -> None:
    planted = json.loads(os.environ.get(PLANTED, "{}"))
    if call.excinfo is None or not planted:
        return
    for error in _chain(call.excinfo.value, set()):
        frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
        here = any(frame.lineno in planted.get(os.path.realpath(frame.filename), ()) for frame in frames)
        if isinstance(error, NumbaError) or (here and isinstance(error, _ERRORS)):
            print(f"\n{CANNOT_RUN}: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)


def _chain(error: BaseException | None, seen: set[int]) -> Iterator[BaseException]:
    """An error and what it came from."""
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    yield error
    yield from _chain(error.__cause__, seen)
    yield from _chain(error.__context__, seen)
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _chain(inner, seen)
