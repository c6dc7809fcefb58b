"""Every operation on vectors is the one that its description says, also for extreme words."""

from collections.abc import Callable

import numpy as np
import pytest
from numba import int64, njit, uint8, uint32

from blindtune.protocol.kernels import vectors as v

EDGES = np.array([0, 1, 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1], np.uint32)


def pairs() -> tuple[np.ndarray, np.ndarray]:
    """Sixteen words each, with all pairs of extreme words among them."""
    generator = np.random.default_rng(0)
    a, b = (x.ravel().astype(np.uint32) for x in np.meshgrid(EDGES, EDGES))
    random = generator.integers(0, 2**32, (2, 320), np.uint32)
    return np.concatenate([a, random[0]]), np.concatenate([b, random[1]])


def applied(operation: Callable, *arrays: np.ndarray) -> np.ndarray:
    out = np.empty(arrays[0].size, np.uint32)
    for i in range(0, out.size, v.LANES):
        operation(*(x[i : i + v.LANES] for x in arrays), out[i : i + v.LANES])
    return out


@njit
def add(a, b, out):  # type: ignore[no-untyped-def]
    v.store(out, 0, v.add(v.load(a, 0), v.load(b, 0)))


@njit
def subtract(a, b, out):  # type: ignore[no-untyped-def]
    v.store(out, 0, v.subtract(v.load(a, 0), v.load(b, 0)))


@njit
def multiply_low(a, b, out):  # type: ignore[no-untyped-def]
    v.store(out, 0, v.multiply_low(v.load(a, 0), v.load(b, 0)))


@njit
def bits_and(a, b, out):  # type: ignore[no-untyped-def]
    v.store(out, 0, v.bits_and(v.load(a, 0), v.load(b, 0)))


@njit
def bits_xor(a, b, out):  # type: ignore[no-untyped-def]
    v.store(out, 0, v.bits_xor(v.load(a, 0), v.load(b, 0)))


@njit
def least(a, b, out):  # type: ignore[no-untyped-def]
    v.store(out, 0, v.least(v.load(a, 0), v.load(b, 0)))


@njit
def greatest(a, b, out):  # type: ignore[no-untyped-def]
    v.store(out, 0, v.greatest(v.load(a, 0), v.load(b, 0)))


@njit
def high_product(a, b, out):  # type: ignore[no-untyped-def]
    a, b = v.load(a, 0), v.load(b, 0)
    even = v.multiply(v.even_words(a), v.even_words(b))
    v.store(out, 0, v.high_words(even, v.multiply(v.odd_words(a), v.odd_words(b))))


@njit
def low_product(a, b, out):  # type: ignore[no-untyped-def]
    a, b = v.load(a, 0), v.load(b, 0)
    even = v.multiply(v.even_words(a), v.even_words(b))
    v.store(out, 0, v.low_words(even, v.multiply(v.odd_words(a), v.odd_words(b))))


@njit
def high_signed_product(a, b, out):  # type: ignore[no-untyped-def]
    a, b = v.load(a, 0), v.load(b, 0)
    even = v.multiply_signed(v.even_words(a), v.even_words(b))
    v.store(out, 0, v.high_words(even, v.multiply_signed(v.odd_words(a), v.odd_words(b))))


def signed(a: np.ndarray) -> np.ndarray:
    return a.view(np.int32).astype(np.int64)


WIDE = np.uint64
EXPECTED = {
    add: lambda a, b: a + b,
    subtract: lambda a, b: a - b,
    multiply_low: lambda a, b: a * b,
    low_product: lambda a, b: a * b,
    bits_and: lambda a, b: a & b,
    bits_xor: lambda a, b: a ^ b,
    least: np.minimum,
    greatest: np.maximum,
    high_product: lambda a, b: (a.astype(WIDE) * b.astype(WIDE)) >> WIDE(32),
    high_signed_product: lambda a, b: (signed(a) * signed(b)) >> 32,
}


@pytest.mark.parametrize("operation", EXPECTED, ids=lambda x: x.__name__)
def test_operations_on_two_vectors(operation: Callable) -> None:
    a, b = pairs()
    expected = EXPECTED[operation](a, b).astype(np.int64) & 0xFFFFFFFF
    assert np.array_equal(applied(operation, a, b), expected)


@njit
def rotate(a, bits, out):  # type: ignore[no-untyped-def]
    v.store(out, 0, v.rotate_left(v.load(a, 0), uint32(bits)))


@njit
def shift(a, bits, out):  # type: ignore[no-untyped-def]
    v.store(out, 0, v.shift_right(v.load(a, 0), uint32(bits)))


@pytest.mark.parametrize("bits", range(32))
def test_shifts_and_rotations(bits: int) -> None:
    a, _ = pairs()
    wide = a.astype(np.int64)
    assert np.array_equal(applied(lambda x, out: shift(x, bits, out), a), wide >> bits)
    if bits:
        expected = ((wide << bits) | (wide >> (32 - bits))) & 0xFFFFFFFF
        assert np.array_equal(applied(lambda x, out: rotate(x, bits, out), a), expected)


@njit
def constants(value, out):  # type: ignore[no-untyped-def]
    v.store(out, 0, v.repeated(uint32(value)))
    v.store(out, 16, v.numbered(uint32(value)))
    half = v.repeated_half(int64(value) - (int64(1) << 40))
    v.store(out, 32, v.low_words(half, half))
    v.store(out, 48, v.high_words(half, half))


