"""Links in a folder that may have come from elsewhere: none leads out of it.

What was read, written or removed there would otherwise be a file that whoever packed the folder chose.
"""

import os
from pathlib import Path

from blindtune.errors import ConfigurationError

__all__ = ["require_inside", "require_own_files"]


def require_own_files(folder: Path) -> None:
    """Checks that no link in a folder, or in a folder therein, leads out of it.

    Raises:
        ConfigurationError: one does.
    """
    for path, folders, files in os.walk(folder):
        for name in (*folders, *files):
            require_inside(Path(path, name), folder)


def require_inside(path: Path, folder: Path) -> None:
    """Checks that something in a folder is no link out of it; the hub's cache keeps files beside its folders.

    Raises:
        ConfigurationError: it is one.
    """
    if not path.is_symlink():
        return
    allowed = [folder.resolve()]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.with_name("blobs").resolve())
    try:
        target = Path(os.path.realpath(path, strict=True))
    except OSError:  # of nothing, or of itself
        target = None
    if target is None or not any(target.is_relative_to(x) for x in allowed):
        raise ConfigurationError(
            f"{path} is a link that leads out of {folder}, or nowhere, and would decide what is read or "
            "written elsewhere: put what is meant there itself"
        )
