"""Large arrays in memory that the process has already.

A product takes arrays of some megabytes and frees them again, hundreds of times in a step, and a step does
the same with gigabytes of activations. By default the C library gives freed memory of that size back to the
system, which then has to clear and map each page anew. That costs the client a fifth of its work on a
product in the lattice mode, and on a virtual machine, whose host may have taken the pages meanwhile,
several microseconds a page.
"""

import ctypes
import os
import platform

__all__ = ["give_back_freed_memory", "keep_freed_memory"]

# Of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_VALUES = {
    _MMAP_THRESHOLD: 32 << 20,  # the most that glibc takes; larger arrays are still mapped each time
    _TOP_PAD: 16 << 20,
}
_NEVER = -1
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory(most: int | None = None) -> None:
    """Lets this process keep freed memory for its next arrays.

    Does nothing where the C library is another than glibc, or when one of glibc's own environment variables
    says how memory is to be handled.

    Args:
        most: bytes that are kept, for a process that serves many; all, for one that needs as much again a
            moment later, if None.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _VARIABLES):
        return
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in (_VALUES | {_TRIM_THRESHOLD: _NEVER if most is None else most}).items():
        mallopt(parameter, value)


def give_back_freed_memory() -> None:
    """Gives the system what this process has freed, once: after work of which nothing like it follows.

    Does nothing where the C library is another than glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
