"""No image of this process's memory on a disk: it would hold data, masks, keys, tokens or operands."""

import ctypes
import resource

__all__ = ["forbid_core_dumps"]

_PR_SET_DUMPABLE = 4


def forbid_core_dumps() -> None:
    """Keeps the kernel from writing this process's memory to a file when it crashes.

    A limit of zero holds for its children too. It does not hold where core dumps are piped to a program,
    as systemd does; what the process says of itself does, and keeps other processes of the same user from
    reading its memory as well.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Only Linux has it; elsewhere the limit must do.
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
