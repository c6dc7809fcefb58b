"""The user's own folder: keys, salts, and the operators that this user trusts."""

import os
from pathlib import Path

__all__ = ["settings_folder"]


def settings_folder() -> Path:
    """``BLINDTUNE_CONFIG`` says which, or XDG does. It need not be there yet."""
    folder = os.environ.get("BLINDTUNE_CONFIG")
    if folder:
        return Path(folder).absolute()
    root = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(root).absolute() / "blindtune"
