"""Noise is the centred binomial of its definition, never larger than eta, and seekable."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from blindtune.protocol.lattice.noise import _places, centred_binomial

KEY = bytes(range(100, 132))


def from_the_definition(key: bytes, rows: int, columns: int, eta: int) -> np.ndarray:
    whole, rest = divmod(2 * eta, 8)
    per = 8 // rest if rest else 1
    groups = (
        max(g for g in range(17) if whole * g + (rest > 0) <= 16 and rest * g <= 8) if whole else 16 * per
    )
    width = -(-columns // (64 * groups))
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(1024 * rows * width))
    # Batch, block, word, byte.
    blocks = np.frombuffer(stream, np.uint8).reshape(-1, 16, 16, 4)
    out = np.empty((rows, columns), int)
    for r in range(rows):
        for c in range(columns):
            batch, place = divmod(c, 64 * groups)
            i, p = divmod(place, 64)
            words = blocks[r * width + batch, p // 4, :, p % 4].tolist()
            bits = [(byte >> k) & 1 for byte in words[whole * i : whole * (i + 1)] for k in range(8)]
            byte, k = (words[15], i) if whole else (words[i // per], i % per)
            bits += [(byte >> b) & 1 for b in range(rest * k, rest * (k + 1))]
            assert len(bits) == 2 * eta
            out[r, c] = sum(bits) - eta
    return out


@pytest.mark.parametrize("eta", range(1, 33))
@pytest.mark.parametrize("columns", [1, 64, 65, 192, 193, 450])
def test_samples_are_those_of_the_definition(eta: int, columns: int) -> None:
    result = centred_binomial(KEY, 0, 3, columns, eta)
    assert result.dtype == np.int8
    assert np.array_equal(result, from_the_definition(KEY, 3, columns, eta))


@pytest.mark.parametrize("eta", range(1, 33))
def test_no_bit_of_the_key_stream_belongs_to_two_samples(eta: int) -> None:
    # Samples of one batch add up to the ones among their bits, each counted once.
    whole, rest, groups = _places(eta)
    assert 8 * whole + rest == 2 * eta
    assert whole * groups + (rest > 0) <= 16 and rest * groups <= (8 if whole else 128)
    stream = Cipher(ChaCha20(KEY, bytes(16)), mode=None).encryptor().update(bytes(1024))
    words = np.frombuffer(stream, np.uint32).reshape(16, 16).copy()
    if not whole:
        words &= ((1 << 8 // rest * rest) - 1) * 0x01010101
    elif rest == 0:
        words[:, whole * groups :] = 0
    else:
        words[:, whole * groups : 15] = 0
        words[:, 15] &= ((1 << rest * groups) - 1) * 0x01010101
    ones = int(np.bitwise_count(words).sum())
    samples = centred_binomial(KEY, 0, 1, 64 * groups, eta)
    assert int((samples.astype(int) + eta).sum()) == ones
    assert len(set(samples.reshape(-1, 64).view("V64").ravel().tolist())) == groups


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    columns=st.integers(1, 700),
    first=st.integers(0, 300),
    rows=st.integers(0, 40),
)
def test_any_rows_can_be_drawn_alone(columns: int, first: int, rows: int) -> None:
    whole = centred_binomial(KEY, 0, first + rows, columns, 21)
    assert np.array_equal(centred_binomial(KEY, first, rows, columns, 21), whole[first:])


@pytest.mark.parametrize("columns", [300, 20_000])
def test_threads_and_pieces_do_not_change_the_samples(columns: int) -> None:
    together = centred_binomial(KEY, 3, 256, columns, 21)
    alone = [centred_binomial(KEY, 3 + row, 1, columns, 21) for row in range(256)]
    assert np.array_equal(together, np.concatenate(alone))


def test_samples_go_into_the_array_that_is_given_and_nowhere_else() -> None:
    around = np.full((9, 300), 99, np.int8)
    result = centred_binomial(KEY, 4, 3, 300, 21, around[2:5])
    assert np.shares_memory(result, around)
    assert np.array_equal(around[2:5], centred_binomial(KEY, 4, 3, 300, 21))
    assert np.all(np.delete(around, [2, 3, 4], axis=0) == 99)


@pytest.mark.parametrize(
    "out", [np.empty((3, 299), np.int8), np.empty((3, 300), np.uint8), np.empty((3, 600), np.int8)[:, ::2]]
)
def test_an_array_that_does_not_fit_is_refused(out: np.ndarray) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        centred_binomial(KEY, 0, 3, 300, 21, out)


@pytest.mark.parametrize("length", [0, 16, 31, 33, 64])
def test_a_key_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"32 bytes, not {length}"):
        centred_binomial(bytes(length), 0, 3, 300, 21)


def test_other_keys_give_other_samples() -> None:
    a, b = centred_binomial(KEY, 0, 4, 64, 21), centred_binomial(bytes(32), 0, 4, 64, 21)
    assert np.mean(a == b) < 0.3


def probabilities(eta: int) -> np.ndarray:
    """Of -eta ... eta: the convolution of 2 eta fair coins."""
    p = np.ones(1)
    for _ in range(2 * eta):
        p = np.convolve(p, [0.5, 0.5])
    return p


@pytest.mark.parametrize("eta", [2, 21])
def test_mean_variance_and_frequencies_are_those_of_the_distribution(eta: int) -> None:
    samples = centred_binomial(KEY, 0, 1000, 1000, eta).astype(int).ravel()
    n = samples.size
    assert np.abs(samples).max() <= eta
    assert abs(samples.mean()) < 4 * (eta / 2 / n) ** 0.5
    assert abs(samples.var() / (eta / 2) - 1) < 4 * (2 / n) ** 0.5
    counts = np.bincount(samples + eta, minlength=2 * eta + 1)
    expected = n * probabilities(eta)
    common = expected > 20
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum()
    assert 1e-4 < chi2.sf(statistic, common.sum() - 1) < 1 - 1e-4
    assert counts[~common].sum() < 200


def test_neighbours_in_rows_and_columns_are_not_correlated() -> None:
    samples = centred_binomial(KEY, 0, 800, 800, 21).astype(float)
    for shift in (1, 2, 3, 7, 8, 16):
        for axis in (0, 1):
            product = samples * np.roll(samples, shift, axis)
            assert abs(product.mean()) < 4.5 * 10.5 / samples.size**0.5


def test_both_ends_of_the_distribution_occur() -> None:
    samples = centred_binomial(KEY, 0, 2000, 64, 2)
    assert set(np.unique(samples)) == {-2, -1, 0, 1, 2}


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (5, 0), (0, 0)])
def test_no_samples_are_no_error(rows: int, columns: int) -> None:
    assert centred_binomial(KEY, 0, rows, columns, 21).shape == (rows, columns)


def test_a_key_stream_never_wraps_around() -> None:
    last = (1 << 32) // (16 * 5) - 1  # 800 samples take five batches of sixteen blocks
    assert centred_binomial(KEY, last, 1, 800, 21).shape == (1, 800)
    with pytest.raises(ValueError, match="more than one key stream"):
        centred_binomial(KEY, last, 2, 800, 21)
