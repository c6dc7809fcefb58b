"""ChaCha20 (RFC 8439), sixteen blocks side by side.

    state     0 ... 3  "expand 32-byte k"      4 ... 11  key      12  block counter      13 ... 15  nonce
    block     20 rounds of the state, plus the state: sixteen words mod 2^32

Word l of a vector belongs to the block with counter + l, so that every step of the rounds is an addition,
an exclusive or or a rotation of whole vectors, which take the same time whatever the words. Counters wrap
around at 2^32.

It is written out because a library's cipher that is called through Python holds the interpreter lock, so
that threads wait for each other, and because its words would have left the first cache before they are
used. Whether a compiler made the right instructions of it is checked in each process, against a library's
cipher.
"""

import sys
from functools import cache

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numba import njit, uint32
from numpy.typing import NDArray

from blindtune.protocol.kernels.compiled import kernel
from blindtune.protocol.kernels.vectors import (
    LANES,
    add,
    bits_and,
    bits_xor,
    greatest,
    load,
    numbered,
    prefetch,
    repeated,
    rotate_left,
    store,
    store_in_order,
    store_transposed,
)

__all__ = [
    "ALL_BITS",
    "BATCH_WORDS",
    "BLOCK_WORDS",
    "KEY_BYTES",
    "ask",
    "batch",
    "blocks_at",
    "initial_state",
    "key_stream",
]

if sys.byteorder != "little":
    raise ImportError("Blindtune needs a little-endian processor: words travel as they lie in memory")

KEY_BYTES = 32
BLOCK_WORDS = 16
ALL_BITS = 0xFFFFFFFF

BATCH_WORDS = LANES * BLOCK_WORDS
_DOUBLE_ROUNDS = 10
_CONSTANTS = np.frombuffer(b"expand 32-byte k", np.uint32)


@kernel
def ask(read, written, at, count):  # type: ignore[no-untyped-def]
    """Asks for the memory of some elements of two arrays."""
    for i in range(at, at + count, LANES):
        prefetch(read, i)
        prefetch(written, i)


@njit(inline="always")
def _quarter_round(a, b, c, d):  # type: ignore[no-untyped-def]
    a = add(a, b)
    d = rotate_left(bits_xor(d, a), uint32(16))
    c = add(c, d)
    b = rotate_left(bits_xor(b, c), uint32(12))
    a = add(a, b)
    d = rotate_left(bits_xor(d, a), uint32(8))
    c = add(c, d)
    b = rotate_left(bits_xor(b, c), uint32(7))
    return a, b, c, d


@njit(inline="always")
def _end(rounds, word, kept):  # type: ignore[no-untyped-def]
    return bits_and(add(rounds, word), kept)


@njit(inline="always")
def _blocks(state, positions, kept):  # type: ignore[no-untyped-def]
    """The sixteen words of sixteen blocks, in as many vectors, of which only some bits are kept.

    Args:
        state: uint32 [16], gives constants and key.
        positions: four vectors, the counters and nonces.
        kept: sixteen times the bits.
    """
    a0, a1, a2, a3 = repeated(state[0]), repeated(state[1]), repeated(state[2]), repeated(state[3])
    b0, b1, b2, b3 = repeated(state[4]), repeated(state[5]), repeated(state[6]), repeated(state[7])
    c0, c1, c2, c3 = repeated(state[8]), repeated(state[9]), repeated(state[10]), repeated(state[11])
    d0, d1, d2, d3 = positions
    for _ in range(_DOUBLE_ROUNDS):
        a0, b0, c0, d0 = _quarter_round(a0, b0, c0, d0)
        a1, b1, c1, d1 = _quarter_round(a1, b1, c1, d1)
        a2, b2, c2, d2 = _quarter_round(a2, b2, c2, d2)
        a3, b3, c3, d3 = _quarter_round(a3, b3, c3, d3)
        a0, b1, c2, d3 = _quarter_round(a0, b1, c2, d3)
        a1, b2, c3, d0 = _quarter_round(a1, b2, c3, d0)
        a2, b3, c0, d1 = _quarter_round(a2, b3, c0, d1)
        a3, b0, c1, d2 = _quarter_round(a3, b0, c1, d2)
    return (
        _end(a0, repeated(state[0]), kept),
        _end(a1, repeated(state[1]), kept),
        _end(a2, repeated(state[2]), kept),
        _end(a3, repeated(state[3]), kept),
        _end(b0, repeated(state[4]), kept),
        _end(b1, repeated(state[5]), kept),
        _end(b2, repeated(state[6]), kept),
        _end(b3, repeated(state[7]), kept),
        _end(c0, repeated(state[8]), kept),
        _end(c1, repeated(state[9]), kept),
        _end(c2, repeated(state[10]), kept),
        _end(c3, repeated(state[11]), kept),
        _end(d0, positions[0], kept),
        _end(d1, positions[1], kept),
        _end(d2, positions[2], kept),
        _end(d3, positions[3], kept),
    )


@njit(inline="always")
def _next_blocks(state, kept):  # type: ignore[no-untyped-def]
    """Those from the state's counter on."""
    positions = numbered(state[12]), repeated(state[13]), repeated(state[14]), repeated(state[15])
    return _blocks(state, positions, kept)


