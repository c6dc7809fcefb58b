"""Whatever is done to a record, its verification says what and where."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support.crashes import CrashRecorder
from support.training_records import END, FINISH, RECORD, checkpoint, start, written

from blindtune.client.record.canonical import canonical
from blindtune.client.record.chain import Chain, read_chain
from blindtune.client.record.commitment import Salt
from blindtune.client.record.entry import DOMAIN, Entry
from blindtune.client.record.keys import RecordKey, VerificationKey
from blindtune.client.record.log import RecordLog
from blindtune.client.record.verify import check_head
from blindtune.errors import ConfigurationError, RecordError

ROOT = Path(__file__).parents[3]
OTHER = "cd" * 16


@pytest.fixture
def key(tmp_path: Path) -> RecordKey:
    return RecordKey.obtained(tmp_path / "key" / "record.key")


@pytest.fixture
def foreign(tmp_path: Path) -> RecordKey:
    return RecordKey.obtained(tmp_path / "foreign" / "record.key")


@pytest.fixture
def salt() -> Salt:
    return Salt.drawn()


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def changed(line: bytes, change: Callable[[dict], None]) -> bytes:
    fields = json.loads(line)
    change(fields)
    return canonical(fields) + b"\n"


def signed_again(line: bytes, key: RecordKey, change: Callable[[dict], None]) -> bytes:
    """An entry that was altered, and signed by whoever holds a key."""
    fields = json.loads(line)
    del fields["signature"]
    change(fields)
    fields["signature"] = key.sign(DOMAIN + canonical(fields)).hex()
    return canonical(fields) + b"\n"


def test_a_record_that_nobody_changed_verifies(tmp_path: Path, key: RecordKey, salt: Salt) -> None:
    path = written(tmp_path, key, salt)
    chain = read_chain(path, VerificationKey.read(tmp_path / "key" / "record.pub"))
    assert [x.kind for x in chain.entries] == ["start", *["checkpoint"] * 4, "finish"]
    assert chain.complete and chain.record == RECORD
    assert chain.head == hashlib.sha256(lines(path)[-1].rstrip(b"\n")).hexdigest()
    assert path.stat().st_mode & 0o077 == 0


def test_an_entry_that_was_added_survives_any_crash(tmp_path: Path, key: RecordKey) -> None:
    """The first one too, whose file has to get its name."""
    folder = tmp_path / "run"
    folder.mkdir()
    with CrashRecorder(folder) as disk:
        log = RecordLog(folder / "record.jsonl", key, RECORD, None)
        for step in range(3):
            log.append("checkpoint", checkpoint(step))
            disk.promise(step)
    for crash in disk:
        content = crash.tree.get("record.jsonl", b"")
        assert isinstance(content, bytes) and content.count(b"\n") >= len(crash.promised), crash


@pytest.mark.parametrize("tampered", [False, True])
def test_the_program_of_the_documentation_verifies_without_any_code_of_ours(
    tampered: bool, tmp_path: Path, key: RecordKey, salt: Salt
) -> None:
    content = written(tmp_path, key, salt).read_bytes()
    (tmp_path / "record.jsonl").write_bytes(
        content.replace(b'"step":2', b'"step":3') if tampered else content
    )
    (tmp_path / "record.pub").write_bytes(key.verification.pem)
    page = (ROOT / "docs" / "record.md").read_text(encoding="utf-8")
    program = page.split("```python\n")[1].split("```")[0]
    assert "blindtune." not in program
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    if tampered:
        assert ended.returncode != 0 and "InvalidSignature" in ended.stderr
        return
    head = read_chain(tmp_path / "record.jsonl", key.verification).head
    assert (ended.returncode, ended.stdout) == (0, f"head {head} finished\n"), ended.stderr


def _swap(x: list[bytes]) -> list[bytes]:
    return [*x[:2], x[3], x[2], *x[4:]]


TAMPERING: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "altered body": (
        lambda x: [*x[:2], changed(x[2], lambda f: f["body"].update(step=9)), *x[3:]],
        "line 3: the signature does not fit: the entry was altered",
    ),
    "altered time": (
        lambda x: [*x[:2], changed(x[2], lambda f: f.update(time="2020-01-01T00:00:00Z")), *x[3:]],
        "line 3: the signature does not fit",
    ),
    "altered kind": (
        lambda x: [*x[:-1], changed(x[-1], lambda f: f.update(kind="interrupted", body=END))],
        "line 6: the signature does not fit",
    ),
    "altered signature": (
        lambda x: [x[0], changed(x[1], lambda f: f.update(signature="0" * 128)), *x[2:]],
        "line 2: the signature does not fit",
    ),
    "removed": (lambda x: [*x[:2], *x[3:]], "line 3: this is entry 3, and entry 2 lacks before it"),
    "several removed": (lambda x: [x[0], *x[3:]], "line 2: this is entry 3, and entries 1 to 2 lack"),
    "first removed": (lambda x: x[1:], "line 1: this is entry 1, and entry 0 lacks before it"),
    "reordered": (_swap, "line 3: this is entry 3, and entry 2 lacks before it"),
    "duplicated": (
        lambda x: [*x[:3], x[2], *x[3:]],
        "line 4: this is entry 2, which repeats line 3; entry 3 belongs here",
    ),
    "finish moved up": (lambda x: [*x[:4], x[5], x[4]], "line 5: this is entry 5, and entry 4 lacks"),
    "cut off in an entry": (
        lambda x: [*x[:-1], x[-1][:40]],
        "line 6: the entry is incomplete: the run was cut off",
    ),
    "last line feed removed": (lambda x: [*x[:-1], x[-1][:-1]], "line 6: the entry is incomplete"),
    "spaces added": (
        lambda x: [x[0].replace(b'":', b'": ', 1), *x[1:]],
        "line 1: this is no entry: not in canonical form",
    ),
    "another order of fields": (
        lambda x: [json.dumps(dict(reversed(json.loads(x[0]).items()))).encode() + b"\n", *x[1:]],
        "line 1: this is no entry: not in canonical form",
    ),
    "a field twice": (
        lambda x: [x[0].replace(b'{"body"', b'{"body":{},"body"', 1), *x[1:]],
        "line 1: this is no entry: not in canonical form",
    ),
    "a field more": (
        lambda x: [changed(x[0], lambda f: f.update(more=1)), *x[1:]],
        "line 1: this is no entry: it has other fields",
    ),
    "carriage returns": (lambda x: [y[:-1] + b"\r\n" for y in x], "line 1: this is no entry"),
    "an empty line": (lambda x: [*x[:2], b"\n", *x[2:]], "line 3: this is no entry: no JSON"),
    "no JSON": (lambda x: [*x[:2], b"\xff\xfe{\n", *x[2:]], "line 3: this is no entry: no JSON"),
    "nested too deeply": (lambda x: [b"[" * 50000 + b"]" * 50000 + b"\n"], "line 1: this is no entry"),
    "a number with a fraction": (
        lambda x: [x[0].replace(b'"sequence":0', b'"sequence":0.5'), *x[1:]],
        "line 1: this is no entry: no canonical form for a float",
    ),
    "another version": (
        lambda x: [changed(x[0], lambda f: f.update(version=2)), *x[1:]],
        "line 1: this is no entry of version 1",
    ),
    "nothing left": (lambda x: [], "holds no entry"),
}


@pytest.mark.parametrize("case", TAMPERING)
def test_tampering_is_refused_with_the_line_and_the_reason(
    case: str, tmp_path: Path, key: RecordKey, salt: Salt
) -> None:
    path = written(tmp_path, key, salt)
    change, words = TAMPERING[case]
    path.write_bytes(b"".join(change(lines(path))))
    with pytest.raises(RecordError) as refused:
        read_chain(path, key.verification)
    assert words in str(refused.value)


def test_an_entry_of_another_record_by_the_same_key_is_refused(
    tmp_path: Path, key: RecordKey, salt: Salt
) -> None:
    path, other = written(tmp_path, key, salt), written(tmp_path, key, salt, record=OTHER)
    path.write_bytes(b"".join([*lines(path)[:2], lines(other)[2], *lines(path)[3:]]))
    with pytest.raises(RecordError, match=f"line 3: the entry is of another record, {OTHER}"):
        read_chain(path, key.verification)


def test_an_entry_that_its_signer_exchanged_later_is_refused(
    tmp_path: Path, key: RecordKey, salt: Salt
) -> None:
    """Even the client can't change one entry alone: all that follow would have to be signed again."""
    path = written(tmp_path, key, salt)
    before = lines(path)
    other = signed_again(before[2], key, lambda f: f["body"].update(step=8))
    path.write_bytes(b"".join([*before[:2], other, *before[3:]]))
    with pytest.raises(RecordError, match="line 4: the entry does not follow the line before"):
        read_chain(path, key.verification)


