"""Sixteen numbers of three bytes in memory, as words that kernels compute with; see `vectors`."""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from blindtune.protocol.kernels.vectors import LANES, address_of, require_elements, words_type

__all__ = ["load_threes", "store_threes"]

_I32, _WORDS = ir.IntType(32), words_type.value
_BYTES = ir.VectorType(ir.IntType(8), 4 * LANES)


@intrinsic
def load_threes(context, array, at):  # type: ignore[no-untyped-def]
    """48 bytes of an array from element ``at`` on, as sixteen numbers of three bytes. 64 bytes are read."""
    require_elements(array, types.uint32, types.uint8)

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        address = address_of(context, builder, array, values, _WORDS)
        words = builder.load(address, align=array.dtype.bitwidth // 8)
        # Twelve bytes go to the beginning of each sixteen, and there apart.
        order = [3 * lane + min(i, 2) for lane in range(4) for i in range(4)]
        apart = builder.shuffle_vector(words, words, ir.Constant(_WORDS, order))
        count, zero = _BYTES.count, _BYTES.count
        order = [zero if i % 4 == 3 else i // 16 * 16 + i % 16 // 4 * 3 + i % 4 for i in range(count)]
        some = builder.bitcast(apart, _BYTES)
        places = ir.Constant(ir.VectorType(_I32, count), order)
        return builder.bitcast(builder.shuffle_vector(some, ir.Constant(_BYTES, [0] * count), places), _WORDS)

    return words_type(array, types.intp), generate


@intrinsic
def store_threes(context, array, at, words):  # type: ignore[no-untyped-def]
    """Puts the lower three bytes of sixteen words into words ``at ... at + 11`` of an array."""
    require_elements(array, types.uint32)

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        count = _BYTES.count
        order = [min(i // 16 * 16 + i % 16 // 3 * 4 + i % 16 % 3, count - 1) for i in range(count)]
        some = builder.bitcast(values[2], _BYTES)
        together = builder.shuffle_vector(some, some, ir.Constant(ir.VectorType(_I32, count), order))
        twelve = ir.VectorType(_I32, 12)
        order = [4 * (i // 3) + i % 3 for i in range(twelve.count)]
        packed = builder.bitcast(together, _WORDS)
        packed = builder.shuffle_vector(packed, packed, ir.Constant(twelve, order))
        builder.store(packed, address_of(context, builder, array, values, twelve), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, words_type), generate
