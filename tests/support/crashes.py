"""A disk that loses what was not flushed: what a crash at any moment would leave of a folder.

The code under test runs as it is, on a real folder. Before each operation on files that Python reports (an
audit hook sees those of libraries too), and around each ``fsync``, the folder is looked at: what is there
now, and what of it was flushed. Files that native code writes are found by looking. A file's content is
flushed by an ``fsync`` of the file, its name by one of its folder. From each moment come four folders:

- what is there, since a process that is killed loses nothing that it wrote;
- what was flushed and nothing else, after a loss of power;
- all names with the content that was flushed, for file systems keep names and contents apart;
- what was flushed without the names that are gone since, for they keep changes of names in no order.

A file whose content was never flushed is empty. Flushing by native code goes unseen, which errs on the safe
side.
"""

import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

__all__ = ["Crash", "CrashRecorder"]

_EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

Tree = dict[str, Union[bytes, "Tree"]]


@dataclass(frozen=True)
class Crash:
    """What a crash leaves.

    Attributes:
        when: what was about to happen.
        how: what was lost.
        promised: what `CrashRecorder.promise` was told before.
        tree: names with contents.
    """

    when: str
    how: str
    promised: tuple[Any, ...]
    tree: Tree

    def write_to(self, folder: Path) -> None:
        """Makes an empty folder what the crash left."""
        _write(self.tree, folder)

    def __str__(self) -> str:
        return f"{self.how} before {self.when}"


@dataclass(eq=False)
class _File:
    now: bytes = b""
    flushed: bytes = b""


@dataclass(eq=False)
class _Folder:
    names: dict[str, "_File | _Folder"] = field(default_factory=dict)
    flushed: dict[str, "_File | _Folder"] = field(default_factory=dict)

    @property
    def least(self) -> dict[str, "_File | _Folder"]:
        """A name that now stands for something else was not gone in between."""
        return {name: known for name, known in self.flushed.items() if name in self.names}


class CrashRecorder:
    """Records what happens to a folder in its block; what is there at the start counts as flushed.

    Args:
        folder: an existing one.
    """

    _recording: "CrashRecorder | None" = None
    _hooked = False

    def __init__(self, folder: Path) -> None:
        self._path = folder
        self._objects: dict[int, _File | _Folder] = {}
        self._root = _Folder()
        self._looking = False
        self._promised: tuple[Any, ...] = ()
        self._found: dict[tuple[Any, ...], Crash] = {}

    def __enter__(self) -> "CrashRecorder":
        self._look()
        for known in [self._root, *self._objects.values()]:
            _flush(known)
        if not CrashRecorder._hooked:
            sys.addaudithook(_heard)  # for good: it can't be taken away
            CrashRecorder._hooked = True
        self._fsync, os.fsync = os.fsync, self._flushed
        CrashRecorder._recording = self
        return self

    def __exit__(self, *error: object) -> None:
        CrashRecorder._recording = None
        os.fsync = self._fsync
        self._moment("the end")

    def promise(self, what: Any) -> None:
        """From now on every crash comes after this was said to be safe."""
        self._moment(f"{what} was promised")
        self._promised = (*self._promised, what)
        self._moment(f"what comes after {what} was promised")

    def __iter__(self) -> Iterator[Crash]:
        return iter(self._found.values())

    def __len__(self) -> int:
        return len(self._found)

    def _flushed(self, file: Any) -> None:
        self._moment("a flush")
        self._fsync(file)
        number = file if isinstance(file, int) else file.fileno()
        self._look()
        known = self._objects.get(os.fstat(number).st_ino)
        if os.fstat(number).st_ino == self._path.stat().st_ino:
            known = self._root
        if known is not None:
            _flush(known)
            self._moment("what comes after a flush")

    def _moment(self, when: str) -> None:
        if self._looking:
            return
        self._looking = True  # looking is no event
        try:
            self._look()
            for how, names, contents in (
                ("killed", "names", "now"),
                ("power lost", "flushed", "flushed"),
                ("power lost, names kept", "names", "flushed"),
                ("power lost, names gone", "least", "flushed"),
            ):
                tree = _tree(self._root, names, contents)
                self._found.setdefault((_key(tree), self._promised), Crash(when, how, self._promised, tree))
        finally:
            self._looking = False

    def _look(self) -> None:
        there: set[int] = set()
        self._look_into(self._path, self._root, there)
        for gone in self._objects.keys() - there:
            del self._objects[gone]  # its number may be given to another file

    def _look_into(self, path: Path, folder: _Folder, there: set[int]) -> None:
        names: dict[str, _File | _Folder] = {}
        for entry in os.scandir(path):
            found = entry.stat(follow_symlinks=False)
            there.add(found.st_ino)
            is_folder = stat.S_ISDIR(found.st_mode)
            known = self._objects.get(found.st_ino)
            if known is None or isinstance(known, _Folder) != is_folder:
                known = self._objects[found.st_ino] = _Folder() if is_folder else _File()
            names[entry.name] = known
            if isinstance(known, _Folder):
                self._look_into(Path(entry.path), known, there)
            elif (content := Path(entry.path).read_bytes()) != known.now:
                known.now = content
        folder.names = names


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    recorder = CrashRecorder._recording
    if recorder is None or recorder._looking:
        return
    if event in _EVENTS or (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING):
        recorder._moment(f"{event} of {arguments[0]}")


def _flush(known: _File | _Folder) -> None:
    if isinstance(known, _File):
        known.flushed = known.now
    else:
        known.flushed = dict(known.names)


def _tree(folder: _Folder, names: str, contents: str) -> Tree:
    return {
        name: _tree(known, names, contents) if isinstance(known, _Folder) else getattr(known, contents)
        for name, known in getattr(folder, names).items()
    }


def _key(tree: Tree) -> tuple[Any, ...]:
    return tuple((name, _key(x) if isinstance(x, dict) else hash(x)) for name, x in sorted(tree.items()))


def _write(tree: Tree, folder: Path) -> None:
    for name, content in tree.items():
        if isinstance(content, dict):
            (folder / name).mkdir(mode=0o700)
            _write(content, folder / name)
        else:
            (folder / name).write_bytes(content)
            (folder / name).chmod(0o600)
