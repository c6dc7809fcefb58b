"""Int8 weights out of four-bit codes, some rows and columns at a time.

    integers[j, i] = the integer nearest to TABLE[code] * absmax[block] / scale[j],   at most 127 in magnitude

A block has one scale and lies in few rows, so that sixteen products and quotients give all integers that it
can hold, and each code looks its own up: sixteen bytes at a time, where there is an instruction for it.
"""

import numpy as np
from llvmlite import ir
from numba import float32, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from blindtune.protocol.kernels.compiled import kernel
from blindtune.protocol.kernels.vectors import address_of, splat

__all__ = ["BLOCK", "DOUBLE_BLOCK", "four_bit_integers"]

BLOCK = 64
"""Elements that share a scale."""

DOUBLE_BLOCK = 256
"""Scales that share a scale, where they are quantized, too."""

_I8 = ir.IntType(8)
_SIXTEEN = ir.VectorType(_I8, 16)
# The instruction of x86 of 2006; other processors look up one byte at a time.
_TOGETHER = "+ssse3" in str(cpu_target.target_context.codegen().magic_tuple()[2]).split(",")


@intrinsic
def _look_up(context, codes, at, integers, out, to):  # type: ignore[no-untyped-def]
    """Sixteen bytes of codes, the first one in the high half, to 32 integers of sixteen."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        zero = ir.Constant(values[1].type, 0)
        packed = builder.load(address_of(context, builder, codes, values[:2], _SIXTEEN), align=1)
        table = builder.load(address_of(context, builder, integers, (values[2], zero), _SIXTEEN), align=1)
        four, fifteen = (ir.Constant(_SIXTEEN, [x] * 16) for x in (4, 15))
        kind = ir.FunctionType(_SIXTEEN, [_SIXTEEN, _SIXTEEN])
        shuffle = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.ssse3.pshuf.b.128")
        first = builder.call(shuffle, [table, builder.lshr(packed, four)])
        second = builder.call(shuffle, [table, builder.and_(packed, fifteen)])
        pairs = ir.VectorType(_I8, 32)
        order = ir.Constant(ir.VectorType(ir.IntType(32), 32), [i // 2 + 16 * (i % 2) for i in range(32)])
        mixed = builder.shuffle_vector(first, second, order)
        builder.store(mixed, address_of(context, builder, out, values[3:], pairs), align=1)
        return context.get_dummy_value()

    return types.void(codes, at, integers, out, to), generate


@intrinsic
def _fill(context, table, scale, divisor, integers):  # type: ignore[no-untyped-def]
    """The integers of sixteen codes: a product and a quotient of float32, each rounded, then the nearest."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        zero, vector = ir.Constant(ir.IntType(64), 0), ir.VectorType(ir.FloatType(), 16)
        words = ir.VectorType(ir.IntType(32), 16)
        numbers = builder.load(address_of(context, builder, table, (values[0], zero), vector), align=4)
        product = builder.fmul(numbers, splat(builder, values[1], vector))
        quotient = builder.fdiv(product, splat(builder, values[2], vector))
        kind = ir.FunctionType(vector, [vector])
        nearest = cgutils.get_or_insert_function(builder.module, kind, "llvm.rint.v16f32")
        found = builder.fptosi(builder.call(nearest, [quotient]), words)
        for sign, limit in (("<", -127), (">", 127)):
            most = ir.Constant(words, [limit] * 16)
            found = builder.select(builder.icmp_signed(sign, found, most), most, found)
        address = address_of(context, builder, integers, (values[3], zero), _SIXTEEN)
        builder.store(builder.trunc(found, _SIXTEEN), address, align=1)
        return context.get_dummy_value()

    return types.void(table, scale, divisor, integers), generate


@kernel
def _scale_of(stored, largest, offset, dynamic, block):  # type: ignore[no-untyped-def]
    if largest is None:
        return stored[block]
    return float32(float32(dynamic[stored[block]] * largest[block // DOUBLE_BLOCK]) + offset)


@kernel
def _integers(codes, stored, largest, offset, dynamic, table, scales, in_features, first, out, start, stop):  # type: ignore[no-untyped-def]
    (row, column), width = first, out.shape[1]
    pitch = out.strides[0]
    flat = as_strided(out, ((out.shape[0] - 1) * pitch + width,), (1,))
    integers = np.empty(16, np.int8)
    for r in range(start, stop):
        begin = (row + r) * in_features + column
        at = begin
        while at < begin + width:
            block = at // BLOCK
            end = min(begin + width, (block + 1) * BLOCK)
            _fill(table, _scale_of(stored, largest, offset, dynamic, block), scales[row + r], integers)
            to = r * pitch + at - begin
            if _TOGETHER and end - at == BLOCK:
                _look_up(codes, at // 2, integers, flat, to)
                _look_up(codes, at // 2 + 16, integers, flat, to + 32)
            else:
                for i in range(at, end):
                    code = np.int64(codes[i // 2])
                    out[r, i - begin] = integers[code & 15 if i % 2 else code >> 4]
            at = end


def four_bit_integers(
    codes: NDArray[np.uint8],
    stored: NDArray[np.float32] | NDArray[np.uint8],
    nested: tuple[NDArray[np.float32], np.float32, NDArray[np.float32]] | None,
    table: NDArray[np.float32],
    scales: NDArray[np.float32],
    in_features: int,
    first: tuple[int, int],
    out: NDArray[np.int8],
    start: int,
    stop: int,
) -> None:
    """Fills rows ``start ... stop - 1`` of a matrix, in this thread and without the interpreter lock.

    Args:
        codes: two a byte, the first one in the high half, in the order of rows.
        stored: scales of blocks of 64 codes; or codes of them, with ``nested``.
        nested: what 256 codes of scales are multiplied by, what is added then, and what they stand for.
        table: the sixteen values of codes.
        scales: of each row, what it is divided by.
        in_features: codes in a row.
        first: the first row and column of the part that ``out`` is.
        out: int8 [rows, columns], the elements of a row side by side.
    """
    largest, offset, dynamic = (None, np.float32(0), table) if nested is None else nested
    _integers(codes, stored, largest, offset, dynamic, table, scales, in_features, first, out, start, stop)
