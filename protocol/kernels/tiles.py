"""Tile registers of a processor (Intel AMX), as operations that kernels are made of; see `vectors`.

A tile holds sixteen rows of 64 bytes. One instruction adds a product of two of them to a third:

    sums[i, j] += sum over k of left[i, k] right[k, j]       int32 [16, 16], int8 [16, 64], int8 [64, 16]

The right one lies in memory as rows of 16 columns times 4 bytes: byte 4 j + k' of row k is
right[4 k + k', j]. Registers belong to a thread. They keep their content from `configure` to `release`, and
meanwhile a kernel calls nothing that uses them in another way.
"""

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numpy.typing import NDArray

from blindtune.protocol.kernels.vectors import LANES, address_of, require_elements, transposed, words_type

__all__ = [
    "CONFIGURATION",
    "TILE_BYTES",
    "TILE_WORDS",
    "are_usable",
    "clear_sums",
    "configure",
    "multiply_tiles",
    "pack_columns",
    "pack_four_rows",
    "release",
    "store_apart",
    "store_sums",
]

TILE_ROWS, ROW_BYTES = 16, 64
TILE_BYTES = TILE_ROWS * ROW_BYTES
TILE_WORDS = TILE_BYTES // 4

# Registers of sums, left tiles and right ones, by how many left tiles meet two right ones at once.
_REGISTERS = {2: ((0, 1, 2, 3), (4, 5), (6, 7)), 3: ((0, 1, 2, 3, 4, 5), (6,), (7,))}

_I8, _I32, _I64, _VOID = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.VoidType()


def _configuration() -> NDArray[np.uint8]:
    """Palette 1, and for all eight registers bytes of a row and rows, where the processor looks for them."""
    configuration = np.zeros(64, np.uint8)
    configuration[0] = 1
    configuration[16:32].view(np.uint16)[:] = ROW_BYTES
    configuration[48:56] = TILE_ROWS
    configuration.flags.writeable = False
    return configuration


CONFIGURATION = _configuration()
"""What `configure` takes."""


def are_usable() -> bool:
    """Whether kernels may use tiles here: the processor and the compiler have them, and the system lets us.

    Linux gives a process these registers when it asks for them, which torch does.
    """
    features = str(cpu_target.target_context.codegen().magic_tuple()[2])
    have = {"+amx-tile", "+amx-int8", "+avx512f", "+avx512bw"} <= set(features.split(","))
    ask = getattr(torch.cpu, "_init_amx", None)  # where a release of torch has it not, tiles are not used
    return have and ask is not None and bool(ask())


