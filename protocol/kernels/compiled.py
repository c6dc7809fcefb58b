"""Kernels compiled by numba, which release the interpreter lock and run at the caller's threads.

What numba compiled it keeps on disk, for as long as the kernel's own file stays as it is. But a kernel also
contains constants and inlined functions of other modules, which an edit or an upgrade may change alone. So
what is kept is used only while those are unchanged, too. They are what the module imports at its top by
``from MODULE import NAME``, and what those import.
"""

import hashlib
import inspect
import re
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile

__all__ = ["kernel"]


@cache
def _read(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (OSError, TypeError):
        raise RuntimeError(f"the source of module {module} is not there") from None


@cache
def _sources(module: str) -> bytes:
    """A hash of a module's source and of all that it imports from its own package, directly or not."""
    package = module.partition(".")[0]
    imported = re.compile(rf"^from ({re.escape(package)}\.[\w.]+) import", re.MULTILINE)
    found, open_ends = {module: _read(module)}, [module]
    while open_ends:
        for name in imported.findall(found[open_ends.pop()]):
            if name not in found:
                found[name] = _read(name)
                open_ends.append(name)
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(found[name].encode()).digest())
    return digest.digest()


class _Cache(FunctionCache):
    """numba's, with the sources of a kernel's module in the names of its files.

    So what another release left in the same place is never read: neither its kernels nor its index, which
    names classes by their modules. Of two processes that write at once, each writes what the other would.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        name = f"{self._impl.filename_base}.{_sources(function.__module__).hex()[:32]}"
        self._cache_file = IndexDataCacheFile(self._cache_path, name, self._impl.locator.get_source_stamp())


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function at its first call, and keeps the result on disk where that is possible.

    numba looks for a writable folder beside the source and in the user's cache, or in NUMBA_CACHE_DIR.
    Where there is none, as in a read-only container, each process compiles anew.
    """
    compiled = njit(nogil=True)(function)
    try:
        kept = _Cache(function)
    except RuntimeError:
        return compiled
    compiled._cache = kept
    return compiled
