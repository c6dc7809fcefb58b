"""Whether what a run writes will fit, and may be written."""

import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from blindtune.client.preflight.finding import Finding

__all__ = ["check_disk"]


def check_disk(needs: Mapping[Path, tuple[str, int]]) -> Iterator[Finding]:
    """Checks folders that will be written to, and adds up what goes to the same file system.

    Args:
        needs: for each folder, which need not exist yet, what will be in it, and how many bytes.
    """
    shared: dict[int, list[Path]] = defaultdict(list)
    for folder, (what, _) in needs.items():
        parent = _existing(folder)
        problem = _cannot_write(parent)
        if problem is None:
            shared[parent.stat().st_dev].append(folder)
            yield Finding(f"folder for {what}", "ok", f"{folder} can be written to")
        else:
            yield Finding(
                f"folder for {what}",
                "problem",
                f"{folder} cannot be written to: {problem}",
                f"choose another folder, or make {parent} writable for this user",
            )
    for folders in shared.values():
        yield _space([needs[folder] for folder in folders], _existing(folders[0]))


def _existing(folder: Path) -> Path:
    """The folder, or the nearest of its parents that is there."""
    path = folder.expanduser().resolve()
    # os.path.exists, unlike Path.exists, says no where it may not look.
    return next((x for x in (path, *path.parents) if os.path.exists(x)), Path("/"))


def _cannot_write(folder: Path) -> str | None:
    if not folder.is_dir():
        return f"{folder} is a file"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or type(error).__name__


def _space(needs: list[tuple[str, int]], folder: Path) -> Finding:
    what = " and ".join(dict.fromkeys(name for name, _ in needs))
    wanted = sum(size for _, size in needs)
    figures = os.statvfs(folder)
    free = figures.f_bavail * figures.f_frsize
    detail = f"{_size(wanted)} needed, {_size(free)} free at {folder}"
    if wanted > free:
        return Finding(
            f"space for {what}",
            "problem",
            detail,
            f"free {_size(wanted - free)} there, or choose a folder on a larger disk",
        )
    return Finding(f"space for {what}", "ok", detail)


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
