"""What a worker writes down is read back exactly, and nothing damaged is read at all."""

import json
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.transcripts import write_transcript

from blindtune.client.audit.transcript import Operand, Transcript, read_transcript
from blindtune.protocol.errors import ConfigurationError, DataError
from blindtune.protocol.expansion import Seed
from blindtune.protocol.parameters import MODULUS
from blindtune.protocol.products import Direction, Product, Span
from blindtune.server.record import TranscriptRecorder, recording_folder
from blindtune.server.wire import Request

FORWARD = Product(Direction.FORWARD, (Span("query", 0, 8), Span("key", 0, 8)))
BACKWARD = Product(Direction.BACKWARD, (Span("query", 0, 5), Span("value", 2, 9)))


def _rows(product: Product, rows: int, seed: int = 0) -> Operand:
    words = np.random.default_rng(seed).integers(0, MODULUS, (rows, product.contraction), np.uint32)
    return Operand(product, rows, product.contraction, words)


def _seed(product: Product, rows: int) -> Operand:
    return Operand(product, rows, product.contraction, seed=Seed(bytes(range(32)), 7))


@pytest.fixture
def operands() -> list[Operand]:
    return [_rows(FORWARD, 5), _seed(FORWARD, 6), _rows(BACKWARD, 4, seed=1)]


def _same(one: Operand, other: Operand) -> bool:
    return (one.product, one.rows, one.columns, one.seed) == (
        other.product,
        other.rows,
        other.columns,
        other.seed,
    ) and np.array_equal(one.words(), other.words())


@pytest.mark.parametrize("block", [1, 2, 100])
def test_operands_come_back_as_they_were(tmp_path: Path, operands: list[Operand], block: int) -> None:
    found = read_transcript(write_transcript(tmp_path / "t", operands, "f" * 64, block))
    assert found.fingerprint == "f" * 64
    assert len(found.operands) == len(operands)
    assert all(_same(x, y) for x, y in zip(found.operands, operands, strict=True))


def test_a_transcript_without_operands_is_empty(tmp_path: Path) -> None:
    assert read_transcript(write_transcript(tmp_path / "t", [])).operands == []


def test_only_the_owner_can_read_a_recording(tmp_path: Path, operands: list[Operand]) -> None:
    (tmp_path / "t").mkdir(mode=0o755)
    folder = write_transcript(tmp_path / "t", operands)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(x.stat().st_mode) for x in folder.iterdir()} == {0o600}


def test_a_recording_is_never_written_over(tmp_path: Path, operands: list[Operand]) -> None:
    folder = write_transcript(tmp_path / "t", operands)
    with pytest.raises(ConfigurationError, match="it is not empty"):
        recording_folder(folder)
    with pytest.raises(ConfigurationError, match="cannot record to"):
        recording_folder(folder / "parts.jsonl")
    with pytest.raises(FileExistsError):
        TranscriptRecorder(folder, "", "")


def test_requests_that_arrive_at_the_same_time_are_kept_apart(tmp_path: Path) -> None:
    operands = [_rows(FORWARD, 40, seed) for seed in range(6)]
    recorder = TranscriptRecorder(recording_folder(tmp_path / "t"), "", "")
    barrier = threading.Barrier(len(operands))

    def send(operand: Operand) -> None:
        request = Request(operand.product, operand.rows, operand.columns, 8, None)
        barrier.wait()
        for start in range(0, operand.rows, 4):
            recorder.operand(request, operand.words()[start : start + 4])

    threads = [threading.Thread(target=send, args=(x,)) for x in operands]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.close()
    found = {x.words().tobytes() for x in read_transcript(tmp_path / "t").operands}
    assert found == {x.words().tobytes() for x in operands}


def test_what_arrived_before_a_client_went_away_is_kept(tmp_path: Path) -> None:
    operand = _rows(FORWARD, 5)
    recorder = TranscriptRecorder(recording_folder(tmp_path / "t"), "", "")
    recorder.operand(Request(FORWARD, 5, 8, 8, None), operand.words()[:2])
    recorder.close()
    (found,) = read_transcript(tmp_path / "t").operands
    assert np.array_equal(found.words(), operand.words()[:2])


