"""Writing a record: entries are added at its end, and each is on disk before anything goes on."""

import hashlib
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blindtune.client.process.disk import disk_errors_are_clear
from blindtune.client.record.chain import Chain, parse_chain
from blindtune.client.record.entry import Entry
from blindtune.client.record.keys import RecordKey
from blindtune.errors import RecordError

__all__ = ["RecordLog", "Torn"]


@dataclass(frozen=True)
class Torn:
    """An entry that was cut off while it was written, and was taken out.

    Attributes:
        size: in bytes.
        sha256: of them, in hex.
    """

    size: int
    sha256: str


class RecordLog:
    """A record that is written by this process alone, which holds the run's folder.

    Args:
        path: of the file.
        key: signs.
        record: the record's random number, in hex.
        last: the entry at its end.
    """

    def __init__(self, path: Path, key: RecordKey, record: str, last: Entry | None) -> None:
        self.path = path
        self._key = key
        self._record = record
        self._last = last
        self._lock = threading.Lock()

    @classmethod
    def reopened(cls, path: Path, key: RecordKey) -> tuple["RecordLog", Chain, Torn | None]:
        """A record to go on with. An entry that a killed process wrote in part is taken out.

        Raises:
            RecordError: the record is broken otherwise, or has no complete entry.
        """
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        torn = content[len(whole) :]
        # Verified first: nothing of a record that someone has changed is touched.
        chain = parse_chain(whole, key.verification, str(path))
        if torn:
            with disk_errors_are_clear(path.parent), open(path, "r+b") as file:
                file.truncate(len(whole))
                os.fsync(file.fileno())
        found = Torn(len(torn), hashlib.sha256(torn).hexdigest()) if torn else None
        return cls(path, key, chain.record, chain.entries[-1]), chain, found

    @property
    def head(self) -> str:
        """Hash of the last entry.

        Raises:
            RecordError: there is none.
        """
        if self._last is None:
            raise RecordError(f"{self.path} holds no entry")
        return self._last.hash

    @property
    def entries(self) -> int:
        """How many there are."""
        return 0 if self._last is None else self._last.sequence + 1

    @property
    def key_id(self) -> str:
        """Names the key that signs."""
        return self._key.verification.id

    def append(self, kind: str, body: Mapping[str, Any]) -> Entry:
        """Adds an entry.

        Raises:
            ResourceError: the disk is full; the record ends as before.
        """
        with self._lock:
            entry = Entry.signed(self._key, self._record, self._last, kind, body)
            with disk_errors_are_clear(self.path.parent):
                self._write(entry.line + b"\n")
            self._last = entry
        return entry

    def _write(self, line: bytes) -> None:
        created = not self.path.exists()
        number = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            size = os.fstat(number).st_size
            try:
                left = memoryview(line)
                while left:
                    left = left[os.write(number, left) :]
                os.fsync(number)
            except OSError:
                with suppress(OSError):  # what is left then is an incomplete last line, which is recognised
                    os.ftruncate(number, size)
                raise
        finally:
            os.close(number)
        if created:
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
