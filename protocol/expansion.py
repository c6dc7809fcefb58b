"""Uniform residues from a 32-byte key: ChaCha20 (RFC 8439), with rejection, seekable by row.

    element(row r, column i) = the first word below q among the i-th words of streams 0, 1, 2, ...
    stream s of row r        = ChaCha20(key, counter 0, nonce = s as 4 bytes || r as 8 bytes)

Words are 32-bit little-endian with the top bit cleared. An element depends on its own row and column
only, so any block of rows can be expanded alone, and a prefix of the columns serves narrower layers.
The expected number of rejected words is 4.4e-5 of all, hence streams beyond 0 are rarely touched.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from numba import uint32, uint64

from blindtune.protocol.kernels.chacha20 import BLOCK_WORDS, KEY_BYTES, initial_state, key_stream
from blindtune.protocol.kernels.compiled import kernel
from blindtune.protocol.kernels.row_blocks import DRAWN, for_row_blocks, for_rows_in_turn
from blindtune.protocol.kernels.shared_rows import rows_at_once, take
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

_BITS = 0x7FFFFFFF

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
def expand_rows(initial, first_row, q, out, read=None, written=None):  # type: ignore[no-untyped-def]
    """See `expand_into`, for the key's `initial_state`. Two matrices are as for `key_stream`."""
    state = initial.copy()
    block = np.empty(BLOCK_WORDS, np.uint32)
    for r in range(out.shape[0]):
        words = out[r]
        row = uint64(first_row) + uint64(r)
        state[12], state[13] = uint32(0), uint32(0)
        state[14], state[15] = uint32(row), uint32(row >> uint64(32))
        largest = key_stream(state, words, _BITS, read, written, np.int64(row) * words.shape[0])
        if largest < q:
            continue
        for i in range(words.shape[0]):
            stream = uint32(0)
            while words[i] >= q:
                stream = uint32(stream + uint32(1))
                state[12], state[13] = uint32(i // BLOCK_WORDS), stream
                key_stream(state, block, _BITS)
                words[i] = block[i % BLOCK_WORDS]


def expand_into(out: Residues, key: bytes, first_row: int, parameters: ParameterSet) -> None:
    """Fills a block of rows, in this thread and without the interpreter lock.

    Args:
        out: uint32 [rows, columns], each row contiguous; see `expand` for what it receives.
        key: 32 bytes.
        first_row: index of the first row.
        parameters: of the residues.
    """
    expand_rows(initial_state(key), np.uint64(first_row), parameters.q, out)


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
def _dots(initial, vector, q, out, turn):  # type: ignore[no-untyped-def]
    step = rows_at_once(vector.shape[0])
    rows = np.empty((step, vector.shape[0]), np.uint32)
    while True:
        first = take(turn, step)
        if first >= out.shape[0]:
            return
        some = min(step, out.shape[0] - first)
        expand_rows(initial, uint64(first), q, rows[:some])
        for i in range(some):
            out[first + i] = dot(rows[i], vector, q)


def expanded_dots(key: bytes, rows: int, vector: Residues, parameters: ParameterSet) -> Residues:
    """The dot products mod q of an expansion's rows with a vector; the rows themselves are kept nowhere.

    Args:
        key: 32 bytes.
        rows: number of rows, from the first one on.
        vector: uint32 [columns], below q.
        parameters: of the residues.

    Returns:
        uint32 [rows].
    """
    initial, vector = initial_state(key), np.ascontiguousarray(vector)
    out = np.empty(rows, np.uint32)
    for_rows_in_turn(rows, len(vector), lambda turn: _dots(initial, vector, parameters.q, out, turn), DRAWN)
    return out
