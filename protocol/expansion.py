"""Uniform residues from a 32-byte key: ChaCha20 (RFC 8439), with rejection, seekable by row.

    element(row r, column i) = the first word below q among the i-th words of streams 0, 1, 2, ...
    stream s of row r        = ChaCha20(key, counter 0, nonce = s as 4 bytes || r as 8 bytes)

For `q31`, words are four bytes, little-endian, with the top bit cleared; for `q24` they are three bytes,
little-endian, so that 64 of them fill three blocks. An element depends on its own row and column
only, so any block of rows can be expanded alone, and a prefix of the columns serves narrower layers.
Of all words 4.4e-5 or 9.8e-4 are rejected, hence streams beyond 0 are rarely touched: elements that need
them wait until there are enough for sixteen blocks, each with a counter and nonce of its own.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from numba import njit, uint32, uint64

from blindtune.protocol.kernels.chacha20 import (
    ALL_BITS,
    BATCH_WORDS,
    BLOCK_WORDS,
    KEY_BYTES,
    blocks_at,
    initial_state,
    key_stream,
)
from blindtune.protocol.kernels.compiled import kernel
from blindtune.protocol.kernels.row_blocks import DRAWN, for_row_blocks, for_rows_in_turn
from blindtune.protocol.kernels.shared_rows import rows_at_once, take
from blindtune.protocol.kernels.threes import load_threes
from blindtune.protocol.kernels.vectors import (
    LANES,
    aligned,
    at_least,
    greatest,
    repeated,
    store,
)
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.residues import Residues, dot

__all__ = [
    "KEY_BYTES",
    "RandomBytes",
    "Seed",
    "derive_key",
    "expand",
    "expand_into",
    "expand_rows",
    "expanded_dots",
]

_BLOCK_BYTES = 4 * BLOCK_WORDS
_UNIT = 4 * LANES  # elements whose words of three bytes are taken together
_ASKED = 352  # elements for 256 words of the key stream, by three bytes, in whole vectors

RandomBytes = Callable[[int], bytes]
"""A source of secret random bytes: ``os.urandom`` everywhere but in tests."""


@dataclass(frozen=True)
class Seed:
    """What a worker expands into a matrix of residues: a key and the first row.

    The key is a secret of the operator that it is sent to and of the client: it has no ``repr``.
    """

    key: bytes = field(repr=False)
    parameters: ParameterSet
    row_offset: int = 0

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES:
            raise ValueError(f"a seed's key has {KEY_BYTES} bytes, not {len(self.key)}")
        if not 0 <= self.row_offset < 1 << 63:
            raise ValueError("a seed's row offset is a non-negative 63-bit integer")

    def expand(self, rows: int, columns: int) -> Residues:
        """The rows ``row_offset ... row_offset + rows - 1`` of the seed's matrix."""
        return expand(self.key, self.row_offset, rows, columns, self.parameters)


def derive_key(secret: bytes, *label: str) -> bytes:
    """A sub-key of a uniformly random secret (HKDF-Expand with SHA-256, RFC 5869).

    The label's parts are hashed with their lengths, so that different labels never collide.
    """
    if len(secret) != KEY_BYTES:
        raise ValueError(f"a secret to derive keys from has {KEY_BYTES} bytes, not {len(secret)}")
    info = hashlib.sha256(b"blindtune/v1")
    for part in label:
        encoded = part.encode()
        info.update(len(encoded).to_bytes(8, "little") + encoded)
    return HKDFExpand(algorithm=SHA256(), length=KEY_BYTES, info=info.digest()).derive(secret)


