"""Writing files and folders so that they appear complete or not at all, and stay when the power goes."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from blindtune.errors import BlindtuneError, ConfigurationError, ResourceError

__all__ = [
    "disk_errors_are_clear",
    "file_written_at_once",
    "folder_written_at_once",
    "make_folder",
    "sync",
    "sync_all",
    "write_private",
]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FAILING = (errno.EFBIG, errno.EIO, errno.ENXIO, errno.ESTALE)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def disk_errors_are_clear(folder: Path) -> Iterator[None]:
    """Turns what libraries raise when a folder can't take more into one clear error.

    What was written so far is for the block to remove.

    Raises:
        ResourceError: the disk is full, or fails.
        ConfigurationError: the folder can't be written to.
    """
    try:
        yield
    except BlindtuneError:
        raise
    except Exception as error:
        number = _number(error)
        reason = "" if number is None else os.strerror(number)
        # torch.save writes in C++, which says that it failed and not why; nothing else fails in its module.
        unknown = isinstance(error, RuntimeError) and _raised_in(error) == "torch.serialization"
        if number in (*_FULL, *_FAILING) or unknown:
            why = "is full" if number in _FULL else f"fails ({reason})" if reason else "is full or fails"
            raise ResourceError(
                f"the disk that holds {folder} {why}: free some space or choose another folder; nothing "
                "incomplete was left behind"
            ) from error
        if number in _FORBIDDEN:
            raise ConfigurationError(f"{folder} cannot be written to: {reason}") from error
        raise


def _number(error: Exception) -> int | None:
    """The operating system's number of an error; libraries in Rust report it as text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    if found := re.search(r"os error (\d+)", text):
        return int(found[1])
    return next((code for code in _FULL if os.strerror(code) in text), None)


def _raised_in(error: Exception) -> str | None:
    """The module that an error was raised in."""
    traceback, module = error.__traceback__, None
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__")
        traceback = traceback.tb_next
    return module


def make_folder(path: Path, mode: int = 0o700) -> None:
    """Makes a folder, and those that it lies in, where they are not there yet.

    Args:
        mode: of those that are made; their owner's alone by default.

    Raises:
        FileExistsError: one of them is a file.
    """
    for folder in reversed([path, *path.parents]):
        if not folder.is_dir():
            folder.mkdir(mode=mode, exist_ok=True)
            sync(folder.parent)


def sync(path: Path) -> None:
    """Makes sure that a file's content, or a folder's list of names, survives a loss of power."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sync_all(folder: Path) -> None:
    """The same for a folder and all that is in it."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


@contextmanager
def folder_written_at_once(destination: Path) -> Iterator[Path]:
    """A temporary folder beside the destination that takes its place when all went well.

    Raises:
        ResourceError: the disk is full.
    """
    temporary = None
    try:
        with disk_errors_are_clear(destination.parent):
            make_folder(destination.parent, 0o777)
            temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
            yield temporary
            sync_all(temporary)
        try:
            os.replace(temporary, destination)
            sync(destination.parent)
        except OSError as error:
            # Another process may have finished the same folder first: theirs is as good.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def file_written_at_once(path: Path, write: Callable[[BinaryIO], object], replace: bool = True) -> None:
    """Writes a file that only its owner can read.

    Args:
        path: of the file, in an existing folder.
        write: writes the content.
        replace: whether a file that is there already makes way; if not, it stays.

    Raises:
        ResourceError: the disk is full.
    """
    with disk_errors_are_clear(path.parent):
        number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(number, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                os.replace(temporary, path)
            else:
                with suppress(FileExistsError):
                    os.link(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_private(path: Path, content: bytes) -> None:
    """Creates a file that nobody but its owner could read at any moment."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