def _instruction(builder: ir.IRBuilder, name: str, *arguments: ir.Value) -> None:
    kind = ir.FunctionType(_VOID, [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)


def _register(number: int) -> ir.Constant:
    return ir.Constant(_I8, number)


def _tile(builder: ir.IRBuilder, instruction: str, register: int, address: ir.Value) -> None:
    """A tile between a register and memory, where its rows lie one after the other."""
    _instruction(builder, instruction, _register(register), address, ir.Constant(_I64, ROW_BYTES))


@intrinsic
def configure(context, configuration):  # type: ignore[no-untyped-def]
    """Begins to use the registers."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        start = address_of(context, builder, configuration, (values[0], ir.Constant(_I64, 0)), _I8)
        _instruction(builder, "ldtilecfg", start)
        return context.get_dummy_value()

    return types.void(configuration), generate


@intrinsic
def release(context):  # type: ignore[no-untyped-def]
    """Ends the use of the registers, whose 8 KiB the system would else save whenever it changes threads."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        _instruction(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


def _registers(numbers: types.BaseTuple) -> tuple[tuple[int, ...], ...]:
    if len(numbers) not in _REGISTERS:
        raise TypingError(f"{len(numbers)} left tiles do not fit the registers")
    return _REGISTERS[len(numbers)]


@intrinsic
def clear_sums(context, numbers):  # type: ignore[no-untyped-def]
    """Sets the sums of `multiply_tiles` to zero; for ``numbers``, see there."""
    sums, _, _ = _registers(numbers)

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        for register in sums:
            _instruction(builder, "tilezero", _register(register))
        return context.get_dummy_value()

    return types.void(numbers), generate


@intrinsic
def multiply_tiles(context, left, at, numbers, right, one, other):  # type: ignore[no-untyped-def]
    """Adds the products of two or three tiles, one behind the other, with each of two, to tiles of sums.

    Args:
        left: int8.
        at: the first one's first byte.
        numbers: of the left tiles, a tuple, whose length the compiler knows.
        right: uint32.
        one, other: the two others' first words.
    """
    require_elements(left, types.int8)
    require_elements(right, types.uint32)

    sums, lefts, rights = _registers(numbers)

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        def load(register: int, array_type: types.Array, array: ir.Value, number: ir.Value) -> None:
            start = address_of(context, builder, array_type, (array, number), _I8)
            _tile(builder, "tileloadd64", register, start)

        def load_left(i: int) -> None:
            number = builder.add(values[1], ir.Constant(values[1].type, i * TILE_BYTES))
            load(lefts[i % len(lefts)], left, values[0], number)

        def load_right(j: int) -> None:
            load(rights[j % len(rights)], right, values[3], values[4 + j])

        def multiply(i: int, j: int) -> None:
            operands = sums[2 * i + j], lefts[i % len(lefts)], rights[j % len(rights)]
            _instruction(builder, "tdpbssd", *map(_register, operands))

        if len(lefts) == len(numbers):
            for j in range(2):
                load_right(j)
            for i in range(len(numbers)):
                load_left(i)
                for j in range(2):
                    multiply(i, j)
        else:
            # One register serves all left tiles in turn, and is loaded while products are under way.
            for j in range(2):
                load_right(j)
                for i in range(len(numbers)):
                    load_left(i)
                    multiply(i, j)
        return context.get_dummy_value()

    return types.void(left, types.intp, numbers, right, types.intp, types.intp), generate


@intrinsic
def store_sums(context, sums, at, numbers):  # type: ignore[no-untyped-def]
    """Puts the sums of the first left tile with both right ones, and then the next one's, into an array.

    Args:
        sums: int32, with room for two tiles of each left one from ``at`` on.
        at: an index.
        numbers: as for `multiply_tiles`.
    """
    require_elements(sums, types.int32)
    registers, _, _ = _registers(numbers)

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        for i, register in enumerate(registers):
            number = builder.add(values[1], ir.Constant(values[1].type, i * TILE_WORDS))
            _tile(
                builder,
                "tilestored64",
                register,
                address_of(context, builder, sums, (values[0], number), _I8),
            )
        return context.get_dummy_value()

    return types.void(sums, types.intp, numbers), generate


def _loaded(context, builder, array_type, values, count):  # type: ignore[no-untyped-def]
    """Some rows of 64 bytes of an array, from a byte on; values are the array, the byte and the pitch."""
    number, rows = values[1], []
    for _ in range(count):
        address = address_of(context, builder, array_type, (values[0], number), words_type.value)
        rows.append(builder.load(address, align=1))
        number = builder.add(number, values[2])
    return rows


def _stored(context, builder, array_type, values, rows):  # type: ignore[no-untyped-def]
    """Puts vectors of words into an array; values are the array, the first word and words to the next."""
    number = values[1]
    for row in rows:
        address = address_of(context, builder, array_type, (values[0], number), row.type)
        builder.store(row, address, align=4)
        number = builder.add(number, values[2])


@intrinsic
def pack_columns(context, array, at, pitch, packed, to):  # type: ignore[no-untyped-def]
    """Packs a right tile whose columns are sixteen rows of 64 bytes.

    Args:
        array: int8.
        at: the first row's first byte.
        pitch: bytes from row to row.
        packed: uint32, receives the tile.
        to: its first word.
    """
    require_elements(array, types.int8)

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        rows = transposed(builder, _loaded(context, builder, array, values, TILE_ROWS))
        _stored(context, builder, packed, (*values[3:], ir.Constant(_I64, LANES)), rows)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, packed, types.intp), generate


