"""The command ``blindtune-worker serve --record`` in forked processes, which have imported all it needs."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from support.operators import PATIENCE, forkserver, worker_environment

__all__ = ["forked_workers"]


def _serve(model: Path, transcript: Path, pipe: Connection) -> None:
    """Runs the command until it gets a signal; what it says on stdout goes to the pipe."""
    from blindtune.server.cli import main

    log = os.open(transcript.with_name(f"{transcript.name}.log"), os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(log, sys.stderr.fileno())
    sys.stderr = os.fdopen(sys.stderr.fileno(), "w", buffering=1)
    sys.stdout = os.fdopen(os.dup(pipe.fileno()), "w", buffering=1)
    sys.argv = ["blindtune-worker", "serve", "--model", str(model), "--insecure", "--threads", "1"]
    sys.argv += ["--listen", "127.0.0.1:0", "--record", str(transcript)]
    main()


@contextmanager
def forked_workers(model: Path, transcripts: Sequence[Path]) -> Iterator[list[str]]:
    """As `blindtune.client.audit.workers.recorded_workers`."""
    context = forkserver()
    pipes = [context.Pipe() for _ in transcripts]
    processes = [
        context.Process(target=_serve, args=(model, transcript, theirs), daemon=True)
        for transcript, (_, theirs) in zip(transcripts, pipes, strict=True)
    ]
    try:
        with worker_environment():
            for process in processes:
                process.start()
        addresses = []
        for ours, theirs in pipes:
            theirs.close()
            assert ours.poll(PATIENCE), "the worker process says nothing"
            addresses.append(json.loads(os.read(ours.fileno(), 4096))["address"])
        yield addresses
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
