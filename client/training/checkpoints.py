"""Checkpoints that are whole or not there, and the newest of them."""

import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blindtune.client.process.disk import file_written_at_once, sync, sync_all
from blindtune.client.process.finite import finite
from blindtune.client.record.adapter import step_of
from blindtune.client.record.digests import write_digests
from blindtune.errors import BlindtuneError, CheckpointError

__all__ = [
    "RandomState",
    "damage_is_clear",
    "forget_unfinished",
    "install",
    "newest",
    "owner_only",
    "read_json",
    "staging",
    "write_json",
]

_STAGING = ".unfinished"


class RandomState:
    """Where the random number generators are that training draws from."""

    def __init__(self) -> None:
        self._python, self._numpy = random.getstate(), np.random.get_state()
        self._torch = torch.random.get_rng_state()
        self._cuda = torch.cuda.random.get_rng_state() if torch.cuda.is_available() else None

    def restore(self) -> None:
        """Puts them back there."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.random.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.random.set_rng_state(self._cuda)


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """An empty folder inside ``folder`` to write a checkpoint to, before `install`; it is gone afterwards."""
    forget_unfinished(folder)
    unfinished = folder / _STAGING
    try:
        unfinished.mkdir(mode=0o700)  # libraries write with modes of their own, and nobody looks in meanwhile
        yield unfinished
    finally:
        forget_unfinished(folder)


def install(written: Path, folder: Path, keep: int | None, best: str | None) -> None:
    """Gives a checkpoint that is completely written its name, then removes older ones.

    Args:
        written: the checkpoint in its staging folder, which takes those that are removed.
        keep: how many to keep; None for all.
        best: one that is kept in any case.
    """
    final = folder / written.name
    if final.exists():
        return  # of the same step of this run, and so the same: removing it would leave a moment without
    write_digests(written)
    owner_only(written)
    sync_all(written)
    os.replace(written, final)
    sync(folder)
    if keep:
        kept = {final.name, Path(best or final).name}
        others = [x for x in _checkpoints(folder) if x.name not in kept]
        for older in others[: max(0, len(others) + len(kept) - max(keep, len(kept)))]:
            os.replace(older, written.with_name(older.name))  # never seen half removed: staging goes later
        sync(folder)


def owner_only(folder: Path) -> None:
    """Takes everyone else's rights to a folder and all that is in it: what was learned is private."""
    folder.chmod(0o700)
    for path in folder.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)


def forget_unfinished(folder: Path) -> None:
    """Removes what a killed process was writing."""
    shutil.rmtree(folder / _STAGING, ignore_errors=True)


def newest(folder: Path) -> Path | None:
    """The checkpoint of the latest step."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def _checkpoints(folder: Path) -> list[Path]:
    """Those of a folder by their steps, the first one first. A copy with another name is none of them."""
    found = folder.iterdir() if folder.is_dir() else ()
    steps = {step: x for x in found if (step := step_of(x)) is not None and x.is_dir()}
    return [steps[step] for step in sorted(steps)]


def read_json(path: Path) -> dict[str, Any]:
    """An object that `write_json` wrote; empty where there is none.

    Raises:
        CheckpointError: it was damaged since.
    """
    if not path.exists():
        return {}
    with damage_is_clear(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"a {type(content).__name__} instead of an object")
    return content


@contextmanager
def damage_is_clear(path: Path) -> Iterator[None]:
    """Turns what libraries raise when a file of a run is damaged into one clear error.

    Raises:
        CheckpointError: naming ``path``.
    """
    try:
        yield
    except (BlindtuneError, MemoryError):
        raise
    except Exception as error:  # each format has errors of its own
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}): restore it; a checkpoint can also be deleted, and "
            "then the run goes on from the one before"
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Writes JSON that is whole or not there; a number that is infinite or NaN becomes null."""
    text = json.dumps(finite(content), indent=1, allow_nan=False) + "\n"
    file_written_at_once(path, lambda file: file.write(text.encode()))