def test_hints_are_told_from_the_operands_of_a_training(operands: list[Operand]) -> None:
    training = Transcript.of_training(Transcript(operands))
    assert [x.seed for x in training.operands] == [None, None]
    shares = [_seed(FORWARD, 3)]
    assert Transcript.of_training(Transcript(shares)).operands == shares


def test_colluding_operators_see_the_operand(operands: list[Operand]) -> None:
    mask = [Operand(x.product, x.rows, x.columns, seed=Seed(bytes(32))) for x in operands]
    sums = [(x.words().astype(np.int64) + y.words()) % MODULUS for x, y in zip(operands, mask, strict=True)]
    sent = [
        Operand(x.product, x.rows, x.columns, y.astype(np.uint32))
        for x, y in zip(operands, sums, strict=True)
    ]
    both = Transcript(sent).combined_with(Transcript(mask))
    assert all(np.array_equal(x.words(), y.words()) for x, y in zip(both.operands, operands, strict=True))
    with pytest.raises(ValueError, match="not of the same run"):
        Transcript(sent).combined_with(Transcript(mask[:1]))


def _edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


def _line(number: int, **fields: object) -> Callable[[Path], None]:
    def change(content: bytes) -> bytes:
        lines = content.splitlines()
        lines[number] = json.dumps(json.loads(lines[number]) | fields).encode()
        return b"\n".join(lines) + b"\n"

    return _edit("parts.jsonl", change)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "transcript.json").unlink(), "is no transcript of a worker"),
        (lambda folder: (folder / "operands.bin").unlink(), "is no transcript of a worker"),
        (_edit("transcript.json", lambda x: x.replace(b'"version": 1', b'"version": 2')), "version: Input"),
        (_edit("transcript.json", lambda x: x.replace(b"2147389441", b"2147389443")), "modulus: Input"),
        (_edit("transcript.json", lambda x: b"[]"), "transcript.json: the line: Input"),
        (_edit("operands.bin", lambda x: x[:-1]), r"line 3: its bytes are not in .*operands.bin"),
        (_edit("operands.bin", lambda x: x + b"\0"), "has .* bytes, and parts.jsonl describes"),
        (_edit("operands.bin", lambda x: b"\1" + x[1:]), r"line 1: its bytes in .*, from 0, were changed"),
        (_edit("parts.jsonl", lambda x: x[:-9]), "line 3, is cut off"),
        (
            _edit("parts.jsonl", lambda x: b"\n".join(x.split(b"\n")[1:])),
            "line 1: it is part 1, and 0 is due",
        ),
        (_edit("parts.jsonl", lambda x: b"what\n" + x), "parts.jsonl, line 1: Expecting value"),
        (_line(0, direction="sideways"), "line 1: direction"),
        (_line(0, columns=9), "line 1: the spans have 8 columns and the operand 9"),
        (_line(0, bytes=4), "line 1: it describes 160 bytes and has 4"),
        (_line(0, first_row=1), "line 1: its rows end at 6 of 5"),
        (_line(0, rows=1 << 40), "line 1: an operand of .* is larger than any worker takes"),
        (_line(0, spans=[["query", 0, 8], ["query", 0, 8]]), "line 1: a forward product names a layer twice"),
        (_line(0, spans=[]), "line 1: spans"),
        (_line(0, extra=1), "line 1: extra"),
        (_line(0, rows="5"), "line 1: rows"),
        (_line(2, offset=0), "line 3: its bytes are not in"),
        (_line(2, request=0), "line 3: it does not go on with request 0"),
        (_line(0, crc32="nonsense"), "line 1: crc32"),
    ],
)
def test_damage_is_refused_and_named(
    tmp_path: Path, operands: list[Operand], damage: Callable[[Path], None], message: str
) -> None:
    folder = write_transcript(tmp_path / "t", operands)
    damage(folder)
    with pytest.raises(DataError, match=message):
        read_transcript(folder)


def test_a_word_that_is_no_residue_is_refused(tmp_path: Path) -> None:
    words = np.full((2, 8), MODULUS, np.uint32)
    folder = write_transcript(tmp_path / "t", [Operand(FORWARD, 2, 8, words)])
    with pytest.raises(DataError, match="request 0 holds a word that is no residue"):
        read_transcript(folder)


def test_neither_keys_nor_words_are_shown(operands: list[Operand]) -> None:
    assert "\\x01" not in repr(operands[1])
    assert str(operands[0].words()[0, 0]) not in repr(operands[0])
