"""Noise is the centred binomial of its definition, never larger than eta, and seekable."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from blindtune.protocol.lattice.noise import centred_binomial

KEY = bytes(range(100, 132))


def from_the_definition(key: bytes, rows: int, columns: int, eta: int) -> np.ndarray:
    width = -(-columns // 8) * 8
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(8 * rows * width))
    out = np.empty((rows, columns), int)
    for r in range(rows):
        for i in range(columns):
            at = 8 * (r * width + i)
            word = int.from_bytes(stream[at : at + 8], "little")
            bits = [(word >> k) & 1 for k in range(64)]
            out[r, i] = sum(bits[:eta]) - sum(bits[eta : 2 * eta])
    return out


@pytest.mark.parametrize("eta", [1, 2, 21, 31, 32])
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 50])
def test_samples_are_those_of_the_definition(eta: int, columns: int) -> None:
    result = centred_binomial(KEY, 0, 5, columns, eta)
    assert result.dtype == np.int8
    assert np.array_equal(result, from_the_definition(KEY, 5, columns, eta))


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
    last = (1 << 32) // 100 - 1
    assert centred_binomial(KEY, last, 1, 800, 21).shape == (1, 800)
    with pytest.raises(ValueError, match="more than one key stream"):
        centred_binomial(KEY, last, 2, 800, 21)
