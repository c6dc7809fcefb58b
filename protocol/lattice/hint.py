"""The public matrix A, and the hint H = A M that a worker computes from its seed.

    A[(l, j), i] = coefficient j of A[i, l] in the transform domain,    H = A M mod q

A is uniform, and its transform too, so it is drawn in the transform domain: row l 256 + j, column i is
that element of the expansion of a public seed. The transform is linear and M consists of plain integers,
so what ``multiply`` makes of that seed is the transform of H. Columns of the expansion do not depend on
how many there are, so one A serves operands of every width.

Kernels read both packed: int32 [feature tile][rank][256][16], centred, the last tile padded.
"""

from dataclasses import replace

import numpy as np

from blindtune.protocol.expansion import Seed
from blindtune.protocol.kernels.compiled import kernel
from blindtune.protocol.kernels.row_blocks import for_row_blocks
from blindtune.protocol.lattice.parameters import DEGREE, LatticeParameters
from blindtune.protocol.lattice.transform import LANES
from blindtune.protocol.masks import Share
from blindtune.protocol.operands import SeededRows
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Centred, Residues

__all__ = ["MOST_COLUMNS", "PublicMatrix", "hint_request", "pack_combination", "pack_rows", "packed_shape"]

_ROWS_AT_ONCE = 64

MOST_COLUMNS = 1 << 16
"""That `pack_combination` takes."""


def packed_shape(parameters: LatticeParameters, columns: int) -> tuple[int, int, int, int]:
    """Shape of a packed A or H of so many features."""
    return -(-columns // LANES), parameters.rank, DEGREE, LANES


@kernel
def _pack(rows, packed, first_row, q, start, stop):  # type: ignore[no-untyped-def]
    modulus = np.int64(q)
    for t in range(start, stop):
        width = min(LANES, rows.shape[1] - LANES * t)
        for r in range(rows.shape[0]):
            rank, j = divmod(first_row + r, DEGREE)
            for f in range(LANES):
                x = np.int64(rows[r, LANES * t + f]) if f < width else np.int64(0)
                packed[t, rank, j, f] = np.int32(x - modulus) if x > modulus >> 1 else np.int32(x)


def pack_rows(rows: Residues, packed: Centred, first_row: int, parameters: ParameterSet) -> None:
    """Puts some rows of A or H at their places.

    Args:
        rows: uint32 [some, columns], all below q: of a worker's answer, only rows that were verified.
        packed: int32, of the `packed_shape` of these columns; may be mapped from a file.
        first_row: index of the first of these rows, in 0 ... rank * 256 - 1.
        parameters: of the residues.

    Raises:
        ValueError: the rows do not fit.
    """
    tiles, rank = packed.shape[:2]
    if tiles != -(-rows.shape[1] // LANES) or packed.shape[2:] != (DEGREE, LANES):
        raise ValueError(
            f"rows of {rows.shape[1]} columns do not fit a packed matrix of shape {packed.shape}"
        )
    if not 0 <= first_row <= first_row + rows.shape[0] <= rank * DEGREE:
        raise ValueError(
            f"rows {first_row} ... {first_row + rows.shape[0] - 1} are not among the {rank * DEGREE} "
            f"of rank {rank}"
        )
    target, q = np.asarray(packed), parameters.q
    for_row_blocks(tiles, rows.shape[0] * LANES, lambda a, b: _pack(rows, target, first_row, q, a, b))


def hint_request(
    parameters: ParameterSet, public_seed: bytes, product: Product, first_row: int, rows: int
) -> Share:
    """What to ask an operator for rows ``first_row ... first_row + rows - 1`` of a product's hint.

    The answer must be verified with all vectors for hints before it is packed: it serves all of a run.

    Args:
        parameters: of the residues.
        public_seed: 32 bytes of the client's own randomness, which need not stay secret.
        product: whose hint.
        first_row: of as many rows as the lattice has dimensions in all.
        rows: number of rows.
    """
    seed = Seed(public_seed, parameters, first_row)
    share = Share(0, SeededRows(seed, rows, product.contraction))
    _ = share.residues  # expanded once, and not by each of its parts
    return share


class PublicMatrix:
    """A, packed, for the widest operand met so far."""

    def __init__(self, parameters: LatticeParameters, public_seed: bytes) -> None:
        self._parameters = parameters
        self._seed = Seed(public_seed, parameters.residues)
        self._packed: Centred = np.empty(packed_shape(parameters, 0), np.int32)

    def packed(self, columns: int) -> Centred:
        """int32 [feature tiles or more, rank, 256, 16].

        Columns of A beyond the operand's own fill the last tile; nothing reads their products.
        """
        shape = packed_shape(self._parameters, columns)
        packed = self._packed
        if packed.shape[0] < shape[0]:
            # Each thread that finds A too narrow expands its own and returns that one, whichever is kept:
            # a lock would be held for ever in a child forked meanwhile.
            packed = np.empty(shape, np.int32)
            for row in range(0, self._parameters.dimension, _ROWS_AT_ONCE):
                seed = replace(self._seed, row_offset=row)
                rows = seed.expand(_ROWS_AT_ONCE, shape[0] * LANES)
                pack_rows(rows, packed, row, self._seed.parameters)
            self._packed = packed
        return packed


@kernel
def _add_products(packed, low, high, sums):  # type: ignore[no-untyped-def]
    for t in range(low.shape[0]):
        for rank in range(packed.shape[1]):
            for j in range(DEGREE):
                of_low, of_high = np.int64(0), np.int64(0)
                for f in range(LANES):
                    element = np.int64(packed[t, rank, j, f])
                    of_low += element * np.int64(low[t, f])
                    of_high += element * np.int64(high[t, f])
                sums[0, rank, j] += of_low
                sums[1, rank, j] += of_high


def pack_combination(packed: Centred, v: Residues, parameters: ParameterSet) -> Centred:
    """A v, combinations of A's features: R v = (A v) S + E v, so that they give the dot products of masks.

    Args:
        packed: A, int32 [feature tiles or more, rank, 256, 16].
        v: uint32 [vectors, columns], below q, at most `MOST_COLUMNS` columns and 16 vectors.
        parameters: of the residues.

    Returns:
        Packed as if they were A of as many columns, int32 [1, rank, 256, 16].
    """
    vectors, columns = v.shape
    if columns > MOST_COLUMNS or vectors > LANES:
        raise ValueError(
            f"sums of {columns} products could overflow, or {vectors} vectors are more than a tile"
        )
    tiles, rank, modulus = -(-columns // LANES), packed.shape[1], parameters.modulus
    padded = np.zeros((vectors, tiles * LANES), np.uint32)
    padded[:, :columns] = v
    total = np.empty((rank * DEGREE, vectors), np.uint32)
    for k in range(vectors):
        # Elements of A are below 2^30, halves of v below 2^16, so that sums of 2^16 products are below 2^62.
        low, high = (part.reshape(tiles, LANES) for part in (padded[k] & 0xFFFF, padded[k] >> 16))
        sums = np.zeros((2, rank, DEGREE), np.int64)
        _add_products(packed[:tiles], low, high, sums)
        total[:, k] = ((sums[0] + (sums[1] % modulus << 16)) % modulus).reshape(-1)
    out = np.empty((1, rank, DEGREE, LANES), np.int32)
    pack_rows(total, out, 0, parameters)
    return out
