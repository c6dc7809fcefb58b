"""A whole record: its entries in order, each after the one before, all signed with one key."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blindtune.client.record.entry import NOTHING_BEFORE, Entry, EntryError
from blindtune.client.record.keys import VerificationKey
from blindtune.errors import RecordError

__all__ = ["Chain", "parse_chain", "read_chain"]


@dataclass(frozen=True)
class Chain:
    """A record that was verified.

    Attributes:
        entries: at least one.
    """

    entries: Sequence[Entry]

    @property
    def record(self) -> str:
        """The record's random number, in hex."""
        return self.entries[0].record

    @property
    def head(self) -> str:
        """Hash of the last entry: whoever knows it notices any change, and entries that lack at the end."""
        return self.entries[-1].hash

    @property
    def complete(self) -> bool:
        """Whether the run was ended in this record. If not, entries may lack at the end."""
        return self.entries[-1].kind == "finish"

    @property
    def start(self) -> Entry:
        """The first entry."""
        return self.entries[0]

    def of(self, *kinds: str) -> list[Entry]:
        """Entries of some kinds, in order."""
        return [x for x in self.entries if x.kind in kinds]

    def checkpoints(self) -> dict[int, dict[str, str]]:
        """Digests of files by the step of their checkpoint; the last ones said of each."""
        found: dict[int, dict[str, str]] = {}
        for entry in self.of("checkpoint", "resume"):
            checkpoint: Any = entry.body if entry.kind == "checkpoint" else entry.body["checkpoint"]
            if checkpoint is not None:
                found[checkpoint["step"]] = checkpoint["files"]
        return found


def read_chain(path: Path, key: VerificationKey) -> Chain:
    """Reads and verifies a record.

    Raises:
        RecordError: an entry is malformed, altered, missing, repeated, out of order, of another record, or
            signed with another key; the message gives the line. Or there is no record.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecordError(f"cannot read the record {path}: {error.strerror}") from None
    complete, end, torn = content.rpartition(b"\n")
    if torn:
        number = complete.count(b"\n") + (2 if end else 1)
        raise RecordError(
            f"{path}, line {number}: the entry is incomplete: the run was cut off while it was written, or "
            "the file was; blindtune train --resume goes on after the last complete entry"
        )
    return parse_chain(complete + end, key, str(path))


def parse_chain(content: bytes, key: VerificationKey, name: str) -> Chain:
    """The record that some lines are, each of which ends with a line feed; ``name`` is for messages."""
    entries: list[Entry] = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            entry = Entry.read(line, key)
            _require_next(entry, entries)
        except EntryError as error:
            raise RecordError(f"{name}, line {number}: {error}") from None
        entries.append(entry)
    if not entries:
        raise RecordError(f"{name} holds no entry")
    return Chain(entries)


def _require_next(entry: Entry, before: Sequence[Entry]) -> None:
    """Checks that an entry is the one that comes after others."""
    if before and entry.record != before[0].record:
        raise EntryError(f"the entry is of another record, {entry.record}")
    expected = len(before)
    if entry.sequence > expected:
        last = entry.sequence - 1
        lacking = f"entry {expected} lacks" if last == expected else f"entries {expected} to {last} lack"
        raise EntryError(f"this is entry {entry.sequence}, and {lacking} before it")
    if entry.sequence < expected:
        repeated = before[entry.sequence].line == entry.line
        why = f"repeats line {entry.sequence + 1}" if repeated else "is out of order"
        raise EntryError(f"this is entry {entry.sequence}, which {why}; entry {expected} belongs here")
    if entry.previous != (before[-1].hash if before else NOTHING_BEFORE):
        raise EntryError("the entry does not follow the line before: one of the two was exchanged")
    if (entry.kind == "start") != (not before):
        raise EntryError("a record begins with its only entry of kind start")
    if before and before[-1].kind == "finish" and entry.kind != "resume":
        raise EntryError(f"after finish comes resume or nothing, and not {entry.kind}")
