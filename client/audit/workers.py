"""Real workers for the lab: the command ``blindtune-worker serve --record``, in processes of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from blindtune.protocol.errors import ResourceError

__all__ = ["StartWorkers", "recorded_workers"]

StartWorkers = Callable[[Path, Sequence[Path]], AbstractContextManager[list[str]]]
"""Starts a worker of a model for each transcript, and gives their addresses."""

_STOP_SECONDS = 30


@contextmanager
def recorded_workers(model: Path, transcripts: Sequence[Path]) -> Iterator[list[str]]:
    """A worker on loopback for each transcript; their addresses. All have stopped when the block ends.

    Raises:
        ResourceError: one did not start.
    """
    with ExitStack() as stack:
        processes = [stack.enter_context(_worker(model, folder)) for folder in transcripts]
        yield [_address(x, folder) for x, folder in zip(processes, transcripts, strict=True)]


@contextmanager
def _worker(model: Path, transcript: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "blindtune.server", "serve", "--model", str(model), "--insecure"]
    command += ["--listen", "127.0.0.1:0", "--threads", "1", "--record", str(transcript)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with (
        open(_log(transcript), "wb") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _address(process: "subprocess.Popen[bytes]", transcript: Path) -> str:
    output: BinaryIO | None = process.stdout  # type: ignore[assignment]
    line = output.readline() if output else b""
    if not line:
        said = "".join(_log(transcript).read_text(errors="replace").strip().splitlines()[-1:])
        raise ResourceError(f"a worker of the lab did not start: {said or 'it said nothing'}")
    return str(json.loads(line)["address"])


def _log(transcript: Path) -> Path:
    return transcript.with_name(f"{transcript.name}.log")
