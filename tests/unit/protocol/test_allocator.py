"""Whether freed memory is used again shows in the pages that the system had to map."""

import os
import platform
import subprocess
import sys

import pytest

_ROUNDS = 20
_PAGES = 2048  # 8 MiB of 4 KiB
_PROGRAM = f"""
import resource, sys
import numpy as np
from blindtune.protocol.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def work():
    arrays = [np.empty({_PAGES} * 4096, np.uint8) for _ in range(5)]
    for array in arrays:
        array[::4096] = 1

work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({_ROUNDS}):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _mapped_pages(choice: str, **variables: str) -> int:
    # Without a limit by the environment of whoever runs the tests, and with ordinary pages.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    environment = {**kept, "NUMPY_MADVISE_HUGEPAGE": "0", **variables}
    command = [sys.executable, "-c", _PROGRAM, choice]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_memory_of_large_arrays_is_used_again() -> None:
    all_of_it = 5 * _PAGES * _ROUNDS
    assert _mapped_pages("keep") < all_of_it / 20
    assert _mapped_pages("leave") > all_of_it / 20
    # Whoever says how memory is to be handled decides.
    assert _mapped_pages("keep", MALLOC_TRIM_THRESHOLD_="131072") > all_of_it / 20
