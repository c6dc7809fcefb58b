"""What a client's steps cannot be faster than: their reads and writes, and the arithmetic that draws masks.

``memory`` is one pass over all matrices that a step must read and write, in order and with nothing computed.
``arithmetic`` is ChaCha20 for all words that are drawn, and in ``lattice`` pointwise sums and inverse
transforms of a tile that stays in the cache. If the two hide each other perfectly, a step takes as long as
the longer one. Fixed point, sums, dot products and rounding come on top. Both use threads as the step does.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from blindtune.protocol.kernels.chacha20 import BLOCK_WORDS, batch, initial_state
from blindtune.protocol.kernels.row_blocks import DRAWN, READ, WRITTEN, for_row_blocks
from blindtune.protocol.kernels.vectors import AHEAD, LANES, add, load, prefetch, repeated, store
from blindtune.protocol.lattice.hint import packed_shape
from blindtune.protocol.lattice.masking import _ring_tile
from blindtune.protocol.lattice.noise import batches_of
from blindtune.protocol.lattice.parameters import DEGREE, MLWE1280

__all__ = ["bounds"]

_RANKS = (0,) * MLWE1280.rank
Matrix = NDArray[Any]


@njit(nogil=True)
def _pass(one, other, to, start, stop, sums):  # type: ignore[no-untyped-def]
    total = repeated(np.uint32(0))
    for i in range(start * one.shape[1], stop * one.shape[1], LANES):
        prefetch(one, i + AHEAD)
        words = load(one, i)
        if other is not None:
            prefetch(other, i + AHEAD)
            words = add(words, load(other, i))
        if to is None:
            total = add(total, words)
        else:
            prefetch(to, i + AHEAD)
            store(to, i, words)
    store(sums, 0, total)  # without which nothing would have to be read


@njit(nogil=True)
def _streams(state, batches):  # type: ignore[no-untyped-def]
    words = np.empty(BLOCK_WORDS * LANES, np.uint32)
    for _ in range(batches):
        batch(state, words, 0)


@njit(nogil=True)
def _rings(tile, factors, products):  # type: ignore[no-untyped-def]
    out = np.empty(DEGREE * LANES, np.uint32)
    for _ in range(products):
        _ring_tile(tile, tile, factors, _RANKS, out, 0, 0, 1)


def _memory(one: Matrix, other: Matrix | None = None, to: Matrix | None = None) -> None:
    def some(start: int, stop: int) -> None:
        _pass(one, other, to, start, stop, np.empty(LANES, np.uint32))

    for_row_blocks(*one.shape, some, READ if to is None else WRITTEN)


def _draw(rows: int, width: int, batches: int) -> None:
    state = initial_state(bytes(32))
    for_row_blocks(rows, width, lambda a, b: _streams(state.copy(), (b - a) * batches), DRAWN)


def _ring(rows: int, width: int, tile: Matrix, factors: Matrix) -> None:
    blocks = -(-rows // DEGREE)
    for_row_blocks(
        -(-width // LANES),
        blocks * DEGREE * LANES,
        lambda a, b: _rings(tile, factors, (b - a) * blocks),
        DRAWN,
    )


def bounds(rows: int, width: int) -> dict[tuple[str, str], Callable[[], object]]:
    """What to time, as ("memory" or "arithmetic", "mode step"), for steps of the benchmark's two modes.

    Args:
        rows: of the operand.
        width: columns of the operand and of the answers, a multiple of 16.
    """
    a, b, c = (np.ones((rows, width), np.uint32) for _ in range(3))
    hint = np.ones(packed_shape(MLWE1280, width), np.int32)
    flat = hint.reshape(len(hint), -1)
    factors = np.ones((MLWE1280.rank, DEGREE), np.int32)
    _, noise = batches_of(rows, width, MLWE1280.eta)

    def all_of(*parts: Callable[[], object]) -> Callable[[], object]:
        return lambda: [part() for part in parts]

    def ring() -> None:
        _ring(rows, width, hint[0], factors)

    return {
        ("memory", "shares up"): lambda: _memory(a, None, c),
        ("arithmetic", "shares up"): lambda: _draw(rows, width, -(-width // (BLOCK_WORDS * LANES))),
        ("memory", "shares verify"): lambda: _memory(a, b),
        ("memory", "shares down"): lambda: _memory(a, b, c),
        ("memory", "lattice up"): all_of(lambda: _memory(flat), lambda: _memory(a, None, c)),
        ("arithmetic", "lattice up"): all_of(lambda: _draw(rows, width, noise), ring),
        ("memory", "lattice verify"): lambda: _memory(a),
        ("memory", "lattice down"): all_of(lambda: _memory(flat), lambda: _memory(a, None, c)),
        ("arithmetic", "lattice down"): ring,
    }
