"""The generator: rejection by a ChaCha20 written out in integers, seeking, sub-keys."""

import hashlib
import hmac
from typing import Any

import numpy as np
import pytest
from chacha20_reference import COUNTING_KEY, PUBLISHED, ZERO_KEY, chacha20_block, library_stream
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from hypothesis import given, settings
from hypothesis import strategies as st

from blindtune.protocol.expansion import KEY_BYTES, Seed, derive_key, expand, expand_into
from blindtune.protocol.parameters import Q24, Q31

WORD = 0x7FFFFFFF


def stream_words(key: bytes, row: int, stream: int, block: int) -> list[int]:
    """Words 16 * block ... 16 * block + 15 of a stream of a row, top bits cleared."""
    nonce = stream.to_bytes(4, "little") + row.to_bytes(8, "little")
    return [word & WORD for word in chacha20_block(key, block, nonce)]


def streams_until_accepted(key: bytes, row: int, column: int) -> list[int]:
    """The words that the definition draws for one element: the last is the element."""
    words: list[int] = []
    while not words or words[-1] >= Q31.modulus:
        words.append(stream_words(key, row, len(words), column // 16)[column % 16])
    return words


def expand_by_definition(key: bytes, row: int, columns: int) -> list[int]:
    first = [w for block in range(-(-columns // 16)) for w in stream_words(key, row, 0, block)][:columns]
    return [
        word if word < Q31.modulus else streams_until_accepted(key, row, i)[-1]
        for i, word in enumerate(first)
    ]


def test_rows_are_expanded_where_they_lie_and_nothing_beside_them_is_touched() -> None:
    whole = np.full((5, 300), 7, np.uint32)
    expand_into(whole[1:4], COUNTING_KEY, 1 << 40, Q31)
    assert np.array_equal(whole[1:4], expand(COUNTING_KEY, 1 << 40, 3, 300, Q31))
    assert np.all(whole[[0, 4]] == 7)


@pytest.mark.parametrize("vector", [v for v in PUBLISHED if v[0] != "2.3.2"], ids=lambda v: v[0])
def test_expand_gives_the_keystream_of_rfc_8439(vector: tuple[str, bytes, int, str, str]) -> None:
    _, key, counter, nonce, keystream = vector
    expected = np.frombuffer(bytes.fromhex(keystream), "<u4") & WORD
    assert np.all(expected < Q31.modulus)
    row = int.from_bytes(bytes.fromhex(nonce)[4:], "little")
    expanded = expand(key, row, 1, 16 * counter + expected.size, Q31)
    assert expanded.dtype == np.uint32
    assert np.array_equal(expanded[0, 16 * counter :], expected)


def test_rows_with_rejected_words_follow_the_definition_element_by_element() -> None:
    columns, found = 64, []
    for row in range(2000):
        first = [w for block in range(columns // 16) for w in stream_words(COUNTING_KEY, row, 0, block)]
        if max(first) >= Q31.modulus:
            found.append(row)
            expected = expand_by_definition(COUNTING_KEY, row, columns)
            assert expand(COUNTING_KEY, row, 1, columns, Q31)[0].tolist() == expected
            assert expected != first
        if len(found) == 3:
            return
    pytest.fail("no row with a rejected word was found, so nothing was tested")


@pytest.mark.parametrize(("row", "column"), [(74133, 668), (125138, 3906)])
def test_an_element_rejected_twice_comes_from_the_third_stream(row: int, column: int) -> None:
    # Two of about 3e8 elements each; found by searching the rows of this key.
    words = streams_until_accepted(COUNTING_KEY, row, column)
    assert len(words) == 3 and min(words[:2]) >= Q31.modulus > words[2]
    assert expand(COUNTING_KEY, row, 1, column + 1, Q31)[0, column] == words[2]
    assert expand(COUNTING_KEY, row - 1, 3, 4096, Q31)[1, column] == words[2]


def test_every_expanded_word_is_a_residue() -> None:
    # 4e6 words, of which about 180 are drawn again.
    block = expand(COUNTING_KEY, 74000, 1000, 4096, Q31)
    assert int(block.max()) < Q31.modulus


def test_a_word_equal_to_q_is_rejected_and_q_minus_1_is_kept() -> None:
    # One word of 2^31 each; found by searching the rows of this key.
    rejected, kept = (244, 777_266), (6967, 744_892)
    assert stream_words(COUNTING_KEY, rejected[0], 0, rejected[1] // 16)[rejected[1] % 16] == Q31.modulus
    assert stream_words(COUNTING_KEY, kept[0], 0, kept[1] // 16)[kept[1] % 16] == Q31.modulus - 1
    again = streams_until_accepted(COUNTING_KEY, *rejected)[-1]
    assert expand(COUNTING_KEY, rejected[0], 1, rejected[1] + 1, Q31)[0, -1] == again
    assert expand(COUNTING_KEY, kept[0], 1, kept[1] + 1, Q31)[0, -1] == Q31.modulus - 1


def test_no_word_below_q_is_changed() -> None:
    columns = 4096
    expanded = expand(COUNTING_KEY, 0, 300, columns, Q31)
    for row in range(300):
        words = library_stream(COUNTING_KEY, 0, bytes(4) + row.to_bytes(8, "little"), columns) & WORD
        changed = np.flatnonzero(expanded[row] != words)
        assert np.array_equal(changed, np.flatnonzero(words >= Q31.modulus))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    key=st.binary(min_size=32, max_size=32),
    row=st.integers(0, (1 << 63) - 1),
    columns=st.integers(1, 40),
)
def test_any_key_and_row_follow_the_definition(key: bytes, row: int, columns: int) -> None:
    assert expand(key, row, 1, columns, Q31)[0].tolist() == expand_by_definition(key, row, columns)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.data())
def test_a_block_of_rows_and_columns_equals_the_slice_of_the_whole(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 200))
    offset = data.draw(st.integers(0, 1 << 62))
    whole = expand(COUNTING_KEY, offset, rows, columns, Q31)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    prefix = data.draw(st.integers(1, columns))
    block = expand(COUNTING_KEY, offset + start, stop - start, prefix, Q31)
    assert np.array_equal(block, whole[start:stop, :prefix])
    assert np.array_equal(Seed(COUNTING_KEY, Q31, offset + start).expand(stop - start, prefix), block)


def test_expansion_in_threads_equals_row_by_row_expansion() -> None:
    rows, columns = 257, 1024  # Enough elements that the rows are shared out over threads.
    whole = expand(COUNTING_KEY, 5, rows, columns, Q31)
    for row in range(rows):
        assert np.array_equal(whole[row], expand(COUNTING_KEY, 5 + row, 1, columns, Q31)[0])


def test_a_column_prefix_that_ends_at_a_rejected_word_is_the_same_prefix() -> None:
    whole = expand(COUNTING_KEY, 74133, 1, 4096, Q31)
    for columns in (667, 668, 669, 670, 4095):
        assert np.array_equal(expand(COUNTING_KEY, 74133, 1, columns, Q31), whole[:, :columns])


def test_rows_keys_and_distant_offsets_give_unrelated_words() -> None:
    # A nonce that dropped high bytes of the row would repeat a row at a power of 256.
    rows = [0, 1, *(1 << (8 * i) for i in range(1, 8)), (1 << 63) - 1]
    drawn = {expand(COUNTING_KEY, row, 1, 8, Q31).tobytes() for row in rows}
    for i in range(32):
        key = bytearray(COUNTING_KEY)
        key[i] ^= 1
        drawn.add(expand(bytes(key), 0, 1, 8, Q31).tobytes())
    assert len(drawn) == len(rows) + 32


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (5, 0), (0, 0)])
def test_an_empty_block_expands_to_an_empty_matrix(rows: int, columns: int) -> None:
    assert expand(COUNTING_KEY, 0, rows, columns, Q31).shape == (rows, columns)


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_seed_of_another_key_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"not {length}"):
        Seed(bytes(length), Q31)


@pytest.mark.parametrize("offset", [-1, 1 << 63])
def test_a_seed_with_a_row_offset_outside_63_bits_is_refused(offset: int) -> None:
    with pytest.raises(ValueError, match="row offset"):
        Seed(COUNTING_KEY, Q31, offset)


def hkdf_expand(secret: bytes, info: bytes, length: int) -> bytes:
    """HKDF-Expand with SHA-256, from RFC 5869 section 2.3."""
    okm, block, counter = b"", b"", 1
    while len(okm) < length:
        block = hmac.new(secret, block + info + bytes([counter]), hashlib.sha256).digest()
        okm, counter = okm + block, counter + 1
    return okm[:length]


@pytest.mark.parametrize(
    ("prk", "info", "okm"),
    [
        (
            "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5",
            "f0f1f2f3f4f5f6f7f8f9",
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        ),
        (
            "06a6b88c5853361a06104c9ceb35b45cef760014904671014a193f40c15fc244",
            bytes(range(0xB0, 0x100)).hex(),
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
            "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
        ),
    ],
    ids=["case 1", "case 2"],
)
def test_hkdf_expand_gives_the_vectors_of_rfc_5869(prk: str, info: str, okm: str) -> None:
    secret, label, expected = bytes.fromhex(prk), bytes.fromhex(info), bytes.fromhex(okm)
    assert hkdf_expand(secret, label, len(expected)) == expected
    assert HKDFExpand(algorithm=SHA256(), length=len(expected), info=label).derive(secret) == expected


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    secret=st.binary(min_size=32, max_size=32),
    label=st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=12), max_size=4),
)
def test_a_derived_key_is_hkdf_expand_of_the_hashed_label(secret: bytes, label: list[str]) -> None:
    hashed = b"blindtune/v1"
    for part in label:
        hashed += len(part.encode()).to_bytes(8, "little") + part.encode()
    expected = hkdf_expand(secret, hashlib.sha256(hashed).digest(), KEY_BYTES)
    assert derive_key(secret, *label) == expected


