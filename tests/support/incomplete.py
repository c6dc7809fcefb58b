"""``python incomplete.py MODULE,... COMMAND ARGUMENT...``: a console command where modules are missing."""

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from typing import Any

ENTRIES = {"blindtune": "blindtune.client.cli", "blindtune-worker": "blindtune.server.command"}


def hide(modules: set[str]) -> None:
    """Has Python find nothing under these names."""
    stock = PathFinder.find_spec

    def find_spec(name: str, *others: Any) -> Any:
        return None if name in modules else stock(name, *others)

    PathFinder.find_spec = find_spec  # type: ignore[method-assign]


if __name__ == "__main__":
    hide(set(sys.argv[1].split(",")))
    command = sys.argv[2]
    sys.argv = [command, *sys.argv[3:]]
    import_module(ENTRIES[command]).main()
