"""Sixteen 32-bit words side by side, as values that kernels compute with.

Left to itself, the compiler halves the width of instructions on many processors whose full width is
faster here, and widens words before it multiplies them although products of words with even and with odd
numbers need no widening. So these operations are vectors of LLVM from the start. Every processor has
them, in as many instructions as it needs.

Words are integers modulo 2^32. *Halves* are eight 64-bit integers, one for each word of even number or
one for each of odd number; of two halves, the even one comes first.

Arrays are contiguous and indexed as if they had one dimension. As in C, nothing checks that there is room
for sixteen words at an index.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.errors import TypingError
from numba.extending import intrinsic, register_jitable, register_model

__all__ = [
    "AHEAD",
    "LANES",
    "add",
    "aligned",
    "at_least",
    "bits_and",
    "bits_xor",
    "count_ones",
    "even_words",
    "fence",
    "greatest",
    "high_words",
    "least",
    "load",
    "load_bytes",
    "load_halves",
    "low_words",
    "multiply",
    "multiply_low",
    "multiply_signed",
    "numbered",
    "odd_words",
    "prefetch",
    "repeated",
    "repeated_half",
    "rotate_left",
    "shift_left",
    "shift_right",
    "shift_right_signed",
    "store",
    "store_aside",
    "store_in_order",
    "store_transposed",
    "subtract",
    "subtract_bytes",
]
# `reals` and `tiles` build their operations from these too: address_of, half_type, operation,
# require_elements, splat, transposed, Vector, VectorModel, words_type. Kernels have no use for them.

LANES = 16
"""Words in a vector."""

AHEAD = 1 << 12
"""How many elements ahead to ask for memory that is read or written in order. Left to itself, a processor
does not look beyond a page."""

_I32 = ir.IntType(32)
_WORDS = ir.VectorType(_I32, LANES)
_HALF = ir.VectorType(ir.IntType(64), LANES // 2)
_BYTES = ir.VectorType(ir.IntType(8), 4 * LANES)


class Vector(types.Type):
    """The type, in numba, of values that are one vector of LLVM."""

    def __init__(self, name: str, value: ir.VectorType) -> None:
        super().__init__(name)
        self.value = value


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """Such a value is kept as the vector itself."""

    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.value)


words_type = Vector("sixteen words", _WORDS)
"""Sixteen words."""

half_type = Vector("eight of sixteen words", _HALF)
"""A half."""


def operation(result: types.Type, *arguments: types.Type) -> Callable[[Callable[..., Any]], Any]:
    """What kernels call: values of these types, and the LLVM instructions that a function builds."""

    def decorate(build: Callable[..., Any]) -> Any:
        def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
            return build(builder, *values)

        # numba counts the parameters of what it calls.
        if len(arguments) == 1:
            return intrinsic(lambda context, a: (result(*arguments), generate))
        return intrinsic(lambda context, a, b: (result(*arguments), generate))

    return decorate


def splat(builder: ir.IRBuilder, value: ir.Value, vector: ir.VectorType) -> ir.Value:
    """Instructions that put one element into all places of a vector."""
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


def _constant(value: int, vector: ir.VectorType) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def address_of(context, builder, array_type, values, vector):  # type: ignore[no-untyped-def]
    """Where the vector from an element on lies; values are those of the array and of the element's number."""
    data = context.make_array(array_type)(context, builder, values[0]).data
    return builder.bitcast(builder.gep(data, [values[1]]), vector.as_pointer())


def require_elements(array: types.Array, *allowed: types.Type) -> None:
    if array.dtype not in allowed:
        raise TypingError(f"elements of type {array.dtype} are not {' or '.join(map(str, allowed))}")


