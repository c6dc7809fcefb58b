"""Prepares kits, and saves a run's checkpoint, on disks of all sizes, from nearly nothing to enough.

    unshare --user --map-root-user --mount python small_disk.py MODEL TRAIN FOLDER

MODEL has a tokenizer, and TRAIN is a file of examples for it. In a mount namespace of its own it mounts a
file system of its own at FOLDER, again and again, each time a page larger, and prints a line of JSON for
each: what came of it, and what was left behind.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from blindtune.checkpoint import Checkpoint
from blindtune.client.kit.kit import Kit
from blindtune.client.kit.prepare import cached_kit, prepare
from blindtune.client.process.disk import make_folder
from blindtune.client.record.digests import require_whole
from blindtune.errors import BlindtuneError
from support.recipes import recipe_of, trained_one_step

PAGE = os.sysconf("SC_PAGESIZE")


def _attempts(model: Path, train: Path, folder: Path) -> dict[str, Callable[[], object]]:
    """What is tried on each disk, by its name."""
    checkpoint = Checkpoint.open(model)
    trainer = trained_one_step(recipe_of(folder, model, train))

    def save() -> None:
        make_folder(Path(trainer.args.output_dir))
        trainer._save_checkpoint(trainer.model, None)
        require_whole(Path(trainer.args.output_dir, "checkpoint-1"))

    return {
        "prepare": lambda: Kit.open(prepare(checkpoint, folder / "kit").folder),
        "first use": lambda: Kit.open(cached_kit(checkpoint, folder).folder),
        "checkpoint": save,
    }


def _outcome(attempt: Callable[[], object], folder: Path) -> dict[str, object]:
    outcome: dict[str, object] = {}
    try:
        attempt()
        outcome |= {"error": None}
    except BlindtuneError as error:
        outcome |= {"error": type(error).__name__, "message": str(error)}
    except Exception as error:
        outcome |= {"error": f"unexpected {type(error).__name__}", "message": str(error)}
    left = [path for path in folder.rglob("*") if path.is_file() or path.name.startswith(".")]
    return outcome | {"left": len(left)}


def main(model: Path, train: Path, folder: Path) -> None:
    """Tries one page after the other until it fits, with each attempt."""
    for how, attempt in _attempts(model, train, folder).items():
        size, error = PAGE, ""
        while error is not None:
            options = f"size={size},nr_inodes=64"
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
            outcome = _outcome(attempt, folder)
            subprocess.run(["umount", folder], check=True)
            print(json.dumps(outcome | {"how": how, "size": size}), flush=True)
            size, error = size + PAGE, outcome["error"]  # type: ignore[assignment]


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
