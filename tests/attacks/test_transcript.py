"""What a worker writes down is read back exactly, and nothing damaged is read at all."""

import contextlib
import gc
import json
import logging
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from support import full_recording
from support.transcripts import write_transcript

from blindtune.client.audit.transcript import Operand, Transcript, read_transcript
from blindtune.errors import ConfigurationError, DataError
from blindtune.proto import PROTOCOL_VERSION, worker_pb2, worker_pb2_grpc
from blindtune.protocol.expansion import Seed
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Direction, Product, Span
from blindtune.protocol.weights import IntegerLayer
from blindtune.server.admission.refusals import CannotRecord
from blindtune.server.daemon import serve
from blindtune.server.store import LayerStore
from blindtune.server.transcript import TranscriptRecorder, recording_folder
from blindtune.server.transport import Endpoint
from blindtune.server.wire import Request

FORWARD = Product(Direction.FORWARD, (Span("query", 0, 8), Span("key", 0, 8)))
BACKWARD = Product(Direction.BACKWARD, (Span("query", 0, 5), Span("value", 2, 9)))


def _rows(product: Product, rows: int, seed: int = 0) -> Operand:
    words = np.random.default_rng(seed).integers(0, Q31.modulus, (rows, product.contraction), np.uint32)
    return Operand(product, rows, product.contraction, Q31, words)


def _seed(product: Product, rows: int) -> Operand:
    return Operand(product, rows, product.contraction, Q31, seed=Seed(bytes(range(32)), Q31, 7))


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
    with pytest.raises(ConfigurationError, match="cannot record to .*: File exists"):
        TranscriptRecorder(folder, "", "")


