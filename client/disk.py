"""Writing files and folders so that they appear complete or not at all."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from blindtune.protocol.errors import ConfigurationError, ResourceError

__all__ = ["disk_errors_are_clear", "file_written_at_once", "folder_written_at_once", "write_private"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def disk_errors_are_clear(folder: Path) -> Iterator[None]:
    """Turns what libraries raise when a folder can't take more into one clear error.

    Raises:
        ResourceError: the disk is full.
        ConfigurationError: the folder can't be written to.
    """
    try:
        yield
    except Exception as error:
        if _is_disk_full(error):
            raise ResourceError(
                f"the disk that holds {folder} is full: free some space or choose another folder; nothing "
                "incomplete was left behind"
            ) from error
        if isinstance(error, OSError) and error.errno in _FORBIDDEN:
            raise ConfigurationError(f"{folder} cannot be written to: {error.strerror}") from error
        raise


def _is_disk_full(error: Exception) -> bool:
    # safetensors reports input and output errors as text.
    return (isinstance(error, OSError) and error.errno in _FULL) or any(
        f"os error {code}" in str(error) or os.strerror(code) in str(error) for code in _FULL
    )


@contextmanager
def folder_written_at_once(destination: Path) -> Iterator[Path]:
    """A temporary folder beside the destination that takes its place when all went well.

    Raises:
        ResourceError: the disk is full.
    """
    temporary = None
    try:
        with disk_errors_are_clear(destination.parent):
            destination.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
            yield temporary
        try:
            os.replace(temporary, destination)
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
        finally:
            temporary.unlink(missing_ok=True)


def write_private(path: Path, content: bytes) -> None:
    """Creates a file that nobody but its owner could read at any moment."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
