"""Real workers for the lab: the command ``blindtune-worker serve --record``, in processes of their own."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from blindtune.client.process.local_worker import SERVE, LocalWorker

__all__ = ["StartWorkers", "recorded_workers"]

StartWorkers = Callable[[Path, Sequence[Path]], AbstractContextManager[list[str]]]
"""Starts a worker of a model for each transcript, and gives their addresses."""


@contextmanager
def recorded_workers(model: Path, transcripts: Sequence[Path]) -> Iterator[list[str]]:
    """A worker on loopback for each transcript; their addresses. All have stopped when the block ends.

    Raises:
        ResourceError: one did not start.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker(model, folder)) for folder in transcripts]
        yield [worker.address() for worker in workers]


def _worker(model: Path, transcript: Path) -> LocalWorker:
    options = ["--model", str(model), "--insecure", "--threads", "1", "--record", str(transcript)]
    return LocalWorker([*SERVE, *options], transcript.with_name(f"{transcript.name}.log"))
