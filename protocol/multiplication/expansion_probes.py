"""Rows of seeds at which another way to expand is compared with `blindtune.protocol.expansion`.

Keys, rows and columns are fixed: they are public, a failure must be repeatable, and the words that are drawn
again are so rare that random places would miss those that take several draws.
"""

from blindtune.protocol.expansion import Seed
from blindtune.protocol.operands import SeededRows
from blindtune.protocol.parameters import Q24, Q31, ParameterSet

__all__ = ["probes"]

_COUNTING = bytes(range(32))
_HIGH_BITS = bytes(range(223, 255))

# Key, first row, rows, columns, and the first column.
_PLACES_Q31 = (
    # The words of stream 0 and of stream 1 are rejected: one such element in about 5e8.
    (_COUNTING, 74_132, 3, 700, 0),
    (_COUNTING, 125_138, 1, 37, 3871),
    # A word equal to q, which is rejected, and one equal to q - 1, which is not: one in 2^31 each.
    (_COUNTING, 244, 1, 40, 777_250),
    (_COUNTING, 6967, 1, 8, 744_886),
    # Rejected words where the number of a row carries into its high word, and in the last row of all. The
    # top bits of all words of this key are set.
    (_HIGH_BITS, (5 << 32) - 2, 8, 20, 930),
    (_HIGH_BITS, (1 << 63) - 2, 2, 5, 17_844),
)
_PLACES_Q24 = (
    # The words of streams 0 and 1 are rejected; a word equal to q, and one equal to q - 1.
    (_COUNTING, 92, 1, 700, 0),
    (_COUNTING, 224, 1, 40, 740),
    (_COUNTING, 945, 1, 8, 2690),
    # A rejected word that lies in two blocks, and the last row of all.
    (_COUNTING, 2, 1, 37, 1030),
    (_HIGH_BITS, (1 << 63) - 2, 2, 1500, 300),
)
_PLACES = (
    # As many rows and columns as kernels take in several parts, and a part that begins within a block.
    (_COUNTING, 7, 9, 1537, 0),
    (_COUNTING, 7, 2, 512, 15),
)

_RARE = {Q31.name: _PLACES_Q31, Q24.name: _PLACES_Q24}


def probes(parameters: ParameterSet) -> list[SeededRows]:
    """The places of a parameter set."""
    return [
        SeededRows(Seed(key, parameters, row), rows, columns, first)
        for key, row, rows, columns, first in (*_RARE[parameters.name], *_PLACES)
    ]