@pytest.mark.parametrize("value", EDGES.tolist())
def test_repeated_and_numbered_words(value: int) -> None:
    out = np.empty(64, np.uint32)
    constants(value, out)
    half = value - (1 << 40)
    assert out[:16].tolist() == [value] * 16
    assert out[16:32].tolist() == [(value + i) % 2**32 for i in range(16)]
    assert out[32:48].tolist() == [half % 2**32] * 16 and out[48:].tolist() == [(half >> 32) % 2**32] * 16


@njit
def halves(x, out):  # type: ignore[no-untyped-def]
    even, odd = v.load_halves(x, 0), v.load_halves(x, 8)
    v.store(out, 0, v.low_words(v.add(even, odd), v.subtract(even, odd)))


def test_halves_are_64_bits_wide() -> None:
    x = np.random.default_rng(1).integers(-(2**62), 2**62, 16)
    out = np.empty(16, np.uint32)
    halves(x, out)
    assert np.array_equal(out[::2], (x[:8] + x[8:]) % 2**32)
    assert np.array_equal(out[1::2], (x[:8] - x[8:]) % 2**32)


@njit
def ones(a, less, out):  # type: ignore[no-untyped-def]
    v.store(out, 0, v.subtract_bytes(v.count_ones(v.load(a, 0)), uint8(less)))


def test_ones_are_counted_in_every_byte_and_bytes_do_not_borrow() -> None:
    a = np.arange(256, dtype=np.uint8)
    for less in (0, 1, 5, 21, 255):
        counts = np.empty(256, np.uint8)
        for i in range(0, 256, 64):
            ones(a[i : i + 64].view(np.uint32), less, counts[i : i + 64].view(np.uint32))
        assert counts.tolist() == [(x.bit_count() - less) % 256 for x in range(256)]


@njit
def moved(x, source, out, target):  # type: ignore[no-untyped-def]
    v.store(out, target, v.load(x, source))


@pytest.mark.parametrize("at", [0, 1, 5, 16])
def test_words_are_read_and_written_where_they_are_said_to_be(at: int) -> None:
    x, out = np.arange(40, dtype=np.int32), np.full(40, 99, np.uint32)
    moved(x, at, out, at + 3)
    expected = np.full(40, 99)
    expected[at + 3 : at + 19] = range(at, at + 16)
    assert np.array_equal(out, expected)
    # Arrays of bytes take 64 of them, and arrays of two dimensions are indexed as they lie in memory.
    few = np.full(100, 99, np.int8)
    moved(x.reshape(4, 10), at, few, at)
    assert np.array_equal(few[at : at + 64].view(np.int32), range(at, at + 16))
    assert np.all(np.delete(few, range(at, at + 64)) == 99)


@njit
def put_sixteen(x, out, at, turned):  # type: ignore[no-untyped-def]
    vectors = (
        *(v.load(x, 0), v.load(x, 16), v.load(x, 32), v.load(x, 48)),
        *(v.load(x, 64), v.load(x, 80), v.load(x, 96), v.load(x, 112)),
        *(v.load(x, 128), v.load(x, 144), v.load(x, 160), v.load(x, 176)),
        *(v.load(x, 192), v.load(x, 208), v.load(x, 224), v.load(x, 240)),
    )
    if turned:
        v.store_transposed(out, at, vectors)
    else:
        v.store_in_order(out, at, vectors)


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("turned", [False, True])
def test_sixteen_vectors_are_stored_in_order_or_transposed(at: int, turned: bool) -> None:
    x, out = np.arange(1, 257, dtype=np.uint32), np.zeros(264, np.uint32)
    put_sixteen(x, out, at, turned)
    assert np.array_equal(out[at : at + 256], x.reshape(16, 16).T.ravel() if turned else x)
    assert not out[:at].any() and not out[at + 256 :].any()


@njit
def widened(x, at, out):  # type: ignore[no-untyped-def]
    v.store(out, 0, v.load_bytes(x, at))


def test_bytes_become_words_of_the_same_sign() -> None:
    x, out = np.arange(-128, 128).astype(np.int8), np.empty(16, np.int32)
    for at in (0, 1, 120, 240):
        widened(x, at, out)
        assert out.tolist() == list(range(at - 128, at - 112))


@njit
def put_aside(words, out, at):  # type: ignore[no-untyped-def]
    v.store_aside(out, at, v.load(words, 0))
    v.fence()


@njit
def place_of_aligned(words):  # type: ignore[no-untyped-def]
    memory = v.aligned(words)
    memory[:] = uint32(7)
    return memory.ctypes.data % 64, len(memory)


def test_words_stored_past_the_caches_arrive_at_every_address_and_nowhere_else() -> None:
    words = np.arange(100, 116, dtype=np.uint32)
    for at in range(33):
        out = np.zeros(64, np.uint32)
        put_aside(words, out, at)
        assert np.array_equal(out[at : at + 16], words)
        assert not out[:at].any() and not out[at + 16 :].any()


@pytest.mark.parametrize("words", [1, 16, 2048, 4001])
def test_aligned_memory_begins_with_a_cache_line_and_has_room(words: int) -> None:
    assert place_of_aligned(words) == (0, words)