@intrinsic
def pack_four_rows(context, array, at, pitch, packed, to, apart):  # type: ignore[no-untyped-def]
    """Packs four rows of 64 bytes: one row of four right tiles.

    Args:
        array, at, pitch, packed: as for `pack_columns`.
        to: that row's first word in the first tile, behind which lies the second.
        apart: words from the first tile to the third, behind which lies the fourth.
    """
    require_elements(array, types.int8)

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        def both(a: ir.Value, b: ir.Value, size: int) -> list[ir.Value]:
            """Elements of so many bytes by turns: of the first halves of all 16 bytes, and of the second."""
            vector, lane = ir.VectorType(ir.IntType(8 * size), ROW_BYTES // size), LANES // size
            a, b = builder.bitcast(a, vector), builder.bitcast(b, vector)
            found = []
            for first in (0, lane // 2):
                order = [
                    start + first + i + vector.count * k
                    for start in range(0, vector.count, lane)
                    for i in range(lane // 2)
                    for k in range(2)
                ]
                order_of = ir.Constant(ir.VectorType(_I32, len(order)), order)
                found.append(builder.shuffle_vector(a, b, order_of))
            return found

        rows = _loaded(context, builder, array, values, 4)
        (a, b), (c, d) = both(rows[0], rows[1], 1), both(rows[2], rows[3], 1)
        # Vector k holds columns 4 k ... 4 k + 3 of each sixteen.
        columns = [builder.bitcast(x, words_type.value) for x in (*both(a, c, 2), *both(b, d, 2))]
        tiles, next_tile = _lanes(builder, columns), ir.Constant(_I64, TILE_WORDS)
        _stored(context, builder, packed, (values[3], values[4], next_tile), tiles[:2])
        third = builder.add(values[4], values[5])
        _stored(context, builder, packed, (values[3], third, next_tile), tiles[2:])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, packed, types.intp, types.intp), generate


def _lanes(builder: ir.IRBuilder, x: list[ir.Value]) -> list[ir.Value]:
    """Transposes four vectors, of four times four words each."""

    def chosen(a: ir.Value, b: ir.Value, lanes: tuple[int, ...]) -> ir.Value:
        order = [4 * lane + i for lane in lanes for i in range(4)]
        return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, LANES), order))

    even, odd = (0, 2, 4, 6), (1, 3, 5, 7)
    first = [chosen(x[i], x[i + 1], lanes) for lanes in (even, odd) for i in (0, 2)]
    # first: lanes 0 and 2 of vectors 0, 1; of 2, 3; lanes 1 and 3 of 0, 1; of 2, 3.
    pairs = [(first[0], first[1]), (first[2], first[3])]
    low = [chosen(a, b, even) for a, b in pairs]
    high = [chosen(a, b, odd) for a, b in pairs]
    return [low[0], low[1], high[0], high[1]]


@intrinsic
def store_apart(context, array, at, pitch, numbers, words):  # type: ignore[no-untyped-def]
    """Bytes 0 of sixteen words go to bytes ``at ... at + 15`` of an int8 array, bytes 1 ``pitch`` on, ...

    As many as a tuple has numbers.
    """
    require_elements(array, types.int8)

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        every, some = (ir.VectorType(_I8, n * LANES) for n in (4, 1))
        bytes_of_words, number = builder.bitcast(values[4], every), values[1]
        for k in range(len(numbers)):
            order = ir.Constant(ir.VectorType(_I32, LANES), [4 * j + k for j in range(LANES)])
            chosen = builder.shuffle_vector(bytes_of_words, ir.Constant(every, ir.Undefined), order)
            address = address_of(context, builder, array, (values[0], number), some)
            builder.store(chosen, address, align=1)
            number = builder.add(number, values[2])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, numbers, words_type), generate
