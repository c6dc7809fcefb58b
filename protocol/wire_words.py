"""Residues as they travel: words of as many bytes as the parameter set says, little-endian, without gaps.

Words of four bytes travel as they lie in memory. Words of three bytes leave out the highest one, which is 0
in every residue.
"""

import numpy as np
from numba import uint32
from numpy.typing import NDArray

from blindtune.protocol.kernels.compiled import kernel
from blindtune.protocol.kernels.threes import load_threes, store_threes
from blindtune.protocol.kernels.vectors import LANES, load, store
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.residues import Residues

__all__ = ["to_residues", "to_words"]

_WORDS = 3 * LANES // 4  # of memory, for sixteen words of three bytes
_READ = 4 * LANES  # bytes that a vector reads


@kernel
def _pack(residues, words):  # type: ignore[no-untyped-def]
    whole = residues.shape[0] - residues.shape[0] % LANES
    for i in range(0, whole, LANES):
        store_threes(words, i // LANES * _WORDS, load(residues, i))
    flat = words.view(np.uint8)
    for i in range(whole, residues.shape[0]):
        for k in range(3):
            flat[3 * i + k] = np.uint8(residues[i] >> uint32(8 * k))


@kernel
def _unpack(data, residues):  # type: ignore[no-untyped-def]
    whole = 0
    while whole + LANES <= residues.shape[0] and 3 * whole + _READ <= data.shape[0]:
        store(residues, whole, load_threes(data, 3 * whole))
        whole += LANES
    for i in range(whole, residues.shape[0]):
        high, middle = uint32(data[3 * i + 2]) << 16, uint32(data[3 * i + 1]) << 8
        residues[i] = uint32(high | middle | uint32(data[3 * i]))


def to_words(rows: Residues, parameters: ParameterSet) -> NDArray[np.uint8]:
    """The bytes of some rows, uint8 [rows * columns * word bytes].

    Args:
        rows: uint32 [rows, columns], all below q.
        parameters: of the residues.
    """
    flat = np.ascontiguousarray(rows).reshape(-1)
    if parameters.word_bytes == 4:
        return flat.view(np.uint8)
    words = np.empty(-(-3 * len(flat) // 4), np.uint32)
    _pack(flat, words)
    return words.view(np.uint8)[: 3 * len(flat)]


def to_residues(data: memoryview, rows: Residues, parameters: ParameterSet) -> None:
    """Fills rows with words as they arrived, which nobody has checked to be residues.

    Args:
        data: of as many bytes as the rows have, see `to_words`.
        rows: uint32 [rows, columns], in C order.
        parameters: of the residues.

    Raises:
        ValueError: the bytes do not fit the rows.
    """
    received, flat = np.frombuffer(data, np.uint8), rows.reshape(-1)
    if len(received) != parameters.word_bytes * len(flat) or not rows.flags.c_contiguous:
        raise ValueError(f"{len(received)} bytes do not fill {len(flat)} residues")
    if parameters.word_bytes == 4:
        # numpy lets other threads run meanwhile, memoryview does not.
        np.copyto(flat.view(np.uint8), received)
    elif len(flat):
        _unpack(received, flat)
