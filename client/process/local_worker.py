"""A worker on this machine, in a process of its own: for trials, measurements and the attack lab."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from blindtune.errors import ResourceError

__all__ = ["SERVE", "LocalWorker"]

SERVE = ("blindtune.server", "serve", "--listen", "127.0.0.1:0")
"""What ``blindtune-worker serve`` is as a module, at a free port of loopback."""

_STOP_SECONDS = 30


class LocalWorker:
    """A worker process, which is stopped when the block ends.

    Args:
        command: module and arguments; it prints its address in the worker's own form when it listens.
        log: what it says is written there.

    Attributes:
        process: the worker's.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._log = log
        self._address = ""
        with open(log, "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            )

    def address(self) -> str:
        """Waits until it listens.

        Raises:
            ResourceError: it ended instead.
        """
        if not self._address:
            line = self.process.stdout.readline() if self.process.stdout else b""
            if not line:
                said = "".join(self._log.read_text(errors="replace").strip().splitlines()[-1:])
                raise ResourceError(f"a worker on this machine did not start: {said or 'it said nothing'}")
            self._address = str(json.loads(line)["address"])
        return self._address

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends it, if need be by force, and waits until it is gone."""
        self.process.terminate()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
