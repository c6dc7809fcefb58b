"""Whether freed memory is used again shows in the pages that the system had to map."""

import os
import platform
import subprocess
import sys

import pytest

_PAGES = 4096  # 16 MiB of 4 KiB
_ROUNDS = 5
_PROGRAM = f"""
import resource, sys
import numpy as np
from blindtune.protocol.kernels.allocator import keep_freed_memory

most, count = sys.argv[1], int(sys.argv[2])
if most != "nothing":
    keep_freed_memory(None if most == "all" else int(most))

def work():
    arrays = [np.empty({_PAGES} * 4096, np.uint8) for _ in range(count)]
    for array in arrays:
        array[::4096] = 1

work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({_ROUNDS}):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
_256_MIB = str(256 << 20)

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")


def _mapped(most: str, count: int, **variables: str) -> float:
    """The share of pages that were mapped anew."""
    # Without a limit by the environment of whoever runs the tests, and with ordinary pages.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    environment = {**kept, "NUMPY_MADVISE_HUGEPAGE": "0", **variables}
    command = [sys.executable, "-c", _PROGRAM, most, str(count)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout) / (_PAGES * count * _ROUNDS)


@pytest.mark.parametrize(
    ("most", "count"), [(_256_MIB, 4), ("all", 24)], ids=["a worker's 64 MiB", "a client's 384 MiB"]
)
def test_memory_of_large_arrays_is_used_again(most: str, count: int) -> None:
    assert _mapped(most, count) < 0.05
    # Whoever says how memory is to be handled decides.
    assert _mapped(most, count, MALLOC_TRIM_THRESHOLD_="131072") > 0.05


def test_without_it_and_beyond_what_is_kept_memory_is_given_back() -> None:
    assert _mapped("nothing", 4) > 0.05
    assert _mapped(_256_MIB, 24) > 0.05


_GIVING_BACK = """
import re
from pathlib import Path
import numpy as np
from blindtune.protocol.kernels.allocator import give_back_freed_memory, keep_freed_memory

def megabytes():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

keep_freed_memory()
arrays = [np.ones(1 << 17) for _ in range(300)]
kept = arrays[::10]
del arrays
before = megabytes()
give_back_freed_memory()
print(before - megabytes())
"""


def test_what_lies_between_memory_in_use_is_given_back_when_it_is_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", _GIVING_BACK], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 200