@kernel
def expand_rows(initial, first_row, q, bits, out, read=None, written=None):  # type: ignore[no-untyped-def]
    """See `expand_into`, for the key's `initial_state`.

    Args:
        q, bits: the modulus, and those bits of a word that are kept.
        read, written: two matrices as for `key_stream`, whose rows have the same numbers.
    """
    columns, state = out.shape[1], initial.copy()
    whole = columns - columns % _UNIT
    waiting, positions = np.empty((LANES, 4), np.int64), np.zeros((4, LANES), np.uint32)
    used, count = np.empty(BATCH_WORDS, np.uint32), 0
    three = _width(bits) == 3
    raw = aligned((-(-columns * 3 // (4 * BATCH_WORDS)) if three else 0) * BATCH_WORDS + LANES)
    for r in range(out.shape[0]):
        words, row, at = out[r], uint64(first_row) + uint64(r), (np.int64(first_row) + r) * columns
        state[12], state[13] = uint32(0), uint32(0)
        state[14], state[15] = uint32(row), uint32(row >> uint64(32))
        if three:
            some = raw[: raw.shape[0] - LANES]
            if read is None:
                key_stream(state, some, ALL_BITS, words, words, 0, _ASKED)
            else:
                key_stream(state, some, ALL_BITS, read, written, at, _ASKED)
            for i in range(0, whole, _UNIT):
                k = i * 3 // 4
                a, b = load_threes(raw, k), load_threes(raw, k + 12)
                c, d = load_threes(raw, k + 24), load_threes(raw, k + 36)
                store(words, i, a)
                store(words, i + LANES, b)
                store(words, i + 2 * LANES, c)
                store(words, i + 3 * LANES, d)
                if at_least(greatest(greatest(a, b), greatest(c, d)), repeated(q)):
                    count = _redraw(
                        words,
                        i,
                        i + _UNIT,
                        r,
                        state,
                        first_row,
                        waiting,
                        count,
                        q,
                        bits,
                        positions,
                        used,
                        out,
                    )
            stream = raw.view(np.uint8)
            for i in range(whole, columns):
                words[i] = _word(stream, 3 * i, 3)
            if whole < columns:
                count = _redraw(
                    words, whole, columns, r, state, first_row, waiting, count, q, bits, positions, used, out
                )
        elif key_stream(state, words, bits, read, written, at) >= q:
            count = _redraw(
                words, 0, columns, r, state, first_row, waiting, count, q, bits, positions, used, out
            )
    while count:
        count = _draw_again(state, first_row, waiting, count, q, bits, positions, used, out)


@kernel
def _width(bits):  # type: ignore[no-untyped-def]
    """Bytes of a word."""
    return 4 if bits > uint32(0xFFFFFF) else 3


@kernel
def _word(stream, at, width):  # type: ignore[no-untyped-def]
    """The word at some byte of a key stream."""
    word = uint32(0)
    for k in range(width):
        word |= uint32(uint32(stream[at + k]) << uint32(8 * k))
    return word


@njit(inline="always")
def _redraw(  # type: ignore[no-untyped-def]
    words, start, stop, r, state, first_row, waiting, count, q, bits, positions, used, out
):
    """Lets elements of a row that are no residues wait for `_draw_again`, and says how many wait then."""
    for i in range(start, stop):
        if words[i] >= q:
            waiting[count, 0], waiting[count, 1], waiting[count, 2] = r, i, 1
            count += 1
            while count == LANES:
                count = _draw_again(state, first_row, waiting, count, q, bits, positions, used, out)
    return count


@kernel
def _draw_again(state, first_row, waiting, count, q, bits, positions, words, out):  # type: ignore[no-untyped-def]
    """Draws elements that were rejected from their next streams, as many as sixteen blocks hold.

    Args:
        waiting: int64 [16, 4]: row of ``out``, column and stream of each element; the rest is used meanwhile.
        count: how many wait.
        positions, words: used meanwhile.

    Returns:
        How many still wait.
    """
    width, lane, drawn = _width(bits), 0, 0
    while drawn < count:
        first = waiting[drawn, 1] * width
        blocks = 1 if first % _BLOCK_BYTES + width <= _BLOCK_BYTES else 2
        if lane + blocks > LANES:
            break
        row = uint64(first_row) + uint64(waiting[drawn, 0])
        for k in range(blocks):
            positions[0, lane + k] = uint32(first // _BLOCK_BYTES + k)
            positions[1, lane + k] = uint32(waiting[drawn, 2])
            positions[2, lane + k], positions[3, lane + k] = uint32(row), uint32(row >> uint64(32))
        waiting[drawn, 3] = lane * _BLOCK_BYTES + first % _BLOCK_BYTES
        lane, drawn = lane + blocks, drawn + 1
    blocks_at(state, positions, words)
    stream, left = words.view(np.uint8), 0
    for i in range(count):
        if i < drawn:
            word = uint32(_word(stream, waiting[i, 3], width) & bits)
            if word < q:
                out[waiting[i, 0], waiting[i, 1]] = word
                continue
            waiting[i, 2] += 1
        for k in range(3):
            waiting[left, k] = waiting[i, k]
        left += 1
    return left


def expand_into(out: Residues, key: bytes, first_row: int, parameters: ParameterSet) -> None:
    """Fills a block of rows, in this thread and without the interpreter lock.

    Args:
        out: uint32 [rows, columns], each row contiguous; see `expand` for what it receives.
        key: 32 bytes.
        first_row: index of the first row.
        parameters: of the residues.
    """
    expand_rows(initial_state(key), np.uint64(first_row), parameters.q, parameters.bits, out)


def expand(key: bytes, row_offset: int, rows: int, columns: int, parameters: ParameterSet) -> Residues:
    """Expands a block of rows.

    Args:
        key: 32 bytes.
        row_offset: index of the first row.
        rows: number of rows.
        columns: number of columns.
        parameters: of the residues.

    Returns:
        uint32 [rows, columns], every element below q and uniformly distributed.
    """
    out = np.empty((rows, columns), np.uint32)
    for_row_blocks(rows, columns, lambda a, b: expand_into(out[a:b], key, row_offset + a, parameters), DRAWN)
    return out


@kernel
def _dots(initial, vectors, q, bits, out, turn):  # type: ignore[no-untyped-def]
    count, step = out.shape[1], rows_at_once(vectors.shape[1])
    rows = np.empty((step, vectors.shape[1]), np.uint32)
    while True:
        first = take(turn, step)
        if first >= count:
            return
        some = min(step, count - first)
        expand_rows(initial, uint64(first), q, bits, rows[:some])
        for i in range(some):
            for k in range(vectors.shape[0]):
                out[k, first + i] = dot(rows[i], vectors[k], q)


def expanded_dots(key: bytes, rows: int, vectors: Residues, parameters: ParameterSet) -> Residues:
    """The dot products mod q of an expansion's rows with vectors; the rows themselves are kept nowhere.

    Args:
        key: 32 bytes.
        rows: number of rows, from the first one on.
        vectors: uint32 [vectors, columns], below q.
        parameters: of the residues.

    Returns:
        uint32 [vectors, rows].
    """
    initial, vectors = initial_state(key), np.ascontiguousarray(vectors)
    out = np.empty((len(vectors), rows), np.uint32)
    q, bits = parameters.q, parameters.bits
    for_rows_in_turn(rows, vectors.shape[1], lambda turn: _dots(initial, vectors, q, bits, out, turn), DRAWN)
    return out
