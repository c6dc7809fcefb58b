"""Sixteen float64 numbers side by side, as values that kernels compute with; see `vectors`.

A kernel's loop over float32 elements converts, computes in float64 and converts back. Written for single
elements, the compiler makes vectors of it that are half as wide as the processor's.

Every operation rounds as the standard says (IEEE 754, to nearest, ties to even), and none are contracted, so
that the results are those of a loop over single elements, bit for bit.
"""

from functools import reduce

from llvmlite import ir
from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic, register_model

from blindtune.protocol.kernels.vectors import (
    LANES,
    Vector,
    VectorModel,
    address_of,
    half_type,
    operation,
    splat,
    words_type,
)

__all__ = [
    "add_reals",
    "floats",
    "high_of_half",
    "load_reals",
    "multiply_reals",
    "nearest",
    "nearest_reals",
    "real",
    "repeated_real",
    "store_reals",
    "subtract_reals",
    "total_of_half",
]

_REALS = ir.VectorType(ir.DoubleType(), LANES)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_LONGS = ir.VectorType(ir.IntType(64), LANES)
_INTEGERS = ir.VectorType(ir.IntType(32), LANES)
_SHIFT = 1.5 * 2.0**52
"""Among numbers this large neighbours differ by one, and the lowest 32 bits count them."""


class _Reals(Vector):
    pass


register_model(_Reals)(VectorModel)
_reals = _Reals("sixteen reals", _REALS)


def _require_floats(array: types.Array) -> None:
    if array.dtype not in (types.float32, types.float64):
        raise TypingError(f"elements of type {array.dtype} are neither float32 nor float64")


@intrinsic
def load_reals(context, array, at):  # type: ignore[no-untyped-def]
    """Elements ``at ... at + 15`` of an array of float32 or float64."""
    _require_floats(array)
    vector = _REALS if array.dtype is types.float64 else _FLOATS

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        loaded = builder.load(address_of(context, builder, array, values, vector), align=4)
        return loaded if vector is _REALS else builder.fpext(loaded, _REALS)

    return _reals(array, types.intp), generate


@intrinsic
def store_reals(context, array, at, numbers):  # type: ignore[no-untyped-def]
    """Puts sixteen elements into an array of float32 or float64, rounded to its type."""
    _require_floats(array)
    vector = _REALS if array.dtype is types.float64 else _FLOATS

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        numbers = values[2] if vector is _REALS else builder.fptrunc(values[2], vector)
        builder.store(numbers, address_of(context, builder, array, values, vector), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, _reals), generate


@operation(words_type, _reals)
def floats(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    """The words of sixteen numbers rounded to float32."""
    return builder.bitcast(builder.fptrunc(a, _FLOATS), _INTEGERS)


@operation(_reals, types.float64)
def repeated_real(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """One number sixteen times."""
    return splat(builder, value, _REALS)


@operation(_reals, _reals, _reals)
def add_reals(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Sums."""
    return builder.fadd(a, b)


@operation(_reals, _reals, _reals)
def subtract_reals(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Differences."""
    return builder.fsub(a, b)


@operation(_reals, _reals, _reals)
def multiply_reals(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Products."""
    return builder.fmul(a, b)


@operation(words_type, _reals)
def nearest(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    """The nearest integers, of ties the even one, for magnitudes up to 2^31 - 1."""
    shifted = builder.fadd(a, ir.Constant(_REALS, [_SHIFT] * LANES))
    # Left to itself, the compiler truncates halves and puts them together: five times as many instructions.
    words = ir.VectorType(ir.IntType(32), 2 * LANES)
    low = ir.Constant(_INTEGERS, list(range(0, 2 * LANES, 2)))
    return builder.shuffle_vector(builder.bitcast(shifted, words), ir.Constant(words, ir.Undefined), low)


@operation(_reals, _reals)
def nearest_reals(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    """The integers of `nearest` as real numbers."""
    shift = ir.Constant(_REALS, [_SHIFT] * LANES)
    return builder.fsub(builder.fadd(a, shift), shift)


@operation(_reals, words_type)
def real(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    """Signed integers as real numbers."""
    return builder.sitofp(a, _REALS)


@operation(half_type, half_type)
def high_of_half(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    """The high words of a half as its low ones."""
    return builder.lshr(a, ir.Constant(half_type.value, [32] * (LANES // 2)))


@operation(types.uint64, half_type)
def total_of_half(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    """The sum of the eight integers mod 2^64."""
    lanes = [builder.extract_element(a, ir.Constant(ir.IntType(32), i)) for i in range(LANES // 2)]
    return reduce(builder.add, lanes)