def test_labels_that_read_alike_give_different_keys() -> None:
    labels = [
        (), ("",), ("", ""), ("ab",), ("a", "b"), ("ab", ""), ("", "ab"), ("a", "b", ""), ("b", "a"),
        ("a b",), ("a\0b",), ("a\0", "b"), ("share", "1", "1"), ("share", "11"), ("share", "1", "1 "),
    ]  # fmt: skip
    keys = {derive_key(COUNTING_KEY, *label) for label in labels}
    assert len(keys) == len(labels)
    assert keys.isdisjoint(derive_key(ZERO_KEY, *label) for label in labels)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    a=st.lists(st.text("ab\0", max_size=3), max_size=3), b=st.lists(st.text("ab\0", max_size=3), max_size=3)
)
def test_two_keys_agree_only_for_equal_labels(a: list[str], b: list[str]) -> None:
    assert (derive_key(COUNTING_KEY, *a) == derive_key(COUNTING_KEY, *b)) == (a == b)


@pytest.mark.parametrize("length", [0, 16, 31])
def test_a_secret_shorter_than_a_key_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        derive_key(bytes(length), "share")


# Of three bytes. Of the key 00 01 ... 1f: the first elements; rejected ones and what is drawn in their place,
# one of them from two blocks and one from the third stream; and where words are q and q - 1.
VECTORS_Q24: dict[str, Any] = {
    "first": [2882873, 12966269, 9267737, 7799741],
    "again": [((0, 489), 10784114), ((1, 482), 1651117), ((2, 1045), 10765228), ((92, 345), 16717924)],
    "q": (224, 758),
    "q - 1": (945, 2693),
}


