"""How many rows of a request a worker multiplies at once, and the memory that takes."""

__all__ = ["BLOCK_ELEMENTS", "BYTES_OF_AN_ELEMENT", "MOST_BLOCK_ROWS", "block_bytes", "block_rows"]

BLOCK_ELEMENTS = 8 << 20
"""Of the operand, or of the result if that is wider."""
MOST_BLOCK_ROWS = 1024

_OPERAND_BYTES = 4 + 4  # as it came, and in limbs
_RESULT_BYTES = 4 * 4 + 4  # an int32 sum for each limb, and the residue
_ON_THE_WAY_BYTES = 4  # what of the next block or of the last result waits for the network

BYTES_OF_AN_ELEMENT = _OPERAND_BYTES + _RESULT_BYTES + _ON_THE_WAY_BYTES
"""Never more than this for each of `BLOCK_ELEMENTS`."""


def block_rows(columns: int, outputs: int) -> int:
    """How many rows are multiplied at once by a matrix of this shape."""
    return max(1, min(MOST_BLOCK_ROWS, BLOCK_ELEMENTS // max(columns, outputs)))


def block_bytes(rows: int, columns: int, outputs: int) -> int:
    """Bytes that a product of so many rows takes while it is computed, besides the weights."""
    return min(rows, block_rows(columns, outputs)) * (_OPERAND_BYTES * columns + _RESULT_BYTES * outputs)
