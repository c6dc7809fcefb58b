"""A copy of the repository in which one mutation after the other is planted, tested and taken out.

The copy's packages are found before the installed ones: it has the links of the folder ``blindtune``, which
lead to its own folders, and is first on the path. Compiled kernels are kept between mutations, because to
compile them takes longer than most tests. Those that a mutation concerns, if only by what they import, are
compiled anew: see `blindtune.protocol.kernels.compiled`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from mutations.mutation import Mutation
from mutations.planted_code import CANNOT_RUN, PLANTED

__all__ = ["ROOT", "Outcome", "Workplace"]

ROOT = Path(__file__).resolve().parents[2]
_SECONDS = 600
_FAILED = re.compile(r"^FAILED (\S+?::[^\s\[]+)", re.MULTILINE)
_CANNOT_RUN = re.compile(rf"^{CANNOT_RUN}: (.*)", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """What came of some tests.

    Attributes:
        status: pytest's exit code; None if they did not end in time.
        failed: ``FILE::FUNCTION`` of those that failed.
        output: the end of what pytest printed.
        cannot_run: the error of planted code that could not run; a test that fails for that saw no mistake.
    """

    status: int | None
    failed: tuple[str, ...]
    output: str
    cannot_run: str | None = None

    @property
    def passed(self) -> bool:
        return self.status == 0

    @property
    def caught(self) -> bool:
        """Whether a test failed for what it saw. Where nothing could be imported or collected, none did."""
        return self.status == 1 and bool(self.failed) and self.cannot_run is None


class Workplace:
    """A copy of the repository. Not for several threads at once.

    Args:
        folder: an empty one.
        source: what is copied: all files that git knows or would add.
    """

    def __init__(self, folder: Path, source: Path = ROOT) -> None:
        self._source = source
        self._numba = folder / "numba"
        self._planted: dict[str, list[int]] = {}
        self.root = folder / "repository"
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=source,
            capture_output=True,
            check=True,
        )
        for name in listed.stdout.decode().split("\0"):
            original, target = source / name, self.root / name
            if name and (original.is_symlink() or original.is_file()):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(original, target, follow_symlinks=False)

    @contextmanager
    def with_mutation(self, mutation: Mutation) -> Iterator[None]:
        """The block finds the mutation in the copy."""
        kept = {name: (self.root / name).read_bytes() for name in mutation.files}
        times = {name: (self.root / name).stat() for name in kept}
        try:
            for edit in mutation.edits:
                lines = self._planted.setdefault(str((self.root / edit.file).resolve()), [])
                lines += edit.planted(self.root)
            mutation.apply(self.root)
            yield
        finally:
            self._planted = {}
            for name, content in kept.items():
                path = self.root / name
                path.write_bytes(content)
                os.utime(path, ns=(times[name].st_atime_ns, times[name].st_mtime_ns))

    def require_own_modules(self, files: Sequence[str]) -> None:
        """Makes sure that tests would import these files from the copy.

        Raises:
            RuntimeError: one comes from elsewhere.
        """
        modules = [self._module(file) for file in files]
        program = (
            "import importlib, sys\nfor name in sys.argv[1:]: print(importlib.import_module(name).__file__)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, *modules],
            cwd=self.root,
            env=self._environment(self._numba),
            capture_output=True,
            text=True,
            check=True,
        )
        for file, found in zip(files, done.stdout.split(), strict=True):
            if Path(found).resolve() != (self.root / file).resolve():
                raise RuntimeError(f"tests would import {found}, and not the copy's {file}")

    def test(self, tests: Sequence[str], seconds: float = _SECONDS) -> Outcome:
        """Runs some tests, up to the first that fails, in the copy as it is now; not longer than that."""
        with TemporaryDirectory(dir=self.root.parent) as scratch:
            command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", "-rf", "--timeout=300"]
            command += [
                "-p",
                "mutations.planted_code",
                "-p",
                "no:cacheprovider",
                "-m",
                "",
                f"--basetemp={scratch}/pytest",
                *tests,
            ]
            try:
                done = subprocess.run(
                    command,
                    cwd=self.root,
                    env=self._environment(self._numba),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    timeout=seconds,
                )
            except subprocess.TimeoutExpired:
                return Outcome(None, (), f"did not end within {seconds} s")
        failed, cannot_run = _FAILED.findall(done.stdout), _CANNOT_RUN.search(done.stdout)
        error = cannot_run and cannot_run[1]
        return Outcome(done.returncode, tuple(failed), done.stdout[-3000:], error)

    def _environment(self, numba: Path) -> dict[str, str]:
        path = os.pathsep.join((str(self.root), str(self.root / "tests")))
        given = {
            PLANTED: json.dumps(self._planted),
            "PYTHONPATH": path,
            "NUMBA_CACHE_DIR": str(numba),
            "COLUMNS": "200",
            "HF_HUB_OFFLINE": "1",
        }
        # No bytecode is left that could be taken for that of the next mutation.
        return dict(os.environ) | given | {"PYTHONDONTWRITEBYTECODE": "1"}

    def _module(self, file: str) -> str:
        package = self.root / "blindtune"
        inside = Path(file) if (package / file).exists() else Path(file).relative_to("blindtune")
        return ".".join(("blindtune", *inside.with_suffix("").parts)).removesuffix(".__init__")
