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

from blindtune.protocol.vectors import LANES, words_type

__all__ = [
    "CONFIGURATION",
    "TILE_BYTES",
    "TILE_WORDS",
    "are_usable",
    "clear_sums",
    "configure",
    "load_interleaved",
    "load_row",
    "multiply_tiles",
    "release",
    "store_apart",
    "store_sums",
]

TILE_ROWS, ROW_BYTES = 16, 64
TILE_BYTES = TILE_ROWS * ROW_BYTES
TILE_WORDS = TILE_BYTES // 4

_SUMS, _LEFT, _RIGHT = (0, 1, 2, 3), (4, 5), (6, 7)  # registers

_I8, _I32, _I64, _VOID = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.VoidType()
_ADDRESS = _I8.as_pointer()


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
    return have and bool(getattr(torch.cpu, "_init_amx", bool)())


def _instruction(builder: ir.IRBuilder, name: str, *arguments: ir.Value) -> None:
    kind = ir.FunctionType(_VOID, [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)


def _register(number: int) -> ir.Constant:
    return ir.Constant(_I8, number)


def _address(context, builder, array_type, array, at):  # type: ignore[no-untyped-def]
    """Where an element of an array lies, which is indexed as if it had one dimension."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), _ADDRESS)


def _require_bytes(array: types.Array) -> None:
    if array.dtype is not types.int8:
        raise TypingError(f"bytes are int8, not {array.dtype}")


def _tile(builder: ir.IRBuilder, instruction: str, register: int, address: ir.Value) -> None:
    """A tile between a register and memory, where its rows lie one after the other."""
    _instruction(builder, instruction, _register(register), address, ir.Constant(_I64, ROW_BYTES))


@intrinsic
def configure(context, configuration):  # type: ignore[no-untyped-def]
    """Begins to use the registers."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        start = _address(context, builder, configuration, values[0], ir.Constant(_I64, 0))
        _instruction(builder, "ldtilecfg", start)
        return context.get_dummy_value()

    return types.void(configuration), generate


@intrinsic
def release(context):  # type: ignore[no-untyped-def]
    """Ends the use of the registers, which the system saves whenever it changes threads."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        _instruction(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def clear_sums(context):  # type: ignore[no-untyped-def]
    """Sets the sums of `multiply_tiles` to zero."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        for register in _SUMS:
            _instruction(builder, "tilezero", _register(register))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def multiply_tiles(context, left, at, right, one, other):  # type: ignore[no-untyped-def]
    """Adds the products of two tiles, one behind the other, with each of two, to four tiles of sums.

    Args:
        left: int8.
        at: the first one's first byte.
        right: uint32.
        one, other: the two others' first words.
    """
    if left.dtype is not types.int8 or right.dtype is not types.uint32:
        raise TypingError(f"tiles are int8 and uint32, not {left.dtype} and {right.dtype}")

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        for register, number in zip(_RIGHT, values[3:], strict=True):
            start = _address(context, builder, right, values[2], number)
            _tile(builder, "tileloadd64", register, start)
        for i, register in enumerate(_LEFT):
            number = builder.add(values[1], ir.Constant(values[1].type, i * TILE_BYTES))
            _tile(builder, "tileloadd64", register, _address(context, builder, left, values[0], number))
            for j in range(len(_RIGHT)):
                operands = _SUMS[len(_RIGHT) * i + j], register, _RIGHT[j]
                _instruction(builder, "tdpbssd", *map(_register, operands))
        return context.get_dummy_value()

    return types.void(left, types.intp, right, types.intp, types.intp), generate


@intrinsic
def store_sums(context, sums, at):  # type: ignore[no-untyped-def]
    """Puts the sums of the first left tile with both right ones, and then the second's, into an array.

    Args:
        sums: int32, with room for four tiles from ``at`` on.
        at: an index.
    """
    if sums.dtype is not types.int32:
        raise TypingError(f"sums are int32, not {sums.dtype}")

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        for i, register in enumerate(_SUMS):
            number = builder.add(values[1], ir.Constant(values[1].type, i * TILE_WORDS))
            _tile(builder, "tilestored64", register, _address(context, builder, sums, values[0], number))
        return context.get_dummy_value()

    return types.void(sums, types.intp), generate


@intrinsic
def load_row(context, array, at):  # type: ignore[no-untyped-def]
    """64 bytes of an int8 array, as words."""
    _require_bytes(array)

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        address = _address(context, builder, array, *values)
        return builder.load(builder.bitcast(address, words_type.value.as_pointer()), align=1)

    return words_type(array, types.intp), generate


@intrinsic
def load_interleaved(context, array, at, pitch):  # type: ignore[no-untyped-def]
    """Sixteen bytes of each of four rows of an int8 array, ``pitch`` apart: word j holds all bytes j."""
    _require_bytes(array)

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        some, pairs = (ir.VectorType(_I8, n * LANES) for n in (1, 2))
        number, rows = values[1], []
        for _ in range(4):
            address = _address(context, builder, array, values[0], number)
            rows.append(builder.load(builder.bitcast(address, some.as_pointer()), align=1))
            number = builder.add(number, values[2])
        for vector in (some, pairs):
            order = ir.Constant(ir.VectorType(_I32, 2 * vector.count), list(range(2 * vector.count)))
            rows = [builder.shuffle_vector(*rows[i : i + 2], order) for i in range(0, len(rows), 2)]
        in_order = rows[0]
        turned = [LANES * k + j for j in range(LANES) for k in range(4)]
        order = ir.Constant(ir.VectorType(_I32, 4 * LANES), turned)
        undefined = ir.Constant(in_order.type, ir.Undefined)
        return builder.bitcast(builder.shuffle_vector(in_order, undefined, order), words_type.value)

    return words_type(array, types.intp, types.intp), generate


@intrinsic
def store_apart(context, array, at, pitch, words):  # type: ignore[no-untyped-def]
    """Bytes 0 of sixteen words go to bytes ``at ... at + 15`` of an int8 array, bytes 1 ``pitch`` on, ..."""
    _require_bytes(array)

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        every, some = (ir.VectorType(_I8, n * LANES) for n in (4, 1))
        bytes_of_words, number = builder.bitcast(values[3], every), values[1]
        for k in range(4):
            order = ir.Constant(ir.VectorType(_I32, LANES), [4 * j + k for j in range(LANES)])
            chosen = builder.shuffle_vector(bytes_of_words, ir.Constant(every, ir.Undefined), order)
            address = _address(context, builder, array, values[0], number)
            builder.store(chosen, builder.bitcast(address, some.as_pointer()), align=1)
            number = builder.add(number, values[2])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, words_type), generate
