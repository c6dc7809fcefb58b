"""Kernels compiled by numba, which release the interpreter lock and run at the caller's threads."""

from collections.abc import Callable
from typing import Any

from numba import njit

__all__ = ["kernel"]


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function at its first call, and keeps the result on disk where that is possible.

    numba looks for a writable folder beside the source and in the user's cache, or in NUMBA_CACHE_DIR.
    Where there is none, as in a read-only container, each process compiles anew.
    """
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)
