"""Operands that another thread writes to while they are hidden: what is sent is still what is expected of."""

import threading

import numpy as np
import pytest

from blindtune.protocol.kernels.compiled import kernel
from blindtune.protocol.lattice.hint import packed_shape
from blindtune.protocol.lattice.parameters import MLWE1280
from blindtune.protocol.lattice.source import LatticeSource
from blindtune.protocol.masks import MaskSource
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Direction, Product, Span
from blindtune.protocol.shares.source import ShareSource

COLUMNS = 4096
PRODUCT = Product(Direction.FORWARD, (Span("a", 0, COLUMNS),))


@kernel
def scribble(x, stop):  # type: ignore[no-untyped-def]
    """Numbers up to 2^24 come and go at random places of ones."""
    word, rows, columns = np.uint64(88172645463325252), np.zeros(8, np.int64), np.zeros(8, np.int64)
    while stop[0] == 0:
        for n in range(8):
            for i in range(64):
                x[rows[n], columns[n] + i] = np.float32(1)
            rows[n] = np.int64(word >> np.uint64(20)) % x.shape[0]
            columns[n] = np.int64(word >> np.uint64(40)) % (x.shape[1] - 64)
            for i in range(64):
                word = word * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
                x[rows[n], columns[n] + i] = np.float32(word >> np.uint64(40))


@pytest.mark.parametrize("masking", ["shares", "lattice"])
def test_what_is_expected_holds_for_an_operand_that_changes_meanwhile(masking: str) -> None:
    hint = np.zeros(packed_shape(MLWE1280, 16), np.int32)
    source: MaskSource = (
        ShareSource(2, Q31) if masking == "shares" else LatticeSource(MLWE1280, bytes(32), lambda _: hint)
    )
    x, stop = np.ones((256, COLUMNS), np.float32), np.zeros(1, np.int64)
    v = np.zeros(COLUMNS, np.uint32)
    v[:] = Q31.modulus - 1  # C . v = - the sum of C
    scribble(x, np.ones(1, np.int64))
    thread = threading.Thread(target=scribble, args=(x, stop))
    thread.start()
    try:
        for _ in range(200):
            share = source.hide_reals(x, PRODUCT, 1 << 44, None, v[None])[0].shares[-1]
            assert share.expected is not None
            assert np.array_equal(
                share.expected[0], -share.residues.sum(axis=1, dtype=np.int64) % Q31.modulus
            )
    finally:
        stop[0] = 1
        thread.join()
