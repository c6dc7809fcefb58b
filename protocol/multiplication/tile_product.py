"""operand . M mod q in a processor's tile registers or vectors: from limbs to residues without detours.

A library's int8 product writes four int32 sums to memory for each result, and reads them again to recombine
them. Here a thread takes a group of columns, and for it goes through all rows:

    pack        M's columns of the group, 2,048 features at a time, as right tiles
    multiply    sixteen rows: some limbs by 32 columns stay in registers over all of these features
    recombine   their sums, from the first cache to residues, added to those of the features before

The limbs of some rows and the group's packed columns fit the second cache together. Sums of so few features
are small enough to be recombined in 32 bits: see `_residues_of_sums`.

Tiles are packed alike for both kinds of registers. Of kernels, what differs hangs on whether there is a
``configuration`` of tile registers: that is part of their types, so that each is compiled for one kind alone.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types, uint32
from numpy.typing import NDArray

from blindtune.protocol.kernels.compiled import kernel
from blindtune.protocol.kernels.dot_products import have_dot_products, multiply_rows, start_sums
from blindtune.protocol.kernels.recycled import large_matrix
from blindtune.protocol.kernels.row_blocks import for_row_blocks, for_rows_in_turn
from blindtune.protocol.kernels.shared_rows import take
from blindtune.protocol.kernels.tiles import (
    CONFIGURATION,
    ROW_BYTES,
    TILE_BYTES,
    TILE_ROWS,
    TILE_WORDS,
    are_usable,
    clear_sums,
    configure,
    multiply_tiles,
    pack_columns,
    pack_four_rows,
    release,
    store_apart,
    store_sums,
)
from blindtune.protocol.kernels.vectors import (
    LANES,
    add,
    bits_xor,
    load,
    multiply_low,
    operation,
    prefetch,
    repeated,
    shift_left,
    shift_right_signed,
    splat,
    store,
    subtract,
    words_type,
)
from blindtune.protocol.multiplication.methods import Method, contiguous_rows, stacked
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.residues import Residues, lifted_of, residues_of, sums_of

__all__ = ["TileProduct", "VectorProduct"]

_BYTES_OF_128 = 0x80808080
_STEPS = 32  # of 64 features, whose sums are recombined together
_BLOCKS = 4  # of sixteen rows that meet all of a group's packed columns before the next ones do
_PANEL = 2 * TILE_ROWS  # columns side by side in registers
_GROUP = 16 * _PANEL  # columns, at most
_GROUPS_A_THREAD = 2
_PANEL_WORDS = 2 * _STEPS * TILE_WORDS
_NEAR = 8  # steps of a panel that stay in the first cache, where vectors read them for every two rows
_PAYING = 1 << 22  # products of numbers that a thread must have


@operation(words_type, words_type, types.float32)
def _high_quotients(builder: ir.IRBuilder, a: ir.Value, factor: ir.Value) -> ir.Value:
    """The integers nearest to products with a number, of words with signs below 2^26, or their neighbours."""
    floats = ir.VectorType(ir.FloatType(), a.type.count)
    shift = 1.5 * 2.0**23  # among numbers this large neighbours differ by one, and the lowest bits count them
    shifted = builder.fmul(builder.sitofp(a, floats), splat(builder, factor, floats))
    shifted = builder.fadd(shifted, ir.Constant(floats, [shift] * floats.count))
    bits = int(np.float32(shift).view(np.int32))
    return builder.sub(builder.bitcast(shifted, a.type), ir.Constant(a.type, [bits] * floats.count))


@njit(inline="always")
def _residues_of_sums(sums, at, numbers, factor, q):  # type: ignore[no-untyped-def]
    """s_0 + 2^8 s_1 + 2^16 s_2 (+ 2^24 s_3) mod q, of sums of `_STEPS` products of tiles: 2^25 at most.

    With n limbs, B = 2^(8 (n - 1)) and t = s_(n-1) + floor(s_(n-2) / 2^8) + floor(s_(n-3) / 2^16), the
    number is B t and a rest. Where n = 4 that is less than 4 * 2^24, more or less, below 0.04 q; where n = 3
    the floors leave out less than 2 * 2^16, below 0.01 q. As float32, t has an error of up to 2, which is
    0.02 q, or 0.01 q; and B / q and its product with t, below 2^19, have 2^-24 of it each, which is 0.07 q.
    So the integer nearest to that product, times q, is less than 0.7 q from the number, and 32 bits, which
    do not hold the number, hold the difference.

    Args:
        sums: int32, from ``at`` on those of sixteen columns, each limb's two tiles behind the one before.
        numbers: of the limbs, a tuple.
        factor: B / q.
    """
    top = at + 2 * TILE_WORDS * (len(numbers) - 1)
    high = add(load(sums, top), shift_right_signed(load(sums, top - 2 * TILE_WORDS), uint32(8)))
    high = add(high, shift_right_signed(load(sums, top - 4 * TILE_WORDS), uint32(16)))
    total = load(sums, at)
    # The length of a tuple belongs to its type, so the compiler unrolls such loops.
    for k in range(1, len(numbers)):
        total = add(total, shift_left(load(sums, at + 2 * TILE_WORDS * k), uint32(8 * k)))
    return residues_of(subtract(total, multiply_low(_high_quotients(high, factor), repeated(q))), q)


@njit(inline="always")
def _limbs_of(words, lift, q, flip):  # type: ignore[no-untyped-def]
    """Sixteen residues as bytes, the lowest first. Above the limbs there may be any."""
    # Adding 128 to every byte carries just where a digit below is negative, so that each byte then holds its
    # digit plus 128, which vectors want, and flipping the byte's top bit takes the 128 off again.
    return bits_xor(add(lifted_of(words, lift, q), repeated(uint32(_BYTES_OF_128))), repeated(flip))


@kernel
def _split(operand, columns, numbers, lift, q, flip, limbs, start, stop):  # type: ignore[no-untyped-def]
    """Left tiles of some blocks: of sixteen rows and 64 columns, its limbs, 0 beyond the operand."""
    steps, rest = limbs.shape[1], np.zeros(ROW_BYTES, np.uint32)
    for block in range(start, stop):
        for s in range(steps):
            for i in range(TILE_ROWS):
                r = block * TILE_ROWS + i
                at, first = ((block * steps + s) * len(numbers) * TILE_ROWS + i) * ROW_BYTES, s * ROW_BYTES
                whole = r < operand.shape[0] and first + ROW_BYTES <= columns
                if not whole:
                    rest[:] = 0
                    for j in range(first, columns if r < operand.shape[0] else first):
                        rest[j - first] = operand[r, j]
                for j in range(0, ROW_BYTES, LANES):
                    words = load(operand[r], first + j) if whole else load(rest, j)
                    store_apart(limbs, at + j, TILE_BYTES, numbers, _limbs_of(words, lift, q, flip))


@kernel
def _cut(stored, row, column, rows, edge):  # type: ignore[no-untyped-def]
    """What there is of some rows of 64 bytes; elsewhere there may be anything, since limbs or results end."""
    for i in range(min(rows, stored.shape[0] - row)):
        for j in range(min(ROW_BYTES, stored.shape[1] - column)):
            edge[ROW_BYTES * i + j] = stored[row + i, column + j]


@kernel
def _pack_outputs(stored, width, step, steps, first, tiles, packed, edge):  # type: ignore[no-untyped-def]
    """Packs a group of columns of a matrix whose columns are the stored rows.

    Args:
        stored: int8 [outputs, features or more].
        width: features.
        step, steps: the first 64 features, and how often there are 64.
        first, tiles: the group's first column, and how often there are sixteen.
        packed: uint32, receives panel by panel each step's two tiles.
        edge: int8 [1024], used meanwhile.
    """
    outputs, pitch = stored.shape
    for t in range(tiles):
        row = first + t * TILE_ROWS
        for k in range(steps):
            to = t // 2 * _PANEL_WORDS + (2 * k + t % 2) * TILE_WORDS
            column = (step + k) * ROW_BYTES
            if row + TILE_ROWS <= outputs and column + ROW_BYTES <= width:
                pack_columns(stored, row * pitch + column, pitch, packed, to)
            else:
                _cut(stored[:, :width], row, column, TILE_ROWS, edge)
                pack_columns(edge, 0, ROW_BYTES, packed, to)


@kernel
def _pack_features(stored, width, step, steps, first, tiles, packed, edge):  # type: ignore[no-untyped-def]
    """Packs a group of columns of a matrix as it is stored: int8 [features, ``width`` outputs or more].

    The others are as for `_pack_outputs`.
    """
    features, pitch = stored.shape
    for k in range(steps):
        for t in range(0, tiles, 4):
            for i in range(TILE_ROWS):
                to = t // 2 * _PANEL_WORDS + 2 * k * TILE_WORDS + i * LANES
                row, column = (step + k) * ROW_BYTES + 4 * i, first + t * TILE_ROWS
                if row + 4 <= features and column + ROW_BYTES <= width:
                    for r in range(row + ROW_BYTES, row + ROW_BYTES + 4):
                        prefetch(stored, r * pitch + column)
                    pack_four_rows(stored, row * pitch + column, pitch, packed, to, _PANEL_WORDS)
                else:
                    _cut(stored[:, :width], row, column, 4, edge)
                    pack_four_rows(edge, 0, ROW_BYTES, packed, to, _PANEL_WORDS)


@kernel
def _multiply_block(limbs, at, numbers, packed, panel, steps, sums):  # type: ignore[no-untyped-def]
    """The limbs of sixteen rows, times a panel: int32 sums [limb, tile, row, column]."""
    if len(numbers) == 3:
        clear_sums(numbers)
        for k in range(steps):
            left, right = at + k * 3 * TILE_BYTES, panel + 2 * k * TILE_WORDS
            multiply_tiles(limbs, left, numbers, packed, right, right + TILE_WORDS)
        store_sums(sums, 0, numbers)
    else:
        two = 0, 1
        for first in range(0, len(numbers), 2):
            clear_sums(two)
            for k in range(steps):
                left, right = at + (k * len(numbers) + first) * TILE_BYTES, panel + 2 * k * TILE_WORDS
                multiply_tiles(limbs, left, two, packed, right, right + TILE_WORDS)
            store_sums(sums, first * 2 * TILE_WORDS, two)


@kernel
def _multiply_rows(limbs, at, numbers, packed, panel, steps, starts, rows, sums):  # type: ignore[no-untyped-def]
    """`_multiply_block` in vectors, of as many rows as there are; see `dot_products`."""
    one, two = (0,), (0, 1)
    for part in range(2 * len(numbers)):
        start = load(starts, part % 2 * LANES)
        for i in range(rows):
            store(sums, part * TILE_WORDS + i * LANES, start)
    for s in range(0, steps, _NEAR):
        left, right = at + s * len(numbers) * TILE_BYTES, panel + 2 * s * TILE_WORDS
        count = min(_NEAR, steps - s)
        for i in range(0, rows - 1, 2):
            multiply_rows(limbs, left + i * ROW_BYTES, numbers, two, packed, right, count, sums, i * LANES)
        if rows % 2:
            i = rows - 1
            multiply_rows(limbs, left + i * ROW_BYTES, numbers, one, packed, right, count, sums, i * LANES)


@kernel
def _recombine(sums, numbers, factor, q, out, row, column, end, adding, words):  # type: ignore[no-untyped-def]
    """Residues of sixteen rows, as far as there are, and of a panel's columns up to an end."""
    for tile in range(2):
        first = column + tile * TILE_ROWS
        for i in range(min(TILE_ROWS, out.shape[0] - row)):
            at = tile * TILE_WORDS + i * LANES
            residues = _residues_of_sums(sums, at, numbers, factor, q)
            if first + LANES <= end:
                place = (row + i) * out.shape[1] + first
                store(out, place, sums_of(residues, load(out, place), q) if adding else residues)
            else:
                store(words, 0, residues)
                for j in range(end - first):
                    t = uint32(words[j] + (out[row + i, first + j] if adding else uint32(0)))
                    out[row + i, first + j] = min(t, uint32(t - q))


