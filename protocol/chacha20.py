"""ChaCha20 (RFC 8439), sixteen blocks side by side.

    state     0 ... 3  "expand 32-byte k"      4 ... 11  key      12  block counter      13 ... 15  nonce
    block     20 rounds of the state, plus the state: sixteen words mod 2^32

Lane l of a vector of sixteen words belongs to the block with counter + l, so the rounds are additions,
exclusive ors and rotations of whole vectors, which take the same time whatever the words. They are written
as LLVM's vectors, which every processor has in as many instructions as it needs: left to itself, the
compiler makes scalar code of the rounds. A library's cipher would hold the interpreter lock, so that
threads wait for each other, and its words would have left the first cache before they are used.
"""

import numpy as np
from llvmlite import ir
from numba import types, uint32
from numba.extending import intrinsic
from numpy.typing import NDArray

from blindtune.protocol.compiled import kernel

__all__ = ["BLOCK_WORDS", "initial_state", "key_stream"]

BLOCK_WORDS = 16
_LANES = 16
_BATCH = _LANES * BLOCK_WORDS
_CONSTANTS = np.frombuffer(b"expand 32-byte k", "<u4")

_WORD = ir.IntType(32)
_VECTOR = ir.VectorType(_WORD, _LANES)


def initial_state(key: bytes) -> NDArray[np.uint32]:
    """uint32 [16], with counter and nonce zero. It holds the key."""
    state = np.zeros(BLOCK_WORDS, np.uint32)
    state[:4] = _CONSTANTS
    state[4:12] = np.frombuffer(key, "<u4")
    return state


def _constant(*lanes: int) -> ir.Constant:
    return ir.Constant(_VECTOR, list(lanes) if len(lanes) > 1 else list(lanes) * _LANES)


def _rounds(builder: ir.IRBuilder, x: list[ir.Value]) -> None:
    def quarter(a: int, b: int, c: int, d: int) -> None:
        for target, source, mixed, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[target] = builder.add(x[target], x[source])
            word = builder.xor(x[mixed], x[target])
            left, right = builder.shl(word, _constant(turn)), builder.lshr(word, _constant(32 - turn))
            x[mixed] = builder.or_(left, right)

    for _ in range(10):
        for i in range(4):
            quarter(i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)


def _transposed(builder: ir.IRBuilder, x: list[ir.Value]) -> list[ir.Value]:
    """Sixteen vectors of one word of each block become sixteen blocks, by four perfect shuffles."""
    half = _LANES // 2
    low = _constant(*(i // 2 + _LANES * (i % 2) for i in range(_LANES)))
    high = _constant(*(half + i // 2 + _LANES * (i % 2) for i in range(_LANES)))
    for _ in range(4):
        x = [builder.shuffle_vector(x[i // 2], x[half + i // 2], high if i % 2 else low) for i in range(16)]
    return x


@intrinsic
def _sixteen_blocks(context, state, out, at):  # type: ignore[no-untyped-def]
    """Stores the state's block and the next fifteen into 256 words of ``out`` from ``at`` on."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        words, target = (
            context.make_array(array)(context, builder, value).data
            for array, value in zip(signature.args, values[:2], strict=False)
        )
        none, first = ir.Constant(_VECTOR, ir.Undefined), ir.Constant(_WORD, 0)
        start = []
        for i in range(BLOCK_WORDS):
            word = builder.load(builder.gep(words, [ir.Constant(_WORD, i)]))
            lane = builder.insert_element(none, word, first)
            start.append(builder.shuffle_vector(lane, none, _constant(0)))
        start[12] = builder.add(start[12], _constant(*range(_LANES)))
        x = list(start)
        _rounds(builder, x)
        blocks = _transposed(builder, [builder.add(a, b) for a, b in zip(x, start, strict=True)])
        for i, block in enumerate(blocks):
            place = builder.gep(target, [builder.add(values[2], ir.Constant(values[2].type, 16 * i))])
            builder.store(block, builder.bitcast(place, _VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(state, out, types.intp), generate


@kernel
def key_stream(state, out):  # type: ignore[no-untyped-def]
    """Fills an array with the key stream from the state's block on.

    Args:
        state: uint32 [16]. Its counter moves on.
        out: uint32, contiguous, of any length.
    """
    whole = out.shape[0] - out.shape[0] % _BATCH
    for i in range(0, whole, _BATCH):
        _sixteen_blocks(state, out, i)
        state[12] += uint32(_LANES)
    if whole < out.shape[0]:
        rest = np.empty(_BATCH, np.uint32)
        _sixteen_blocks(state, rest, 0)
        for i in range(whole, out.shape[0]):
            out[i] = rest[i - whole]