def threes(key: bytes, row: int, stream: int, count: int) -> list[int]:
    nonce = stream.to_bytes(4, "little") + row.to_bytes(8, "little")
    drawn = Cipher(ChaCha20(key, bytes(4) + nonce), mode=None).encryptor().update(bytes(3 * count))
    return [int.from_bytes(drawn[3 * i : 3 * i + 3], "little") for i in range(count)]


def threes_by_definition(key: bytes, row: int, columns: int) -> list[int]:
    streams = [threes(key, row, stream, columns) for stream in range(4)]
    return [next(x for x in words if x < Q24.modulus) for words in zip(*streams, strict=True)]


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 63, 64, 65, 341, 342, 1023, 1024, 1025, 5000])
def test_words_of_three_bytes_are_those_of_the_definition(columns: int) -> None:
    for row in (0, (1 << 40) + 3):
        found = expand(COUNTING_KEY, row, 3, columns, Q24)
        assert found.tolist() == [threes_by_definition(COUNTING_KEY, row + r, columns) for r in range(3)]


def test_published_vectors_of_three_bytes() -> None:
    found = expand(COUNTING_KEY, 0, 2, 2048, Q24)
    assert found[0, :4].tolist() == VECTORS_Q24["first"]
    for (row, column), value in VECTORS_Q24["again"]:
        assert threes(COUNTING_KEY, row, 0, column + 1)[column] >= Q24.modulus
        assert int(expand(COUNTING_KEY, row, 1, column + 1, Q24)[0, column]) == value


def test_many_elements_that_are_rejected_together_are_all_drawn_again() -> None:
    # More rejected ones than sixteen blocks hold, over rows, some of them in two blocks and in two streams.
    block, again, twice, across = expand(COUNTING_KEY, 0, 400, 2048, Q24), 0, 0, 0
    assert int(block.max()) < Q24.modulus
    for row in range(0, 400, 8):
        first = np.array(threes(COUNTING_KEY, row, 0, 2048))
        second = np.array(threes(COUNTING_KEY, row, 1, 2048))
        rejected = np.flatnonzero(first >= Q24.modulus)
        again += len(rejected)
        twice += int((second[rejected] >= Q24.modulus).sum())
        across += int((3 * rejected % 64 > 61).sum())
        expected = np.where(first < Q24.modulus, first, second)
        right = expected < Q24.modulus
        assert np.array_equal(block[row][right], expected[right])
    assert again > 80 and across > 0


def test_a_word_of_three_bytes_equal_to_q_is_rejected_and_the_one_below_is_not() -> None:
    (row, column), (below_row, below_column) = VECTORS_Q24["q"], VECTORS_Q24["q - 1"]
    assert threes(COUNTING_KEY, row, 0, column + 1)[column] == Q24.modulus
    assert (
        int(expand(COUNTING_KEY, row, 1, column + 1, Q24)[0, column])
        == threes_by_definition(COUNTING_KEY, row, column + 1)[column]
    )
    found = expand(COUNTING_KEY, below_row, 1, below_column + 1, Q24)
    assert int(found[0, below_column]) == Q24.modulus - 1
