"""Products of bytes summed up in vector registers (AVX-512 VNNI), on the tiles of `tiles`.

One instruction adds to each of sixteen sums the products of four unsigned bytes and four signed ones:

    sums[j] += sum over k < 4 of left[k] right[k, j]         int32 [16], uint8 [4], int8 [4, 16]

in 32 bits that wrap around and never saturate. A right tile has the bytes as they are needed, and a left tile
has the four bytes of a row side by side. Limbs are signed; here they come as limb + 128, unsigned, and the
sums start at `start_sums`, -128 times the sum of each column, so that they end as those of the limbs.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from blindtune.protocol.kernels.tiles import ROW_BYTES, TILE_BYTES, TILE_ROWS, TILE_WORDS
from blindtune.protocol.kernels.vectors import LANES, address_of, require_elements, splat, words_type

__all__ = ["have_dot_products", "multiply_rows", "start_sums"]

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_WORDS = words_type.value
_TILES = 2  # right ones, side by side
_STEP_WORDS = ROW_BYTES // 4


def have_dot_products() -> bool:
    """Whether kernels may use these instructions here: the processor and the compiler have them."""
    features = str(cpu_target.target_context.codegen().magic_tuple()[2])
    return {"+avx512f", "+avx512bw", "+avx512vnni"} <= set(features.split(","))


def _added(builder: ir.IRBuilder, sums: ir.Value, left: ir.Value, right: ir.Value) -> ir.Value:
    """Sums and the products of 64 unsigned bytes with 64 signed ones."""
    kind = ir.FunctionType(_WORDS, [_WORDS] * 3)
    name = "llvm.x86.avx512.vpdpbusd.512"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [sums, left, right])


def _at(builder: ir.IRBuilder, index: ir.Value, *more: ir.Value | int) -> ir.Value:
    for x in more:
        index = builder.add(index, ir.Constant(index.type, x) if isinstance(x, int) else x)
    return index


def _times(builder: ir.IRBuilder, value: ir.Value, factor: int) -> ir.Value:
    return builder.mul(value, ir.Constant(value.type, factor))


def _loop(builder: ir.IRBuilder, count: ir.Value | int, sums: list[ir.Value], body):  # type: ignore[no-untyped-def]
    """Calls ``body(number, sums)`` for the instructions of a loop, which returns the sums after it."""
    kept = [cgutils.alloca_once_value(builder, x) for x in sums]
    stop = ir.Constant(_I64, count) if isinstance(count, int) else count
    with cgutils.for_range(builder, stop) as loop:
        for place, x in zip(kept, body(loop.index, [builder.load(k) for k in kept]), strict=True):
            builder.store(x, place)
    return [builder.load(k) for k in kept]


@intrinsic
def start_sums(context, packed, right, steps, sums, to):  # type: ignore[no-untyped-def]
    """Where sums start: -128 times those of the columns of a panel, two tiles side by side.

    Args:
        packed: uint32.
        right: the first tile's first word.
        steps: pairs of tiles.
        sums: int32, receives 32 of them.
        to: the first one's place.
    """
    require_elements(packed, types.uint32)
    require_elements(sums, types.int32)

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        array, first, count, out, place = values
        bytes_of_128 = ir.Constant(_WORDS, [0x80808080] * LANES)

        def body(step, found):  # type: ignore[no-untyped-def]
            start = _at(builder, first, _times(builder, step, _TILES * TILE_WORDS))

            def row(k, found):  # type: ignore[no-untyped-def]
                result = []
                for tile, x in enumerate(found):
                    number = _at(builder, start, _times(builder, k, LANES), tile * TILE_WORDS)
                    address = address_of(context, builder, packed, (array, number), _WORDS)
                    result.append(_added(builder, x, bytes_of_128, builder.load(address, align=4)))
                return result

            return _loop(builder, TILE_ROWS, found, row)

        zero = ir.Constant(_WORDS, [0] * LANES)
        for tile, x in enumerate(_loop(builder, count, [zero] * _TILES, body)):
            number = _at(builder, place, tile * LANES)
            address = address_of(context, builder, sums, (out, number), _WORDS)
            builder.store(builder.sub(zero, x), address, align=4)
        return context.get_dummy_value()

    return types.void(packed, types.intp, types.intp, sums, types.intp), generate


@intrinsic
def multiply_rows(context, limbs, left, numbers, some, packed, right, steps, sums, to):  # type: ignore[no-untyped-def]
    """Adds the products of some rows of left tiles with a panel to sums [limb, tile, row, column].

    Args:
        limbs: int8, which are taken as unsigned.
        left: the first row's first byte in the first limb's tile; the other limbs' are behind it.
        numbers: a tuple as long as there are limbs.
        some: a tuple as long as there are rows to take at once.
        packed, right, steps: as for `start_sums`.
        sums: int32.
        to: place of the first row's sums of the first limb and tile.
    """
    require_elements(limbs, types.int8)
    require_elements(packed, types.uint32)
    require_elements(sums, types.int32)
    count, rows = len(numbers), len(some)
    places = [(limb, row) for limb in range(count) for row in range(rows)]

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        left_array, first_left, _, _, right_array, first_right, stop, out, place = values

        def addresses():  # type: ignore[no-untyped-def]
            for limb, row in places:
                for tile in range(_TILES):
                    number = _at(builder, place, (limb * _TILES + tile) * TILE_WORDS + row * LANES)
                    yield address_of(context, builder, sums, (out, number), _WORDS)

        def body(step, found):  # type: ignore[no-untyped-def]
            lefts = _at(builder, first_left, _times(builder, step, count * TILE_BYTES))
            rights = _at(builder, first_right, _times(builder, step, _TILES * TILE_WORDS))

            def four(k, found):  # type: ignore[no-untyped-def]
                columns = []
                for tile in range(_TILES):
                    number = _at(builder, rights, _times(builder, k, LANES), tile * TILE_WORDS)
                    address = address_of(context, builder, packed, (right_array, number), _WORDS)
                    columns.append(builder.load(address, align=4))
                result = []
                for i, (limb, row) in enumerate(places):
                    number = _at(builder, lefts, _times(builder, k, 4), limb * TILE_BYTES + row * ROW_BYTES)
                    address = address_of(context, builder, limbs, (left_array, number), _I32)
                    word = splat(builder, builder.load(address, align=1), _WORDS)
                    for tile in range(_TILES):
                        result.append(_added(builder, found[i * _TILES + tile], word, columns[tile]))
                return result

            return _loop(builder, _STEP_WORDS, found, four)

        before = [builder.load(address, align=4) for address in addresses()]
        for address, x in zip(addresses(), _loop(builder, stop, before, body), strict=True):
            builder.store(x, address, align=4)
        return context.get_dummy_value()

    arguments = limbs, types.intp, numbers, some, packed, types.intp, types.intp, sums, types.intp
    return types.void(*arguments), generate
