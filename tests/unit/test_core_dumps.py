"""No image of a process's memory: what a process says of itself, read from outside."""

import subprocess
import sys

ASKED = """
import ctypes, resource
from blindtune.common.core_dumps import forbid_core_dumps
resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
before = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
forbid_core_dumps()
print(before, ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), *resource.getrlimit(resource.RLIMIT_CORE))
print(next(line for line in open("/proc/self/limits") if line.startswith("Max core file size")))
"""


def test_a_process_that_crashes_leaves_no_image_of_its_memory() -> None:
    program = ASKED
    limit = "resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
    # Where the limit is low already, it can't be raised first.
    tried = subprocess.run(
        [sys.executable, "-c", f"import resource; {limit}"], capture_output=True, check=False
    )
    if tried.returncode:
        program = program.replace(limit, "")
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    figures, limits = ended.stdout.split("\n", 1)
    assert figures.split() == ["1", "0", "0", "0"]
    assert limits.split()[4:6] == ["0", "0"]
