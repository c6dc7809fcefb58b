"""Messages of rows without protobuf's copies are the ones that protobuf writes and reads."""

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from blindtune.proto import worker_pb2
from blindtune.proto.rows import REQUEST_ROWS, RESPONSE_ROWS, RowsField

Request, Response = worker_pb2.MultiplyRequest, worker_pb2.MultiplyResponse
EACH_FIELD = pytest.mark.parametrize(
    ("field", "kind"), [(REQUEST_ROWS, Request), (RESPONSE_ROWS, Response)], ids=["request", "response"]
)


@EACH_FIELD
@pytest.mark.parametrize("words", [1, 31, 32, 4095, 4096, 1 << 18])
def test_rows_are_written_as_protobuf_writes_them(
    field: RowsField, kind: type[Request | Response], words: int
) -> None:
    rows = np.arange(words, dtype=np.uint32).reshape(1, words)
    message = field.message(rows)
    assert message == kind(residues=rows.tobytes()).SerializeToString()
    read = field.rows(message)
    assert read is not None and read.tobytes() == rows.tobytes()


@EACH_FIELD
@given(data=st.binary(max_size=40), cut=st.integers(0, 6), tail=st.binary(max_size=6))
@example(data=b"", cut=0, tail=b"")
def test_what_is_read_without_protobuf_is_what_protobuf_reads(
    field: RowsField, kind: type[Request | Response], data: bytes, cut: int, tail: bytes
) -> None:
    whole = kind(residues=data).SerializeToString()
    tag = whole[:1] or b"\x0a"
    for message in (data, whole, whole[: len(whole) - cut] + tail, whole + whole, tag + data, tag + tail):
        read = field.rows(message)
        if read is None:
            continue
        try:
            parsed = kind.FromString(message)
        except DecodeError:
            pytest.fail(f"{message!r} is no message")
        assert parsed.residues == read.tobytes()


@EACH_FIELD
def test_other_ways_to_say_the_same_are_left_to_protobuf(
    field: RowsField, kind: type[Request | Response]
) -> None:
    once = kind(residues=b"abcd").SerializeToString()
    # The field twice, a field that nobody knows behind it, and a length with idle bytes.
    for message in (once + once, once + b"\x7a\x01x", once[:1] + b"\x84\x80\x80\x80\x00" + b"abcd"):
        assert field.rows(message) is None
        assert kind.FromString(message).residues == b"abcd"