def test_a_chain_of_someone_elses_key_is_refused(
    tmp_path: Path, key: RecordKey, foreign: RecordKey, salt: Salt
) -> None:
    path = written(tmp_path, foreign, salt)
    with pytest.raises(RecordError, match=f"line 1: it was signed with key {foreign.verification.id}"):
        read_chain(path, key.verification)


def test_a_forged_entry_that_names_the_right_key_is_refused(
    tmp_path: Path, key: RecordKey, foreign: RecordKey, salt: Salt
) -> None:
    path = written(tmp_path, key, salt)
    before = lines(path)
    forged = signed_again(before[-1], foreign, lambda f: f["body"].update(lies=0, steps=1))
    path.write_bytes(b"".join([*before[:-1], forged]))
    with pytest.raises(RecordError, match="line 6: the signature does not fit"):
        read_chain(path, key.verification)


def test_a_signature_without_the_domain_is_refused(tmp_path: Path, key: RecordKey, salt: Salt) -> None:
    path = written(tmp_path, key, salt)
    before = lines(path)
    fields = json.loads(before[-1])
    del fields["signature"]
    fields["signature"] = key.sign(canonical(fields)).hex()
    path.write_bytes(b"".join([*before[:-1], canonical(fields) + b"\n"]))
    with pytest.raises(RecordError, match="line 6: the signature does not fit"):
        read_chain(path, key.verification)