@kernel
def _ask(out, row, column):  # type: ignore[no-untyped-def]
    """Asks for the memory that results will be written to."""
    for r in range(row, min(row + TILE_ROWS, out.shape[0])):
        prefetch(out, r * out.shape[1] + column)
        prefetch(out, r * out.shape[1] + column + LANES)


@kernel
def _multiply(  # type: ignore[no-untyped-def]
    limbs, numbers, factor, q, stored, forward, width, work, out, column, adding, configuration, packed, turn
):
    """Groups of columns by parts of the rows that this thread takes.

    Args:
        limbs, numbers: see `_split`.
        factor, q: see `_residues_of_sums`.
        stored, forward, width: the matrix, as `_pack_outputs` takes it if ``forward``, else `_pack_features`.
        work: columns of a group, and blocks of sixteen rows of a part.
        out: uint32, receives the residues from ``column`` on, or gets them added.
        configuration: of tile registers, or None, where vectors multiply.
        packed: uint32, used meanwhile.
        turn: int64 [1], how often one was taken.
    """
    (blocks, steps), (group, part) = limbs.shape[:2], work
    outputs = stored.shape[0] if forward else width
    groups, parts = -(-outputs // group), -(-blocks // part)
    sums, words = np.empty(2 * len(numbers) * TILE_WORDS, np.int32), np.empty(LANES, np.uint32)
    edge, starts = np.zeros(TILE_BYTES, np.int8), np.empty(group, np.int32)
    if configuration is not None:
        configure(configuration)
    while True:
        taken = take(turn, 1)
        if taken >= groups * parts:
            break
        first, start = taken % groups * group, taken // groups * part
        stop, some = min(start + part, blocks), min(group, outputs - first)
        tiles, panels = -(-some // ROW_BYTES) * 4, -(-some // _PANEL)
        for s in range(0, steps, _STEPS):
            count = min(_STEPS, steps - s)
            if forward:
                _pack_outputs(stored, width, s, count, first, tiles, packed, edge)
            else:
                _pack_features(stored, width, s, count, first, tiles, packed, edge)
            if configuration is None:
                for panel in range(panels):
                    start_sums(packed, panel * _PANEL_WORDS, count, starts, panel * _PANEL)
            for b in range(start, stop, _BLOCKS):
                for panel in range(panels):
                    to = column + first + panel * _PANEL
                    for block in range(b, min(b + _BLOCKS, stop)):
                        row, at = block * TILE_ROWS, (block * steps + s) * len(numbers) * TILE_BYTES
                        _ask(out, row, to)
                        right = panel * _PANEL_WORDS
                        if configuration is None:
                            rows = min(TILE_ROWS, out.shape[0] - row)
                            begin = starts[panel * _PANEL :]
                            _multiply_rows(limbs, at, numbers, packed, right, count, begin, rows, sums)
                        else:
                            _multiply_block(limbs, at, numbers, packed, right, count, sums)
                        end, more = column + outputs, adding or s > 0
                        _recombine(sums, numbers, factor, q, out, row, to, end, more, words)
    if configuration is not None:
        release()


@dataclass(frozen=True, eq=False)
class Prepared:
    """An operand's limbs.

    Attributes:
        rows, columns: of the operand.
        limbs: int8 [blocks of sixteen rows, steps of 64 columns, a tile for each limb], see `_split`.
    """

    rows: int
    columns: int
    limbs: NDArray[np.int8]


class _FusedProduct(Method):
    """An int8 product for each limb, in registers of one kind.

    Attributes:
        configuration: of tile registers, or None, where vectors multiply.
        flip: what turns a limb plus 128, in each of four bytes, into a byte that the registers take.
    """

    configuration: NDArray[np.uint8] | None
    flip: int

    def __init__(self, parameters: ParameterSet) -> None:
        super().__init__(parameters)
        self._lift = np.uint32(parameters.lift)
        self._numbers = tuple(range(parameters.limbs))
        self._factor = np.float32(256.0 ** (parameters.limbs - 1) / parameters.modulus)

    def prepare(self, operand: Residues) -> Prepared:
        rows, columns = operand.shape
        blocks, steps = -(-rows // TILE_ROWS), -(-columns // ROW_BYTES)
        wide, numbers, q, lift = contiguous_rows(operand), self._numbers, self.parameters.q, self._lift
        flip = np.uint32(self.flip)
        limbs = large_matrix(blocks, steps * len(numbers) * TILE_BYTES, np.int8)
        limbs = limbs.reshape(blocks, steps, len(numbers) * TILE_BYTES)
        for_row_blocks(
            blocks,
            TILE_ROWS * columns,
            lambda a, b: _split(wide, columns, numbers, lift, q, flip, limbs, a, b),
        )
        return Prepared(rows, columns, limbs)

    def multiply(self, prepared: Any, matrix: torch.Tensor) -> Residues:
        out = large_matrix(prepared.rows, matrix.shape[1], np.uint32)
        self.multiply_into(out, 0, prepared, matrix)
        return out

    def multiply_into(
        self, out: Residues, column: int, prepared: Any, *matrices: torch.Tensor, adding: bool = False
    ) -> None:
        matrix = stacked(matrices)
        contraction, outputs = matrix.shape
        if contraction != prepared.columns:
            raise ValueError(f"an operand of {prepared.columns} columns by a matrix of {contraction} rows")
        if not out.flags.c_contiguous or len(out) != prepared.rows or out.shape[1] < column + outputs:
            raise ValueError(f"no room for {prepared.rows} rows of {outputs} columns from column {column} on")
        forward = matrix.stride(0) == 1
        stored = (matrix.t() if forward else matrix).numpy()
        rows, width, limbs = contiguous_rows(stored), stored.shape[1], prepared.limbs
        group, part = self._work(outputs, len(limbs))

        def some(turn: NDArray[np.int64]) -> None:
            packed = large_matrix(1, group // _PANEL * _PANEL_WORDS, np.uint32)[0]
            work, product = (group, part), (limbs, self._numbers, self._factor, self.parameters.q)
            into = out, column, adding, self.configuration
            _multiply(*product, rows, forward, width, work, *into, packed, turn)

        # A block costs the same however many of its rows there are.
        products = group * contraction * min(part, len(limbs)) * TILE_ROWS
        for_rows_in_turn(-(-outputs // group) * -(-len(limbs) // part), products, some, _PAYING)

    def _work(self, outputs: int, blocks: int) -> tuple[int, int]:
        """Columns and blocks of rows that a thread takes at once, so that all threads have some."""
        threads = torch.get_num_threads()
        group = min(_GROUP, -(-outputs // (_GROUPS_A_THREAD * threads * ROW_BYTES)) * ROW_BYTES)
        parts = max(1, threads // -(-outputs // group))
        return group, max(_BLOCKS, -(-blocks // parts))


class TileProduct(_FusedProduct):
    """In the tile registers of a processor that has them (Intel AMX).

    Raises:
        RuntimeError: there are none, or they may not be used.
    """

    name = "int8-amx"
    configuration = CONFIGURATION
    flip = _BYTES_OF_128

    def __init__(self, parameters: ParameterSet) -> None:
        super().__init__(parameters)
        if not are_usable():
            raise RuntimeError("this processor has no int8 tiles, or they may not be used")


class VectorProduct(_FusedProduct):
    """In the vectors of a processor that adds up products of bytes in 32 bits (AVX-512 VNNI).

    Raises:
        RuntimeError: it does not.
    """

    name = "int8-vnni"
    configuration = None
    flip = 0

    def __init__(self, parameters: ParameterSet) -> None:
        super().__init__(parameters)
        if not have_dot_products():
            raise RuntimeError("this processor has no AVX-512 VNNI, or the compiler was told so")