def test_a_folder_that_is_refused_stays_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o2775)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="it is not empty"):
        recording_folder(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o2775


def test_requests_that_arrive_at_the_same_time_are_kept_apart(tmp_path: Path) -> None:
    operands = [_rows(FORWARD, 40, seed) for seed in range(6)]
    recorder = TranscriptRecorder(recording_folder(tmp_path / "t"), "", "")
    barrier = threading.Barrier(len(operands))

    def send(operand: Operand) -> None:
        request = Request(operand.product, operand.rows, operand.columns, 8, Q31, None)
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
    recorder.operand(Request(FORWARD, 5, 8, 8, Q31, None), operand.words()[:2])
    recorder.close()
    (found,) = read_transcript(tmp_path / "t").operands
    assert np.array_equal(found.words(), operand.words()[:2])


NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def _can_mount() -> bool:
    try:
        command = [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not _can_mount(), reason="file systems can't be mounted here")
def test_a_disk_that_fills_up_at_any_point_leaves_what_came_before(tmp_path: Path) -> None:
    command = [*NAMESPACE, sys.executable, full_recording.__file__, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    *full, fits = [json.loads(line) for line in ended.stdout.splitlines()]
    assert all(fits["taken"])
    assert len(full) > 10
    for outcome in full:
        taken = outcome["taken"]
        assert taken == sorted(taken, reverse=True), "nothing is recorded after something was not"
        assert outcome["found"] == sum(taken) < len(taken)
        assert outcome["exact"]


@contextlib.contextmanager
def _no_file_longer_than(size: int) -> Iterator[None]:
    """Writes up to there succeed in part, and then fail, as on a disk without room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_after_a_part_that_was_not_written_all_requests_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    operand = _rows(FORWARD, 200)
    recorder = TranscriptRecorder(recording_folder(tmp_path / "t"), "", "")
    request = Request(FORWARD, 200, 8, 8, Q31, None)
    recorder.operand(request, operand.words()[:100])
    with _no_file_longer_than(4000), pytest.raises(CannotRecord) as refused:
        recorder.operand(request, operand.words()[100:])
    assert str(tmp_path) not in str(refused.value)
    assert (tmp_path / "t" / "operands.bin").stat().st_size == 3200
    # There is room again: what came in between is missing all the same.
    for later in (request, Request(FORWARD, 200, 8, 8, Q31, None)):
        with pytest.raises(CannotRecord):
            recorder.operand(later, operand.words()[100:])
    recorder.close()
    (found,) = read_transcript(tmp_path / "t").operands
    assert np.array_equal(found.words(), operand.words()[:100])
    (line,) = [x for x in caplog.records if x.levelno >= logging.WARNING]
    assert line.message == "recording has ended, and all requests are refused from now on"
    assert line.__dict__["reason"] == "File too large"


def test_a_closed_recording_takes_nothing(tmp_path: Path) -> None:
    recorder = TranscriptRecorder(recording_folder(tmp_path / "t"), "", "")
    recorder.close()
    with pytest.raises(CannotRecord):
        recorder.operand(Request(FORWARD, 5, 8, 8, Q31, None), _rows(FORWARD, 5).words())
    recorder.close()


def test_a_disk_that_is_full_at_the_start_is_one_clear_error(tmp_path: Path) -> None:
    folder = recording_folder(tmp_path / "t")
    with _no_file_longer_than(10), pytest.raises(ConfigurationError, match="cannot record to .*too large"):
        TranscriptRecorder(folder, "", "")


def test_a_client_is_sent_to_another_worker_when_this_one_cannot_record(tmp_path: Path) -> None:
    weights = torch.ones((8, 8), dtype=torch.int8)
    layer = IntegerLayer(weights, np.ones(8, np.float32))
    store = LayerStore.from_layers([("query", layer)], model="tiny")
    recorder = TranscriptRecorder(recording_folder(tmp_path / "t"), store.model, store.fingerprint)
    worker = serve(store, Endpoint.parse("127.0.0.1:0", insecure=True), observer=recorder)
    header = worker_pb2.MultiplyHeader(
        protocol_version=PROTOCOL_VERSION,
        fingerprint=store.fingerprint,
        parameter_set=Q31.name,
        product=worker_pb2.Product(
            direction=worker_pb2.FORWARD,
            spans=[worker_pb2.Span(layer="query", start=0, stop=8)],
        ),
        rows=100,
        columns=8,
    )
    rows = np.ones((100, 8), "<u4").tobytes()
    messages = [worker_pb2.MultiplyRequest(header=header), worker_pb2.MultiplyRequest(residues=rows)]
    with contextlib.ExitStack() as ending:
        ending.callback(recorder.close)
        ending.callback(worker.stop, drain_seconds=0)
        channel = ending.enter_context(grpc.insecure_channel(worker.address))
        stub = worker_pb2_grpc.WorkerStub(channel)
        assert list(stub.Multiply(iter(messages), timeout=60))
        with _no_file_longer_than(4000), pytest.raises(grpc.RpcError) as refused:
            list(stub.Multiply(iter(messages), timeout=60))
        with pytest.raises(grpc.RpcError) as again:
            list(stub.Multiply(iter(messages), timeout=60))
    for error in (refused, again):
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert error.value.details().startswith("this worker cannot record")
    assert len(read_transcript(tmp_path / "t").operands) == 1


def test_requests_of_clients_that_left_are_forgotten(tmp_path: Path) -> None:
    words = _rows(FORWARD, 5).words()
    recorder = TranscriptRecorder(recording_folder(tmp_path / "t"), "", "")
    for _ in range(50):
        recorder.operand(Request(FORWARD, 5, 8, 8, Q31, None), words[:2])
    gc.collect()
    assert not recorder._begun
    # Equal headers, one after the other, are two requests even where the second gets the first's address.
    recorder.close()
    found = read_transcript(tmp_path / "t").operands
    assert [len(x.words()) for x in found] == [2] * 50


def test_hints_are_told_from_the_operands_of_a_training(operands: list[Operand]) -> None:
    hints = [
        Operand(FORWARD, 256, FORWARD.contraction, Q31, seed=Seed(bytes(32), Q31, 256 * block))
        for block in range(5)
    ]
    rows = [x for x in operands if x.seed is None]
    assert len(rows) == 2
    assert Transcript.of_training(Transcript([*hints, *rows])).operands == rows
    # Seeds that are shares stay: of a worker that gets nothing else, and beside rows, where they must not be.
    shares = [_seed(FORWARD, 3)]
    assert Transcript.of_training(Transcript(shares)).operands == shares
    assert Transcript.of_training(Transcript([*shares, *rows])).operands == [*shares, *rows]


def test_colluding_operators_see_the_operand(operands: list[Operand]) -> None:
    mask = [Operand(x.product, x.rows, x.columns, Q31, seed=Seed(bytes(32), Q31)) for x in operands]
    sums = [
        (x.words().astype(np.int64) + y.words()) % Q31.modulus for x, y in zip(operands, mask, strict=True)
    ]
    sent = [
        Operand(x.product, x.rows, x.columns, Q31, y.astype(np.uint32))
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
        (_edit("transcript.json", lambda x: x.replace(b'"version": 2', b'"version": 1')), "version: Input"),
        (_edit("parts.jsonl", lambda x: x.replace(b'"q31"', b'"q30"')), "there is no parameter set q30"),
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
    words = np.full((2, 8), Q31.modulus, np.uint32)
    folder = write_transcript(tmp_path / "t", [Operand(FORWARD, 2, 8, Q31, words)])
    with pytest.raises(DataError, match="request 0 holds a word that is no residue"):
        read_transcript(folder)


def test_neither_keys_nor_words_are_shown(operands: list[Operand]) -> None:
    assert "\\x01" not in repr(operands[1])
    assert str(operands[0].words()[0, 0]) not in repr(operands[0])
