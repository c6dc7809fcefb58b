"""Rows of seeds at which another way to expand is compared with `blindtune.protocol.expansion`.

Keys, rows and columns are fixed: they are public, a failure must be repeatable, and the words that are drawn
again are so rare that random places would miss those that take several draws.
"""

from blindtune.protocol.expansion import Seed
from blindtune.protocol.operands import SeededRows

__all__ = ["PROBES"]

_COUNTING = bytes(range(32))
_HIGH_BITS = bytes(range(223, 255))

PROBES = (
    # The words of stream 0 and of stream 1 are rejected: one such element in about 5e8.
    SeededRows(Seed(_COUNTING, 74_132), 3, 700),
    SeededRows(Seed(_COUNTING, 125_138), 1, 37, first_column=3871),
    # A word equal to q, which is rejected, and one equal to q - 1, which is not: one in 2^31 each.
    SeededRows(Seed(_COUNTING, 244), 1, 40, first_column=777_250),
    SeededRows(Seed(_COUNTING, 6967), 1, 8, first_column=744_886),
    # Rejected words where the number of a row carries into its high word, and in the last row of all. The
    # top bits of all words of this key are set.
    SeededRows(Seed(_HIGH_BITS, (5 << 32) - 2), 8, 20, first_column=930),
    SeededRows(Seed(_HIGH_BITS, (1 << 63) - 2), 2, 5, first_column=17_844),
    # As many rows and columns as kernels take in several parts, and a part that begins within a block.
    SeededRows(Seed(_COUNTING, 7), 9, 1537),
    SeededRows(Seed(_COUNTING, 7), 2, 512, first_column=15),
)