@register_jitable
def aligned(words):  # type: ignore[no-untyped-def]
    """New words of any content, uint32, that begin where a line of the cache does, within kernels.

    A vector that lies across two lines takes twice as long to load or store.
    """
    memory = np.empty(words + LANES, np.uint32)
    skip = (-memory.ctypes.data // 4) % LANES
    return memory[skip : skip + words]


@intrinsic
def load(context, array, at):  # type: ignore[no-untyped-def]
    """Words ``at ... at + 15`` of an array of 32-bit integers."""
    require_elements(array, types.int32, types.uint32)

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        return builder.load(address_of(context, builder, array, values, _WORDS), align=4)

    return words_type(array, types.intp), generate


@intrinsic
def load_bytes(context, array, at):  # type: ignore[no-untyped-def]
    """The int8 elements ``at ... at + 15`` of an array, as words of the same sign."""
    require_elements(array, types.int8)

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        sixteen = ir.VectorType(ir.IntType(8), LANES)
        address = address_of(context, builder, array, values, sixteen)
        return builder.sext(builder.load(address, align=1), _WORDS)

    return words_type(array, types.intp), generate


@intrinsic
def load_halves(context, array, at):  # type: ignore[no-untyped-def]
    """The int64 elements ``at ... at + 7`` of an array."""
    require_elements(array, types.int64)

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        return builder.load(address_of(context, builder, array, values, _HALF), align=8)

    return half_type(array, types.intp), generate


@intrinsic
def store(context, array, at, words):  # type: ignore[no-untyped-def]
    """Puts 64 bytes into an array from element ``at`` on."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        address = address_of(context, builder, array, values, _WORDS)
        builder.store(values[2], address, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, words_type), generate


@intrinsic
def store_aside(context, array, at, words):  # type: ignore[no-untyped-def]
    """`store` past the caches, where the address is that of a whole line: nothing is read, nothing displaced.

    For matrices larger than caches. Other threads see it after a `fence`.
    """

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        address = address_of(context, builder, array, values, _WORDS)
        line = builder.and_(builder.ptrtoint(address, ir.IntType(64)), ir.Constant(ir.IntType(64), 63))
        whole = builder.icmp_unsigned("==", line, ir.Constant(ir.IntType(64), 0))
        with builder.if_else(whole, likely=True) as (then, otherwise):
            with then:
                stored = builder.store(values[2], address, align=64)
                one = builder.module.add_metadata([ir.Constant(_I32, 1)])
                stored.set_metadata("nontemporal", one)
            with otherwise:
                builder.store(values[2], address, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, words_type), generate


@intrinsic
def fence(context):  # type: ignore[no-untyped-def]
    """Whoever learns of later stores sees earlier ones, those of `store_aside` too."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


def _store_sixteen(context, builder, array, values, vectors):  # type: ignore[no-untyped-def]
    """Puts vectors one behind the other; values are the array and the first one's first element."""
    index = values[1]
    for vector in vectors:
        builder.store(vector, address_of(context, builder, array, (values[0], index), _WORDS), align=4)
        index = builder.add(index, ir.Constant(index.type, LANES))
    return context.get_dummy_value()


@intrinsic
def store_in_order(context, array, at, vectors):  # type: ignore[no-untyped-def]
    """Puts the words of sixteen vectors, a tuple, into an array from element ``at`` on."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        unpacked = cgutils.unpack_tuple(builder, values[2])
        return _store_sixteen(context, builder, array, values, unpacked)

    return types.void(array, types.intp, vectors), generate


@intrinsic
def store_transposed(context, array, at, vectors):  # type: ignore[no-untyped-def]
    """As `store_in_order`, but first words 0 of all vectors, then words 1, ..."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        unpacked = cgutils.unpack_tuple(builder, values[2])
        return _store_sixteen(context, builder, array, values, transposed(builder, unpacked))

    return types.void(array, types.intp, vectors), generate


@intrinsic
def prefetch(context, array, at):  # type: ignore[no-untyped-def]
    """Asks for the memory of element ``at``, to be in the second cache when it is read or written.

    Nothing waits for it, and a place behind the array's end does no harm.
    """

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        address = address_of(context, builder, array, values, _WORDS)
        function = ir.FunctionType(ir.VoidType(), [address.type, _I32, _I32, _I32])
        ask = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")
        read, second_cache, data = 0, 2, 1
        builder.call(ask, [address, *(ir.Constant(_I32, x) for x in (read, second_cache, data))])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


def transposed(builder: ir.IRBuilder, x: list[ir.Value]) -> list[ir.Value]:
    """Instructions that transpose sixteen vectors of words."""
    # Word w of vector v has the index 16 v + w, of 8 bits. To shuffle vectors v and v + 8 perfectly is to
    # turn the index of each word left by one bit; after four turns v and w have changed places.
    half = LANES // 2
    low = [i // 2 + LANES * (i % 2) for i in range(LANES)]
    orders = [ir.Constant(_WORDS, [first + i for i in low]) for first in (0, half)]
    for _ in range(4):
        x = [builder.shuffle_vector(x[i // 2], x[half + i // 2], orders[i % 2]) for i in range(LANES)]
    return x


@operation(words_type, types.uint32)
def repeated(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """One word sixteen times."""
    return splat(builder, value, _WORDS)


@operation(half_type, types.int64)
def repeated_half(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """One 64-bit integer eight times."""
    return splat(builder, value, _HALF)


@operation(words_type, types.uint32)
def numbered(builder: ir.IRBuilder, first: ir.Value) -> ir.Value:
    """first, first + 1, ... first + 15."""
    return builder.add(splat(builder, first, _WORDS), ir.Constant(_WORDS, list(range(LANES))))


def _both(name: str) -> Any:
    """An operation on words, or on halves."""

    def typed(context, a, b):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
            return getattr(builder, name)(*values)

        return (a(a, b), generate) if a is b and isinstance(a, Vector) else None

    return intrinsic(typed)


add, subtract, bits_and, bits_xor = (_both(x) for x in ("add", "sub", "and_", "xor"))


@operation(words_type, words_type, words_type)
def multiply_low(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """The low words of products."""
    return builder.mul(a, b)


@operation(words_type, words_type, words_type)
def least(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """The smaller words of two vectors."""
    return builder.select(builder.icmp_unsigned("<", a, b), a, b)


@operation(words_type, words_type, words_type)
def greatest(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """The larger words of two vectors."""
    return builder.select(builder.icmp_unsigned(">", a, b), a, b)


@operation(types.uint16, words_type, words_type)
def at_least(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Which words of a vector are not below those of another: a bit for each, the lowest for the first."""
    return builder.bitcast(builder.icmp_unsigned(">=", a, b), ir.IntType(LANES))


@operation(words_type, words_type, types.uint32)
def shift_right(builder: ir.IRBuilder, a: ir.Value, bits: ir.Value) -> ir.Value:
    """Each word by the same number of bits, at most 31."""
    return builder.lshr(a, splat(builder, bits, _WORDS))


@operation(words_type, words_type, types.uint32)
def shift_right_signed(builder: ir.IRBuilder, a: ir.Value, bits: ir.Value) -> ir.Value:
    """Each word, as an integer with a sign, by the same number of bits, at most 31."""
    return builder.ashr(a, splat(builder, bits, _WORDS))


@operation(words_type, words_type, types.uint32)
def shift_left(builder: ir.IRBuilder, a: ir.Value, bits: ir.Value) -> ir.Value:
    """Each word by the same number of bits, at most 31."""
    return builder.shl(a, splat(builder, bits, _WORDS))


@operation(words_type, words_type, types.uint32)
def rotate_left(builder: ir.IRBuilder, a: ir.Value, bits: ir.Value) -> ir.Value:
    """Each word by the same number of bits, 1 ... 31."""
    rest = builder.sub(ir.Constant(_I32, 32), bits)
    left = builder.shl(a, splat(builder, bits, _WORDS))
    return builder.or_(left, builder.lshr(a, splat(builder, rest, _WORDS)))


@operation(half_type, words_type)
def even_words(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    """Words 0, 2, ... 14 as the low words of a half, whose high words are of no meaning."""
    return builder.bitcast(a, _HALF)


@operation(half_type, words_type)
def odd_words(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    """Words 1, 3, ... 15 as the low words of a half."""
    return builder.lshr(builder.bitcast(a, _HALF), _constant(32, _HALF))


def _chosen(builder: ir.IRBuilder, even: ir.Value, odd: ir.Value, high: int) -> ir.Value:
    order = [i - i % 2 + high + LANES * (i % 2) for i in range(LANES)]
    return builder.shuffle_vector(
        builder.bitcast(even, _WORDS), builder.bitcast(odd, _WORDS), ir.Constant(_WORDS, order)
    )


@operation(words_type, half_type, half_type)
def low_words(builder: ir.IRBuilder, even: ir.Value, odd: ir.Value) -> ir.Value:
    """The low words of two halves, each at the number that it belongs to."""
    return _chosen(builder, even, odd, 0)


@operation(words_type, half_type, half_type)
def high_words(builder: ir.IRBuilder, even: ir.Value, odd: ir.Value) -> ir.Value:
    """The high words of two halves, each at the number that it belongs to."""
    return _chosen(builder, even, odd, 1)


@operation(half_type, half_type, half_type)
def multiply(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Products of the low words of two halves, unsigned."""
    low = _constant((1 << 32) - 1, _HALF)
    return builder.mul(builder.and_(a, low), builder.and_(b, low))


@operation(half_type, half_type, half_type)
def multiply_signed(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Products of the low words of two halves, signed."""
    shift = _constant(32, _HALF)
    a, b = (builder.ashr(builder.shl(x, shift), shift) for x in (a, b))
    return builder.mul(a, b)


@operation(words_type, words_type)
def count_ones(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    """The number of ones in each of the 64 bytes, as bytes."""
    name, function = f"llvm.ctpop.v{_BYTES.count}i8", ir.FunctionType(_BYTES, [_BYTES])
    count = cgutils.get_or_insert_function(builder.module, function, name)
    return builder.bitcast(builder.call(count, [builder.bitcast(a, _BYTES)]), _WORDS)


@operation(words_type, words_type, types.uint8)
def subtract_bytes(builder: ir.IRBuilder, a: ir.Value, value: ir.Value) -> ir.Value:
    """Each of the 64 bytes less one byte, modulo 256."""
    return builder.bitcast(builder.sub(builder.bitcast(a, _BYTES), splat(builder, value, _BYTES)), _WORDS)
