"""Rows that threads take in turn, from within a kernel.

A kernel that computes a row in less than a microsecond gets the rows of all threads from one counter. So each
thread goes through Python once, which threads can do only one after the other, and none has more left to do
than a few rows when the others are done.
"""

from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic, register_jitable

__all__ = ["rows_at_once", "take"]

# Of each matrix: they stay in the first two caches of today's processors.
_ELEMENTS_AT_ONCE = 1 << 13


@register_jitable
def rows_at_once(columns: int) -> int:
    """How many rows to take, in kernels and outside."""
    return max(1, _ELEMENTS_AT_ONCE // max(columns, 1))


@intrinsic
def take(context, turn, count):  # type: ignore[no-untyped-def]
    """The first of ``count`` rows that nobody else gets. Rows at or beyond the end are none.

    Args:
        turn: int64 [1], the first row that nobody took yet.
        count: int64.
    """
    if turn.dtype is not types.int64:
        raise TypingError(f"rows are counted by an int64, not {turn.dtype}")

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, values[0]).data
        return builder.atomic_rmw("add", data, values[1], "monotonic")

    return types.int64(turn, types.int64), generate
