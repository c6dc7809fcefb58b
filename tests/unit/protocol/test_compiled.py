"""What numba keeps on disk is used as long as all that went into it is unchanged, and no longer."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numba

PROGRAM = "import kept.kernels as k; print(k.twice(1), sum(k.twice.stats.cache_hits.values()))"
KERNELS = """
from blindtune.protocol.kernels.compiled import kernel
from kept.inlined import FACTOR

@kernel
def twice(x):
    return x * FACTOR
"""


def run(folder: Path, numbers: str) -> str:
    """What the kernel returns, and how often it came from the disk."""
    package = folder / "kept"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").touch()
    (package / "kernels.py").write_text(KERNELS)
    (package / "inlined.py").write_text("from kept.numbers import FACTOR\n__all__ = ['FACTOR']\n")
    (package / "numbers.py").write_text(numbers)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        "NUMBA_CACHE_DIR": str(folder / "numba"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_an_edit_of_what_a_kernel_imports_is_noticed(tmp_path: Path) -> None:
    assert run(tmp_path, "FACTOR = 2") == "2 0"
    assert run(tmp_path, "FACTOR = 2") == "2 1"
    assert run(tmp_path, "FACTOR = 3") == "3 0"
    assert run(tmp_path, "FACTOR = 2") == "2 1"


def test_what_another_release_left_in_the_same_place_is_not_read(tmp_path: Path) -> None:
    """Its index names a class of a module that is no more, and its kernels came from other sources."""
    assert run(tmp_path, "FACTOR = 2") == "2 0"
    (index,) = (tmp_path / "numba").rglob("*.nbi")
    index.write_bytes(pickle.dumps(numba.__version__) + b"cblindtune.gone\nLanes\n.")
    assert run(tmp_path, "FACTOR = 3") == "3 0"
    assert run(tmp_path, "FACTOR = 3") == "3 1"
