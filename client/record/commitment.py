"""Commitments to the data: hashes that say nothing of it until the client reveals the salt.

The salt is 32 bytes from the operating system, of one record alone. With HMAC-SHA256 it gives

    leaf salt of record i of a split   HMAC(salt, "blindtune record v1 leaf SPLIT i")   i from 0, in decimal
    tag key                            HMAC(salt, "blindtune record v1 tags")
    configuration key                  HMAC(salt, "blindtune record v1 configuration")

and with the digests d_i of the records (see `blindtune.client.data.reading.records.record_digest`)

    root         tree over  leaf salt_i || d_i           in the order of the file
    sorted root  tree over  HMAC(tag key, d_i)           in ascending order

The first root commits to the records and their order. One record can be shown to be in it by revealing the
leaf salt of that record alone. The second root can show that a record is not there: its tag would stand
between two neighbours. Both trees are those of RFC 6962, section 2.1: a leaf is SHA-256(0x00 || entry), a
node SHA-256(0x01 || left || right).
"""

import hashlib
import hmac
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blindtune.client.process.disk import disk_errors_are_clear, file_written_at_once, make_folder
from blindtune.errors import ConfigurationError

__all__ = ["Salt", "Split", "leaf", "path_of", "root_of", "root_of_path", "tag", "tag_key_digest"]

_PREFIX = "blindtune record v1"
_BYTES = 32


@dataclass(frozen=True)
class Split:
    """Commitments to one file.

    Attributes:
        records: how many it has.
        root: in order.
        sorted_root: of the tags, sorted.
    """

    records: int
    root: str
    sorted_root: str


class Salt:
    """The salt of one record. It has no representation that shows it.

    Args:
        value: 32 bytes.
    """

    def __init__(self, value: bytes) -> None:
        if len(value) != _BYTES:
            raise ValueError(f"a salt has {_BYTES} bytes, not {len(value)}")
        self._value = value

    @classmethod
    def drawn(cls) -> "Salt":
        """A fresh one, from the operating system."""
        return cls(os.urandom(_BYTES))

    @classmethod
    def read(cls, path: Path) -> "Salt":
        """The salt of a file.

        Raises:
            ConfigurationError: it holds none.
        """
        try:
            return cls(bytes.fromhex(path.read_text(encoding="ascii").strip()))
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"{path} holds no salt of a record ({type(error).__name__}): it is in the folder salts, "
                "beside the key that signed the record"
            ) from None

    def write(self, path: Path) -> None:
        """Writes it to a file that only its owner can read.

        Raises:
            ConfigurationError: the folder can't be written to.
        """
        with disk_errors_are_clear(path.parent):
            make_folder(path.parent)
        file_written_at_once(path, lambda file: file.write(f"{self._value.hex()}\n".encode()))

    @property
    def digest(self) -> str:
        """What a record says of it: enough to recognise it, and no help in guessing it."""
        return hashlib.sha256(f"{_PREFIX} salt ".encode() + self._value).hexdigest()

    def leaf_salt(self, split: str, index: int) -> bytes:
        """Hides one record: 32 bytes."""
        return self._derived(f"leaf {split} {index}")

    @property
    def tag_key(self) -> bytes:
        """Gives the tags: 32 bytes."""
        return self._derived("tags")

    @property
    def tag_key_digest(self) -> str:
        """What a record says of the key of the tags."""
        return tag_key_digest(self.tag_key)

    def configuration(self, content: Mapping[str, Any]) -> str:
        """Commitment to a configuration, which names labels, prompts and files."""
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        key = self._derived("configuration")
        return hmac.digest(key, text.encode("utf-8", "surrogatepass"), "sha256").hex()

    def split(self, name: str, digests: Sequence[bytes]) -> Split:
        """Commitments to the records of a split, given their digests in order."""
        return Split(
            len(digests),
            root_of(self.leaves(name, digests)).hex(),
            root_of([leaf(x) for x in self.tags(digests)]).hex(),
        )

    def leaves(self, name: str, digests: Sequence[bytes]) -> list[bytes]:
        """Leaves of the tree in order."""
        return [leaf(self.leaf_salt(name, i) + x) for i, x in enumerate(digests)]

    def tags(self, digests: Sequence[bytes]) -> list[bytes]:
        """Tags of records, sorted."""
        key = self.tag_key
        return sorted(tag(key, x) for x in digests)

    def _derived(self, label: str) -> bytes:
        return hmac.digest(self._value, f"{_PREFIX} {label}".encode(), "sha256")


def tag(key: bytes, digest: bytes) -> bytes:
    """The tag of a record, given the key of the tags."""
    return hmac.digest(key, digest, "sha256")


def tag_key_digest(key: bytes) -> str:
    """What a record says of the key of its tags."""
    return hashlib.sha256(f"{_PREFIX} tag key ".encode() + key).hexdigest()


def leaf(entry: bytes) -> bytes:
    """Hash of an entry of a tree."""
    return hashlib.sha256(b"\x00" + entry).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def _above(level: Sequence[bytes]) -> list[bytes]:
    """Nodes above some; the last one of an odd number goes up as it is."""
    pairs = [_node(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
    return [*pairs, level[-1]] if len(level) % 2 else pairs


def root_of(leaves: Sequence[bytes]) -> bytes:
    """The root of a tree, given the hashes of its entries; without any, the hash of nothing."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    level = list(leaves)
    while len(level) > 1:
        level = _above(level)
    return level[0]


def path_of(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The nodes from which, with one leaf, the root follows; the lowest first."""
    path = []
    level = list(leaves)
    while len(level) > 1:
        if index ^ 1 < len(level):
            path.append(level[index ^ 1])
        level, index = _above(level), index // 2
    return path


def root_of_path(entry: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes:
    """The root that a path leads to.

    Args:
        entry: hash of the leaf.
        index: of the leaf, from 0.
        size: number of leaves.
        path: as `path_of` gives it.

    Raises:
        ValueError: a tree of this size has no such leaf, or paths of another length.
    """
    if not 0 <= index < size:
        raise ValueError(f"no leaf {index} in a tree of {size}")
    left = list(path)
    while size > 1:
        if index ^ 1 < size:
            if not left:
                raise ValueError("the path is too short")
            sibling = left.pop(0)
            entry = _node(sibling, entry) if index % 2 else _node(entry, sibling)
        index, size = index // 2, (size + 1) // 2
    if left:
        raise ValueError("the path is too long")
    return entry