@kernel
def batch(state, out, at):  # type: ignore[no-untyped-def]
    """Sixteen blocks, word by word: what consumes all words alike takes them in this order.

    Args:
        state: uint32 [16]. Its counter moves on by 16.
        out: uint32, contiguous. Receives word j of block counter + l at ``at`` + 16 j + l.
        at: an index with room for 256 words from it on.
    """
    store_in_order(out, at, _next_blocks(state, repeated(uint32(ALL_BITS))))
    state[12] += uint32(LANES)


@kernel
def blocks_at(state, positions, out):  # type: ignore[no-untyped-def]
    """Sixteen blocks of one key, in the standard's order, wherever they are.

    Args:
        state: uint32 [16], of the key.
        positions: uint32 [4, 16], contiguous: a counter and three words of a nonce for each block.
        out: uint32 [256], contiguous.
    """
    flat = positions.reshape(-1)
    where = load(flat, 0), load(flat, LANES), load(flat, 2 * LANES), load(flat, 3 * LANES)
    store_transposed(out, 0, _blocks(state, where, repeated(uint32(ALL_BITS))))


@kernel
def key_stream(state, out, bits=ALL_BITS, read=None, written=None, at=0, asked=BATCH_WORDS):  # type: ignore[no-untyped-def]
    """Fills an array with the key stream from the state's block on, in the standard's order.

    Args:
        state: uint32 [16]. Its counter moves on by a multiple of 16.
        out: uint32, contiguous, of any length.
        bits: of each word that are kept; the others are 0.
        read, written, at, asked: two arrays, of which so many elements for each 256 words, from ``at`` on,
            are needed next. They come from memory meanwhile, which the rounds leave alone.

    Returns:
        A word that none of the array's is larger than; one of them, if its length is a multiple of 256.
    """
    kept, largest = repeated(uint32(bits)), repeated(uint32(0))
    words = np.empty(BATCH_WORDS, np.uint32)
    for i in range(0, out.shape[0], BATCH_WORDS):
        whole = i + BATCH_WORDS <= out.shape[0]
        if whole and read is not None:
            ask(read, written, at + i // BATCH_WORDS * asked, asked)
        blocks = _next_blocks(state, kept)
        state[12] += uint32(LANES)
        for vector in blocks:
            largest = greatest(largest, vector)
        if whole:
            store_transposed(out, i, blocks)
        else:
            store_transposed(words, 0, blocks)
            for j in range(i, out.shape[0]):
                out[j] = words[j - i]
    store(words, 0, largest)
    return words[:LANES].max()


def initial_state(key: bytes) -> NDArray[np.uint32]:
    """The state of a key's first block under nonce zero. It holds the key.

    Args:
        key: 32 bytes.

    Returns:
        uint32 [16].

    Raises:
        RuntimeError: key streams are wrong in this process.
    """
    _require_right_streams()
    return _state(key)


def _state(key: bytes) -> NDArray[np.uint32]:
    state = np.zeros(BLOCK_WORDS, np.uint32)
    state[:4] = _CONSTANTS
    state[4:12] = np.frombuffer(key, np.uint32)
    return state


@cache
def _require_right_streams() -> None:
    """Compares all orders with a library's cipher: at a process's first key, since it takes a millisecond.

    What goes wrong with a compiler or a processor goes wrong for all keys, so one will do.
    """
    key, position = bytes(range(1, 1 + KEY_BYTES)), bytes(range(101, 117))
    words = 2 * BATCH_WORDS + BLOCK_WORDS + 1
    cipher = Cipher(ChaCha20(key, position), mode=None).encryptor()
    expected = np.frombuffer(cipher.update(bytes(4 * words)), np.uint32)
    first = _state(key)
    first[12:] = np.frombuffer(position, np.uint32)
    ordered, by_word = np.empty(words, np.uint32), np.empty(2 * BATCH_WORDS, np.uint32)
    key_stream(first.copy(), ordered)
    state = first.copy()
    batch(state, by_word, 0)
    batch(state, by_word, BATCH_WORDS)
    blocks = by_word.reshape(2, BLOCK_WORDS, LANES).transpose(0, 2, 1).reshape(-1)
    positions = np.repeat(first[12:, None], LANES, axis=1)
    positions[0] += np.arange(LANES, dtype=np.uint32)[::-1]
    backwards = np.empty(BATCH_WORDS, np.uint32)
    blocks_at(first, positions, backwards)
    apart = backwards.reshape(LANES, BLOCK_WORDS)[::-1].reshape(-1)
    same = [np.array_equal(x, expected[: x.size]) for x in (ordered, blocks, apart)]
    if not all(same):
        raise RuntimeError(
            "ChaCha20 as compiled here differs from that of the cryptography package, so no mask can be "
            "drawn: numba, what it keeps on disk or the hardware is faulty. Remove what it keeps (*.nbi and "
            "*.nbc beside Blindtune's sources, in the user's cache or in NUMBA_CACHE_DIR) and try again"
        )
