"""The commitments to the data: trees as in RFC 6962, and proofs that hold for one record alone."""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.training_records import DIGESTS, RECORD, start

from blindtune.client.data.reading.records import Record, record_digest
from blindtune.client.record.chain import Chain
from blindtune.client.record.commitment import Salt, leaf, path_of, root_of, root_of_path
from blindtune.client.record.entry import Entry
from blindtune.client.record.keys import RecordKey
from blindtune.client.record.membership import Proof, check_proof, prove
from blindtune.client.record.verify import gaps
from blindtune.errors import ConfigurationError, RecordError


def recursive_root(entries: list[bytes]) -> bytes:
    """MTH as RFC 6962, section 2.1 defines it."""
    if not entries:
        return hashlib.sha256(b"").digest()
    if len(entries) == 1:
        return hashlib.sha256(b"\x00" + entries[0]).digest()
    split = 1 << ((len(entries) - 1).bit_length() - 1)
    halves = recursive_root(entries[:split]) + recursive_root(entries[split:])
    return hashlib.sha256(b"\x01" + halves).digest()


@given(st.lists(st.binary(max_size=40), max_size=40))
def test_the_tree_is_that_of_the_rfc(entries: list[bytes]) -> None:
    assert root_of([leaf(x) for x in entries]) == recursive_root(entries)


@given(st.lists(st.binary(max_size=8), min_size=1, max_size=40), st.data())
def test_a_path_leads_to_the_root_from_its_own_place_only(entries: list[bytes], data: st.DataObject) -> None:
    leaves = [leaf(x) for x in entries]
    index = data.draw(st.integers(0, len(leaves) - 1))
    path, size = path_of(leaves, index), len(leaves)
    root = root_of(leaves)
    assert root_of_path(leaves[index], index, size, path) == root
    assert root_of_path(leaf(b"another entry"), index, size, path) != root
    for wrong in (path[:-1], [*path, leaves[0]]):
        if len(wrong) != len(path):
            with pytest.raises(ValueError):
                root_of_path(leaves[index], index, size, wrong)


def test_the_same_records_have_other_commitments_in_another_record_split_or_place() -> None:
    one, other = Salt.drawn(), Salt.drawn()
    digest = DIGESTS[0]
    roots = {one.split("train", [digest]).root, one.split("validation", [digest]).root}
    roots |= {other.split("train", [digest]).root}
    assert len(roots) == 3
    assert len(set(one.leaves("train", [digest, digest]))) == 2, "equal records must not show"


def test_the_order_changes_one_root_and_a_record_changes_both() -> None:
    salt = Salt.drawn()
    one, turned = salt.split("train", DIGESTS), salt.split("train", DIGESTS[::-1])
    assert one.root != turned.root and one.sorted_root == turned.sorted_root
    other = salt.split("train", [*DIGESTS[:-1], b"x" * 32])
    assert one.root != other.root and one.sorted_root != other.sorted_root


def test_a_salt_is_for_its_owner_alone_and_does_not_show(tmp_path: Path) -> None:
    salt = Salt.drawn()
    path = tmp_path / "salts" / "x.salt"
    salt.write(path)
    assert path.stat().st_mode & 0o077 == 0
    assert Salt.read(path).digest == salt.digest
    assert path.read_text().strip() not in f"{salt!r}{salt.digest}{start(salt)}"
    path.write_text("SECRET")
    with pytest.raises(ConfigurationError) as refused:
        Salt.read(path)
    assert "SECRET" not in str(refused.value)


def test_a_record_counts_by_what_it_says_and_not_by_its_layout() -> None:
    one = record_digest(Record({"a": 1, "b": "é"}, "x.jsonl, line 1"))
    assert one == record_digest(Record({"b": "é", "a": 1}, "y.jsonl, line 9"))
    assert one == hashlib.sha256('{"a":1,"b":"é"}'.encode()).digest()
    assert one != record_digest(Record({"a": 1, "b": "e"}, "x.jsonl, line 1"))


@pytest.fixture
def salt() -> Salt:
    return Salt.drawn()


