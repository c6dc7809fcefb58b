"""Prepares kits on disks of all sizes, from nearly nothing to enough.

    unshare --user --map-root-user --mount python small_disk.py CHECKPOINT FOLDER

In a mount namespace of its own it mounts a file system of its own at FOLDER, again and again, each time a
page larger, and prints a line of JSON for each: what came of it, and what was left behind.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from blindtune.checkpoint import Checkpoint
from blindtune.client.kit import Kit
from blindtune.client.prepare import cached_kit, prepare
from blindtune.protocol.errors import BlindtuneError

PAGE = os.sysconf("SC_PAGESIZE")


def _attempt(checkpoint: Checkpoint, folder: Path, how: str) -> dict[str, object]:
    outcome: dict[str, object] = {"how": how}
    try:
        kit = prepare(checkpoint, folder / "kit") if how == "prepare" else cached_kit(checkpoint, folder)
        Kit.open(kit.folder)
        outcome |= {"error": None}
    except BlindtuneError as error:
        outcome |= {"error": type(error).__name__, "message": str(error)}
    except Exception as error:
        outcome |= {"error": f"unexpected {type(error).__name__}", "message": str(error)}
    left = [path for path in folder.rglob("*") if path.is_file() or path.name.startswith(".")]
    return outcome | {"left": len(left)}


def main(model: str, folder: Path) -> None:
    """Tries one page after the other until a kit fits, by ``prepare`` and at first use."""
    checkpoint = Checkpoint.open(model)
    for how in ("prepare", "first use"):
        size, error = PAGE, ""
        while error is not None:
            options = f"size={size},nr_inodes=64"
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
            outcome = _attempt(checkpoint, folder, how)
            subprocess.run(["umount", folder], check=True)
            print(json.dumps(outcome | {"size": size}), flush=True)
            size, error = size + PAGE, outcome["error"]  # type: ignore[assignment]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
