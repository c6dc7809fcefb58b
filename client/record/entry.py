"""One entry of a record, which is one line of its file.

line       canonical JSON of the fields below and of "signature"
signature  Ed25519 over  b"blindtune record v1\\n" + canonical JSON of the fields below
previous   SHA-256 of the line before, without its line feed; 64 zeros in the first one
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from blindtune.client.record.bodies import KINDS, malformed
from blindtune.client.record.canonical import LARGEST, canonical, parse_canonical
from blindtune.client.record.keys import RecordKey, VerificationKey

__all__ = ["DOMAIN", "NOTHING_BEFORE", "VERSION", "Entry", "EntryError"]

VERSION = 1
DOMAIN = b"blindtune record v1\n"
NOTHING_BEFORE = "0" * 64
_LONGEST = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PATTERNS = {
    "record": re.compile(r"[0-9a-f]{32}"),
    "key": _DIGEST,
    "previous": _DIGEST,
    "signature": re.compile(r"[0-9a-f]{128}"),
    "time": re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z"),
}
_FIELDS = {"version", "record", "sequence", "previous", "time", "kind", "key", "body"}


class EntryError(ValueError):
    """A line is no entry, or not one that was signed with the key."""


@dataclass(frozen=True)
class Entry:
    """An entry whose signature is good.

    Attributes:
        record: random number of the record, in hex.
        sequence: how many entries stand before it.
        previous: hash of the line before.
        time: by the client's clock, in UTC.
        kind: one of `blindtune.client.record.bodies.KINDS`.
        body: what the kind has to say.
        line: the bytes in the file, without a line feed.
    """

    record: str
    sequence: int
    previous: str
    time: str
    kind: str
    body: Mapping[str, Any]
    line: bytes

    @property
    def hash(self) -> str:
        """What the next entry names as ``previous``; of the last entry, the head of the record."""
        return hashlib.sha256(self.line).hexdigest()

    @classmethod
    def signed(
        cls,
        key: RecordKey,
        record: str,
        previous: "Entry | None",
        kind: str,
        body: Mapping[str, Any],
        now: datetime | None = None,
    ) -> "Entry":
        """A new entry after another one."""
        if kind not in KINDS:
            raise ValueError(f"there are no entries of kind {kind}")
        sequence = 0 if previous is None else previous.sequence + 1
        before = NOTHING_BEFORE if previous is None else previous.hash
        time = (now or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        fields = {
            "version": VERSION,
            "record": record,
            "sequence": sequence,
            "previous": before,
            "time": time,
            "kind": kind,
            "key": key.verification.id,
            "body": dict(body),
        }
        signature = key.sign(DOMAIN + canonical(fields)).hex()
        line = canonical({**fields, "signature": signature})
        return cls(record, sequence, before, time, kind, dict(body), line)

    @classmethod
    def read(cls, line: bytes, key: VerificationKey) -> "Entry":
        """The entry of a line.

        Raises:
            EntryError: the line is malformed, or was not signed with this key as it stands.
        """
        fields = _fields(line)
        signature = bytes.fromhex(fields.pop("signature"))
        if fields["key"] != key.id:
            raise EntryError(f"it was signed with key {fields['key']}, and the key given is {key.id}")
        if not key.verifies(signature, DOMAIN + canonical(fields)):
            raise EntryError(
                "the signature does not fit: the entry was altered, or was signed with another key"
            )
        return cls(
            fields["record"],
            fields["sequence"],
            fields["previous"],
            fields["time"],
            fields["kind"],
            fields["body"],
            line,
        )


def _fields(line: bytes) -> dict[str, Any]:
    if len(line) > _LONGEST:
        raise EntryError(f"this is no entry: it is longer than {_LONGEST:,} bytes")
    try:
        fields = parse_canonical(line)
    except ValueError as error:
        # What json says could quote the line, and someone may have named a file of data by mistake.
        why = str(error) if type(error) is ValueError else "no JSON"
        raise EntryError(f"this is no entry: {why}") from None
    if not isinstance(fields, dict):
        raise EntryError("this is no entry: no JSON object")
    if fields.get("version") != VERSION:
        raise EntryError(f"this is no entry of version {VERSION}, which is all that this release reads")
    if set(fields) != {*_FIELDS, "signature"}:
        raise EntryError("this is no entry: it has other fields")
    for name, pattern in _PATTERNS.items():
        if not isinstance(fields[name], str) or not pattern.fullmatch(fields[name]):
            raise EntryError(f"this is no entry: its field {name} is malformed")
    sequence = fields["sequence"]
    if isinstance(sequence, bool) or not isinstance(sequence, int) or not 0 <= sequence <= LARGEST:
        raise EntryError("this is no entry: its field sequence is malformed")
    if fields["kind"] not in KINDS:
        raise EntryError("this is no entry: its kind is unknown to this release")
    if not isinstance(fields["body"], dict):
        raise EntryError("this is no entry: its field body is malformed")
    if wrong := malformed(fields["kind"], fields["body"]):
        raise EntryError(f"the field {wrong} of the entry {fields['kind']} is missing or malformed")
    return fields
