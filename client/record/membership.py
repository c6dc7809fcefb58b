"""Proofs that one record is, or is not, among those that a training record commits to.

A proof of presence gives the record's place, its leaf salt, and its path to the root. Whoever sees it learns
nothing of other records.

A proof of absence gives the key of the tags and the two tags between which the record's would stand, with
their paths to the sorted root. Whoever sees it can try guesses for those two records and for the one or two
beside them in the tree, and for no others.
"""

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from blindtune.client.record.bodies import HexDigest
from blindtune.client.record.chain import Chain
from blindtune.client.record.commitment import (
    Salt,
    leaf,
    path_of,
    root_of_path,
    tag,
    tag_key_digest,
)
from blindtune.client.record.verify import require_salt
from blindtune.errors import RecordError

__all__ = ["Proof", "check_proof", "prove", "read_proof"]

_Split = Literal["train", "validation"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Place(_Strict):
    """A leaf of a tree.

    Attributes:
        index: from 0.
        value: the leaf's salt for presence, a tag for absence; 32 bytes in hex.
        path: nodes from which the root follows, the lowest first.
    """

    index: int = Field(ge=0)
    value: HexDigest
    path: list[HexDigest] = Field(max_length=64)


class Proof(_Strict):
    """A proof about one record, which is shown along with it.

    Attributes:
        record: random number of the training record.
        split: whose records are meant.
        present: what is claimed.
        at: the record's place, for presence.
        tag_key: for absence.
        before, after: the neighbours, for absence; None at an end of the tree.
    """

    version: Literal[1] = 1
    record: str
    split: _Split
    present: bool
    at: Place | None = None
    tag_key: HexDigest | None = None
    before: Place | None = None
    after: Place | None = None


def prove(chain: Chain, salt: Salt, split: _Split, digests: Sequence[bytes], wanted: bytes) -> Proof:
    """A proof about the record with a digest.

    Args:
        digests: of all records of the split, in order.

    Raises:
        RecordError: the salt or the records are not those that were committed to.
    """
    require_salt(chain, salt)
    made, said = salt.split(split, digests), _committed(chain, split)
    if (made.root, made.sorted_root) != (said["root"], said["sorted_root"]):
        raise RecordError(f"these are not the records that the {split} data was committed to with")
    if wanted in digests:
        index = list(digests).index(wanted)
        nodes = [x.hex() for x in path_of(salt.leaves(split, digests), index)]
        at = Place(index=index, value=salt.leaf_salt(split, index).hex(), path=nodes)
        return Proof(record=chain.record, split=split, present=True, at=at)
    tags = salt.tags(digests)
    leaves = [leaf(x) for x in tags]
    place = bisect_left(tags, tag(salt.tag_key, wanted))

    def neighbour(index: int) -> Place | None:
        if not 0 <= index < len(tags):
            return None
        path = [x.hex() for x in path_of(leaves, index)]
        return Place(index=index, value=tags[index].hex(), path=path)

    return Proof(
        record=chain.record,
        split=split,
        present=False,
        tag_key=salt.tag_key.hex(),
        before=neighbour(place - 1),
        after=neighbour(place),
    )


def read_proof(path: Path) -> Proof:
    """The proof of a file.

    Raises:
        RecordError: it holds none.
    """
    try:
        return Proof.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise RecordError(f"{path} holds no proof ({type(error).__name__})") from None


def check_proof(chain: Chain, proof: Proof, digest: bytes) -> None:
    """Checks a proof about the record with a digest.

    Raises:
        RecordError: it does not prove what it claims.
    """
    if proof.record != chain.record:
        raise RecordError(f"the proof is about record {proof.record}, and this is {chain.record}")
    said = _committed(chain, proof.split)
    size = int(said["records"])
    if proof.present:
        if proof.at is None:
            raise RecordError("the proof names no place of the record")
        entry = leaf(bytes.fromhex(proof.at.value) + digest)
        if _root(proof.at, entry, size) != said["root"]:
            raise RecordError("the proof does not show that this record is there")
        return
    if proof.tag_key is None:
        raise RecordError("the proof has no key of tags")
    tag_key = bytes.fromhex(proof.tag_key)
    if tag_key_digest(tag_key) != chain.start.body["tag_key_sha256"]:
        raise RecordError("the proof has another key of tags than the record")
    wanted = tag(tag_key, digest).hex()
    before, after = proof.before, proof.after
    first, last = -1 if before is None else before.index, size if after is None else after.index
    between = (before is None or before.value < wanted) and (after is None or wanted < after.value)
    if last != first + 1 or not between:
        raise RecordError("the proof does not show that this record is absent: it names no neighbours of it")
    for neighbour in (before, after):
        if neighbour is not None:
            entry = leaf(bytes.fromhex(neighbour.value))
            if _root(neighbour, entry, size) != said["sorted_root"]:
                raise RecordError("the proof does not show that this record is absent: a path is wrong")


def _root(place: Place, entry: bytes, size: int) -> str | None:
    try:
        return root_of_path(entry, place.index, size, [bytes.fromhex(x) for x in place.path]).hex()
    except ValueError:
        return None


def _committed(chain: Chain, split: str) -> dict[str, Any]:
    said: dict[str, Any] | None = chain.start.body["data"][split]
    if said is None:
        raise RecordError(f"the record commits to no {split} data")
    for entry in chain.of("resume"):
        data = entry.body["data"]
        if data is not None and (data[split] or {}).get("root") != said["root"]:
            raise RecordError(
                f"line {entry.sequence + 1} commits to other {split} data than line 1, and a proof is about "
                "the data of a whole run"
            )
    return said
