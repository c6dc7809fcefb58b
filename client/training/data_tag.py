"""Tells whether data changed between two parts of a run, and tells nobody else what it is.

A plain hash of the data would confirm a guess of all of it. So ``run.json`` holds

    HMAC-SHA256(key, "blindtune data v1 NONCE SPLIT " || SHA-256 of the encoded examples)

with a nonce of the run's own, and a key that stays in the user's settings folder.
"""

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blindtune.client.data.prepared import PreparedData
from blindtune.client.data.reading.records import digest
from blindtune.client.process.disk import disk_errors_are_clear, file_written_at_once
from blindtune.client.process.settings import settings_folder
from blindtune.errors import ConfigurationError

__all__ = ["DataTags", "data_key", "differing", "new_tags", "plain_digests"]

_BYTES = 32
_NONCE = re.compile(r"[0-9a-f]{32}")

DataTags = dict[str, str | None]


def data_key() -> Path:
    """Where the key is."""
    return settings_folder() / "data.key"


def new_tags(data: PreparedData) -> dict[str, Any]:
    """What ``run.json`` keeps of the data of a run that begins; the key is made at first use.

    Raises:
        ConfigurationError: the key can't be read or made.
    """
    path = data_key()
    if not path.exists():
        try:
            with disk_errors_are_clear(path.parent):
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                key = os.urandom(_BYTES)
                # Of two processes that do, the first one's stays.
                file_written_at_once(path, lambda file: file.write(key), replace=False)
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be made: {error.strerror}") from None
    nonce, key = os.urandom(16).hex(), _key(path)
    return {"nonce": nonce, "key": _id(key), **_tags(key, nonce, data)}


def differing(kept: object, data: PreparedData) -> str | None:
    """Which data is not what a run began with.

    Args:
        kept: from `new_tags`.

    Raises:
        ConfigurationError: that can't be told.
    """
    nonce = kept.get("nonce") if isinstance(kept, Mapping) else None
    if not isinstance(kept, Mapping) or not (isinstance(nonce, str) and _NONCE.fullmatch(nonce)):
        raise ConfigurationError("the run says nothing of its data")
    key = _key(data_key())
    if kept.get("key") != _id(key):
        raise ConfigurationError(f"{data_key()} is not the key that the run began with")
    actual = _tags(key, nonce, data)
    return next((name for name, tag in actual.items() if kept.get(name) != tag), None)


def plain_digests(data: PreparedData) -> DataTags:
    """What earlier versions kept."""
    return {f"{name}_sha256": None if rows is None else digest(rows) for name, rows in _rows(data).items()}


def _rows(data: PreparedData) -> dict[str, Sequence[Mapping[str, Any]] | None]:
    validation = None if data.validation is None else data.validation.rows
    return {"train": data.train.rows, "validation": validation}


def _tags(key: bytes, nonce: str, data: PreparedData) -> DataTags:
    def tag(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
        message = f"blindtune data v1 {nonce} {name} {digest(rows)}"
        return hmac.digest(key, message.encode(), "sha256").hex()

    return {name: None if rows is None else tag(name, rows) for name, rows in _rows(data).items()}


def _id(key: bytes) -> str:
    """Tells keys apart."""
    return hashlib.sha256(b"blindtune data key v1 " + key).hexdigest()[:16]


def _key(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            key = file.read(_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigurationError(f"{path} can be read by others: make it yours alone with chmod 600")
    if len(key) != _BYTES:
        raise ConfigurationError(f"{path} is damaged: restore it from a copy, or delete it")
    return key
