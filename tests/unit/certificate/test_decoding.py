"""Syndromes and decoding against exact integers: what is found is right, and what is not found is said."""

import numpy as np
import pytest
import torch

from blindtune.protocol.certificate.decoding import decode
from blindtune.protocol.certificate.syndromes import long_syndromes, syndromes
from blindtune.protocol.certificate.words import CertificateWords, images, secret_words
from blindtune.protocol.kernels.low_sums import row_peaks, row_sums
from blindtune.protocol.products import Direction

MODULI = (16760833, 2147389441)


def words_of(integers: np.ndarray, secret: bytes = bytes(range(32))) -> CertificateWords:
    """Of a layer's forward product; integers are int8 [out, in]."""
    u = secret_words(secret, "layer", Direction.FORWARD, len(integers))
    short, long = images(torch.from_numpy(integers), u, Direction.FORWARD)
    squares = (integers.astype(np.int64) ** 2).sum(axis=1)
    return CertificateWords(u[0], short, u[1], long, squares)


def centred(y: np.ndarray, modulus: int) -> np.ndarray:
    residues = y % modulus
    return np.where(residues > modulus // 2, residues - modulus, residues).astype(np.int32)


@pytest.mark.parametrize("modulus", MODULI)
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 500])
def test_sums_and_peaks_are_those_of_python_s_integers(modulus: int, columns: int) -> None:
    generator = np.random.default_rng(columns)
    x = generator.integers(-modulus // 2, modulus // 2, (5, columns)).astype(np.int32)
    x[0] = -(modulus // 2)
    words = generator.integers(0, 1 << 32, columns, dtype=np.uint32)
    expected = [sum(int(a) * int(b) for a, b in zip(row, words, strict=True)) % (1 << 32) for row in x]
    assert row_sums(x, words).tolist() == expected
    assert row_peaks(x).tolist() == [max(abs(int(a)) for a in row) for row in x]


@pytest.mark.parametrize("direction", Direction)
def test_an_image_is_the_product_of_the_integers_with_the_words(direction: Direction) -> None:
    integers = np.random.default_rng(0).integers(-127, 128, (37, 23)).astype(np.int8)
    matrix = integers.T if direction is Direction.FORWARD else integers
    u = secret_words(bytes(32), "a", direction, matrix.shape[1])
    short, long = images(torch.from_numpy(integers), u, direction)
    for found, words, bits in ((short, u[0], 32), (long, u[1], 64)):
        exact = [sum(int(m) * int(w) for m, w in zip(row, words, strict=True)) for row in matrix]
        assert [int(x) for x in found] == [x % (1 << bits) for x in exact]


def test_words_differ_by_secret_layer_direction_and_length() -> None:
    drawn = [
        secret_words(secret, layer, direction, 64)
        for secret in (bytes(32), bytes([1] * 32))
        for layer, direction in (("a", Direction.FORWARD), ("b", Direction.FORWARD), ("", Direction.BACKWARD))
    ]
    seen = {
        word for short, long in drawn for word in (*short.tolist(), *long.tolist(), *(long >> 32).tolist())
    }
    assert len(seen) == len(drawn) * 64 * 3


@pytest.mark.parametrize("modulus", MODULI)
def test_a_syndrome_is_the_sum_of_the_words_that_wrapped(modulus: int) -> None:
    generator = np.random.default_rng(1)
    integers = generator.integers(-127, 128, (70, 90)).astype(np.int8)
    words = words_of(integers)
    z = generator.integers(-modulus // 2000, modulus // 2000, (40, 90)).astype(np.int32)
    z[3] = 0
    z[5] = modulus // 2 * np.sign(integers[7]).astype(np.int32)  # along a column of M, as far as integers go
    exact = z.astype(np.int64) @ integers.T.astype(np.int64)
    y = centred(exact, modulus)
    wraps = (exact - y) // modulus
    assert wraps.any() and not wraps.any(axis=1).all()
    found = syndromes(row_sums(z, words.image), row_sums(y, words.u), modulus)
    long = long_syndromes(z, y, words, modulus)
    for row, w in enumerate(wraps):
        assert int(found[row]) == sum(int(a) * int(b) for a, b in zip(w, words.u, strict=True)) % (1 << 32)
        assert int(long[row]) == sum(int(a) * int(b) for a, b in zip(w, words.long_u, strict=True)) % (
            1 << 64
        )


def decoded(
    y: np.ndarray, wraps: dict[int, int], words: CertificateWords, square: int = 1 << 62, flip: int = 0
) -> dict[int, int] | None:
    short = sum(w * int(words.u[j]) for j, w in wraps.items()) % (1 << 32)
    long = sum(w * int(words.long_u[j]) for j, w in wraps.items()) % (1 << 64)
    return decode(short ^ flip, long, y, square, words, MODULI[0])


NEAR = {17: -8_300_000, 40: 8_200_000, 99: -8_100_000, 123: 8_000_000, 200: -7_900_000, 201: 7_800_000}


@pytest.mark.parametrize(
    "wraps",
    [
        {5: 1},
        {5: -1},
        {5: 2},
        {299: -2},
        {17: 1, 40: -1},
        {17: 1, 40: -1, 99: 1},
        {17: 1, 40: -1, 99: 1, 123: -1},
        {17: 1, 40: -1, 99: 1, 123: -1, 200: 1},
        {17: 1, 40: -1, 99: 1, 123: -1, 200: 1, 201: -1},
        {250: 1, 251: 1},
        {250: -1, 0: 1},
        {17: 1, 280: 1},
        {17: 1, 40: -1, 99: 1, 280: -1},
    ],
)
def test_every_pattern_within_the_bounds_of_the_search_is_found(wraps: dict[int, int]) -> None:
    generator = np.random.default_rng(2)
    words = words_of(generator.integers(-127, 128, (300, 8)).astype(np.int8))
    y = generator.integers(-2000, 2000, 300).astype(np.int32)
    y[list(NEAR)] = list(NEAR.values())
    assert decoded(y, wraps, words) == wraps
    # By one word alone, or beyond what Cauchy and Schwarz allow, it is none.
    assert decoded(y, wraps, words, flip=1 << 9) is None
    assert decoded(y, wraps, words, square=1) is None


def test_what_lies_beyond_the_search_is_not_found() -> None:
    generator = np.random.default_rng(3)
    words = words_of(generator.integers(-127, 128, (300, 8)).astype(np.int8))
    y = generator.integers(-2000, 2000, 300).astype(np.int32)
    y[list(NEAR)] = list(NEAR.values())
    for wraps in ({5: 3}, {5: 1, 6: 1, 7: 1, 8: 1}, {5: 2, 280: 1}, {**dict.fromkeys(NEAR, 1), 3: 1}):
        assert decoded(y, wraps, words) is None
    assert decode(int(words.u[5]), 123456789, y, 1 << 62, words, MODULI[0]) is None
    assert decode(0, 0, y, 1, words, MODULI[0]) == {}


@pytest.mark.parametrize("power", [0, 21, 24, 28])
def test_a_word_misses_wraps_as_often_as_the_power_of_two_in_them_says(power: int) -> None:
    """D = 0 for 2^(power - 32) of all words, 2^power being what divides all wraps."""
    generator = np.random.default_rng(4)
    u = generator.integers(-(1 << 31), 1 << 31, (1 << 18, 3)).astype(np.int32)
    wraps = np.array([3 << power, 6 << power, (1 << 32) - (1 << power)], np.uint64).astype(np.uint32)
    missed, expected = int((row_sums(u, wraps) == 0).sum()), len(u) * 2.0 ** (power - 32)
    assert abs(missed - expected) <= 5 * expected**0.5


def test_words_show_neither_in_a_repr_nor_in_a_pickle() -> None:
    words = words_of(np.ones((3, 4), np.int8))
    assert repr(words) == "CertificateWords()"
    with pytest.raises(TypeError, match="secret"):
        words.__reduce__()
