"""What version control systems put in the place of large files that were not fetched."""

from pathlib import Path
from typing import NamedTuple

__all__ = ["Pointer", "pointer_of"]


class Pointer(NamedTuple):
    """What stands in a file's place.

    Attributes:
        system: whose it is.
        kind: what it is called.
        command: fetches the file.
    """

    system: str
    kind: str
    command: str


_POINTERS = {
    b"version https://git-lfs.github.com/spec/": Pointer("Git LFS", "git-lfs pointer", "git lfs pull"),
    b"/annex/objects/": Pointer("git-annex", "git-annex pointer", "git annex get"),
}


def pointer_of(path: Path) -> Pointer | None:
    """What stands in the place of a file; None where it is the file itself.

    Raises:
        OSError: it can't be read.
    """
    with open(path, "rb") as file:
        head = file.read(max(len(x) for x in _POINTERS))
    return next((pointer for begin, pointer in _POINTERS.items() if head.startswith(begin)), None)
