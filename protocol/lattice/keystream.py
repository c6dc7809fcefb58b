"""The key stream of ChaCha20 (RFC 8439), sixteen blocks at a time.

    block(c) = rounds(constants, key, c, nonce 0) + (constants, key, c, nonce 0),     a sum of words mod 2^32

Lane l of sixteen vectors computes block c + l, so that every step of the rounds is one operation on vectors.
Additions, rotations and exclusive ors take the same time for all keys. It is written out because an
implementation that is called through Python holds the interpreter lock while it runs, and so leaves one
core idle; and because the words never leave the first cache on their way to what is made of them.
"""

import numpy as np
from numba import njit, uint32

from blindtune.protocol.compiled import kernel
from blindtune.protocol.lattice.vectors import (
    LANES,
    add,
    bits_xor,
    load,
    numbered,
    repeated,
    rotate_left,
    store,
)

__all__ = ["BLOCKS", "BLOCK_WORDS", "key_stream"]

BLOCKS = LANES
"""Blocks that are made together."""

BLOCK_WORDS = 16
"""Words in a block."""

_DOUBLE_ROUNDS = 10
_CONSTANTS = np.frombuffer(b"expand 32-byte k", np.uint32)


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


@kernel
def key_stream(key, counter, out):  # type: ignore[no-untyped-def]
    """Blocks ``counter ... counter + 15``.

    Args:
        key: uint32 [8].
        counter: of the first block; counters wrap around at 2^32.
        out: uint32 [256], receives word j of block counter + l at 16 j + l.
    """
    for j in range(4):
        store(out, LANES * j, repeated(_CONSTANTS[j]))
    for j in range(8):
        store(out, LANES * (4 + j), repeated(key[j]))
    store(out, LANES * 12, numbered(counter))
    for j in range(13, BLOCK_WORDS):
        store(out, LANES * j, repeated(uint32(0)))
    a0, a1, a2, a3 = load(out, 0), load(out, 16), load(out, 32), load(out, 48)
    b0, b1, b2, b3 = load(out, 64), load(out, 80), load(out, 96), load(out, 112)
    c0, c1, c2, c3 = load(out, 128), load(out, 144), load(out, 160), load(out, 176)
    d0, d1, d2, d3 = load(out, 192), load(out, 208), load(out, 224), load(out, 240)
    for _ in range(_DOUBLE_ROUNDS):
        a0, b0, c0, d0 = _quarter_round(a0, b0, c0, d0)
        a1, b1, c1, d1 = _quarter_round(a1, b1, c1, d1)
        a2, b2, c2, d2 = _quarter_round(a2, b2, c2, d2)
        a3, b3, c3, d3 = _quarter_round(a3, b3, c3, d3)
        a0, b1, c2, d3 = _quarter_round(a0, b1, c2, d3)
        a1, b2, c3, d0 = _quarter_round(a1, b2, c3, d0)
        a2, b3, c0, d1 = _quarter_round(a2, b3, c0, d1)
        a3, b0, c1, d2 = _quarter_round(a3, b0, c1, d2)
    end = (a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3)
    for j in range(BLOCK_WORDS):
        store(out, LANES * j, add(load(out, LANES * j), end[j]))