@pytest.fixture
def chain(salt: Salt, tmp_path: Path) -> Chain:
    key = RecordKey.obtained(tmp_path / "record.key")
    return Chain([Entry.signed(key, RECORD, None, "start", start(salt))])


@pytest.mark.parametrize("index", range(len(DIGESTS)))
def test_a_record_that_is_there_is_proved_to_be(index: int, chain: Chain, salt: Salt) -> None:
    proof = prove(chain, salt, "train", DIGESTS, DIGESTS[index])
    assert proof.present
    check_proof(chain, proof, DIGESTS[index])
    with pytest.raises(RecordError, match="does not show that this record is there"):
        check_proof(chain, proof, DIGESTS[index - 1])


@pytest.mark.parametrize("wanted", [bytes([i]) * 32 for i in range(100, 120)])
def test_a_record_that_is_not_there_is_proved_not_to_be(wanted: bytes, chain: Chain, salt: Salt) -> None:
    proof = prove(chain, salt, "train", DIGESTS, wanted)
    assert not proof.present
    check_proof(chain, proof, wanted)
    for there in DIGESTS:
        with pytest.raises(RecordError, match="no neighbours"):
            check_proof(chain, proof, there)


def test_a_forged_proof_of_absence_is_refused(chain: Chain, salt: Salt) -> None:
    absent = bytes([100]) * 32
    honest = prove(chain, salt, "train", DIGESTS, absent)
    with pytest.raises(RecordError, match="another key of tags"):
        check_proof(chain, honest.model_copy(update={"tag_key": "0" * 64}), absent)
    ends = honest.model_copy(update={"before": None, "after": None})
    with pytest.raises(RecordError, match="no neighbours"):
        check_proof(chain, ends, absent)
    neighbour = honest.before or honest.after
    assert neighbour is not None
    moved = neighbour.model_copy(update={"path": ["0" * 64, *neighbour.path[1:]]})
    name = "before" if honest.before else "after"
    with pytest.raises(RecordError, match="a path is wrong"):
        check_proof(chain, honest.model_copy(update={name: moved}), absent)
    other = honest.model_copy(update={"record": "0" * 32})
    with pytest.raises(RecordError, match="is about record"):
        check_proof(chain, other, absent)


def test_a_run_that_went_on_with_other_data_or_another_model_shows_and_proves_nothing(
    chain: Chain, salt: Salt, tmp_path: Path
) -> None:
    key = RecordKey.obtained(tmp_path / "record.key")
    absent = bytes([100]) * 32
    proofs = [(prove(chain, salt, "train", DIGESTS, x), x) for x in (absent, DIGESTS[0])]

    def resumed(digests: list[bytes], fingerprint: str) -> Chain:
        body = {"checkpoint": None, "configuration": None, "torn": None, "fingerprint": fingerprint}
        body["data"] = {"train": vars(salt.split("train", digests)), "validation": None}
        return Chain([chain.start, Entry.signed(key, RECORD, chain.start, "resume", body)])

    same = resumed(DIGESTS, "f" * 64)
    assert gaps(same) == []
    other = resumed([*DIGESTS[1:], absent], "e" * 64)
    assert gaps(other) == [
        "line 2: the run went on with another model",
        "line 2: the run went on with other data",
    ]
    for proof, digest in proofs:
        check_proof(same, proof, digest)
        with pytest.raises(RecordError, match="line 2 commits to other train data"):
            check_proof(other, proof, digest)


def test_a_proof_survives_its_file(chain: Chain, salt: Salt) -> None:
    proof = prove(chain, salt, "train", DIGESTS, DIGESTS[2])
    assert Proof.model_validate_json(proof.model_dump_json(exclude_none=True)) == proof


def test_nothing_is_proved_with_another_salt_or_other_records(chain: Chain, salt: Salt) -> None:
    with pytest.raises(RecordError, match="the salt is not that of record"):
        prove(chain, Salt.drawn(), "train", DIGESTS, DIGESTS[0])
    with pytest.raises(RecordError, match="these are not the records"):
        prove(chain, salt, "train", DIGESTS[1:], DIGESTS[0])
    with pytest.raises(RecordError, match="no validation data"):
        prove(chain, salt, "validation", DIGESTS, DIGESTS[0])