@pytest.mark.parametrize("kind", ["start", "checkpoint", "finish", "failed"])
def test_only_resume_comes_after_finish(kind: str, tmp_path: Path, key: RecordKey, salt: Salt) -> None:
    path = written(tmp_path, key, salt)
    log, _, _ = RecordLog.reopened(path, key)
    log.append(
        kind, {"start": start(salt), "checkpoint": checkpoint(5), "finish": FINISH, "failed": END}[kind]
    )
    with pytest.raises(RecordError, match="line 7: (after finish comes resume|a record begins)"):
        read_chain(path, key.verification)


def test_an_entry_that_lacks_what_its_kind_says_is_refused(
    tmp_path: Path, key: RecordKey, salt: Salt
) -> None:
    path = written(tmp_path, key, salt, finished=False)
    log, _, _ = RecordLog.reopened(path, key)
    log.append("finish", {"steps": 4, "verified_responses": 1, "lies": 0})
    with pytest.raises(RecordError, match="line 6: the field adapter of the entry finish is missing"):
        read_chain(path, key.verification)


def test_truncation_at_an_entry_shows_by_the_head_alone(tmp_path: Path, key: RecordKey, salt: Salt) -> None:
    path = written(tmp_path, key, salt)
    whole = read_chain(path, key.verification)
    path.write_bytes(b"".join(lines(path)[:-2]))
    shorter = read_chain(path, key.verification)
    assert not shorter.complete
    with pytest.raises(RecordError, match="entries lack at the end"):
        check_head(shorter, whole.head, "--head")
    check_head(whole, whole.head, "--head")
    with pytest.raises(RecordError, match="is the hash of line 4, and 6 lines are here"):
        check_head(whole, shorter.head, "--head")


def test_a_torn_entry_is_taken_out_when_the_record_goes_on(
    tmp_path: Path, key: RecordKey, salt: Salt
) -> None:
    path = written(tmp_path, key, salt, finished=False)
    whole, torn = path.read_bytes(), b'{"body":{"step":5'
    path.write_bytes(whole + torn)
    log, chain, found = RecordLog.reopened(path, key)
    assert found is not None
    assert (found.size, found.sha256) == (len(torn), hashlib.sha256(torn).hexdigest())
    assert path.read_bytes() == whole and len(chain.entries) == 5
    log.append("finish", FINISH)
    assert read_chain(path, key.verification).complete


def test_nothing_of_a_broken_record_is_touched_when_it_should_go_on(
    tmp_path: Path, key: RecordKey, salt: Salt
) -> None:
    path = written(tmp_path, key, salt)
    broken = path.read_bytes().replace(b'"step":2', b'"step":3') + b"torn"
    path.write_bytes(broken)
    with pytest.raises(RecordError, match="line 3: the signature"):
        RecordLog.reopened(path, key)
    assert path.read_bytes() == broken


def test_an_entry_that_the_disk_does_not_take_leaves_the_record_as_it_was(
    tmp_path: Path, key: RecordKey, salt: Salt, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, key, salt, finished=False)
    before = path.read_bytes()
    log, _, _ = RecordLog.reopened(path, key)

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(Exception, match="is full"):
            log.append("finish", FINISH)
    assert path.read_bytes() == before
    log.append("finish", FINISH)
    assert read_chain(path, key.verification).complete


def test_a_clock_that_goes_back_is_noted(tmp_path: Path, key: RecordKey, salt: Salt) -> None:
    from blindtune.client.record.verify import gaps

    one = Entry.signed(key, RECORD, None, "start", start(salt), datetime(2026, 1, 2, tzinfo=UTC))
    two = Entry.signed(key, RECORD, one, "failed", END, datetime(2026, 1, 1, tzinfo=UTC))
    assert gaps(Chain([one, two])) == ["line 2: the client's clock went back"]


def test_a_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.key"
    one, other = RecordKey.obtained(path), RecordKey.obtained(path)
    assert one.verification.id == other.verification.id
    assert path.stat().st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o077 == 0
    assert VerificationKey.read(path.with_suffix(".pub")).id == one.verification.id


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.key"
    RecordKey.obtained(path)
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="can be read by others"):
        RecordKey.obtained(path)


def test_what_is_no_key_is_refused_and_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "record.key"
    path.write_text("SECRETSECRET")
    path.chmod(0o600)
    for read in (RecordKey.obtained, VerificationKey.read):
        with pytest.raises(ConfigurationError) as refused:
            read(path)
        assert "SECRETSECRET" not in str(refused.value)
    private = tmp_path / "new.key"
    RecordKey.obtained(private)
    with pytest.raises(ConfigurationError, match="holds no public key"):
        VerificationKey.read(private)
