"""The name of this machine's processor."""

import platform
from pathlib import Path

__all__ = ["processor_name"]


def processor_name() -> str:
    """What the system calls this machine's processor."""
    known = Path("/proc/cpuinfo")  # of Linux
    for line in known.read_text().splitlines() if known.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
