"""Certified results equal 64-bit integers, or are flagged: through shares, lattice and no mask."""

from collections.abc import Callable
from math import isqrt

import numpy as np
import pytest
import torch
from lattice_reference import PUBLIC_SEED, TOY, Worker, product

from blindtune.protocol.certificate.certified import Certified, correct, reveal_certified
from blindtune.protocol.certificate.scales import (
    FINEST,
    certified_budget,
    first_level,
    level_above,
    part_of,
    proven_noise,
)
from blindtune.protocol.certificate.words import CertificateWords, images, secret_words
from blindtune.protocol.fixed_point import square_budget
from blindtune.protocol.lattice.source import LatticeSource
from blindtune.protocol.masks import MaskSource
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Direction
from blindtune.protocol.shares.source import ShareSource
from blindtune.protocol.shares.unmasked import UnmaskedSource

ROWS, FEATURES, OUTPUTS = 48, 64, 83
INTEGERS = np.random.default_rng(5).integers(-127, 128, (OUTPUTS, FEATURES)).astype(np.int8)
MATRIX = INTEGERS.T.astype(np.int64)
WHICH, WORKER = product(FEATURES), Worker(INTEGERS)
LARGEST = int((MATRIX**2).sum(axis=0).max())


def _words() -> CertificateWords:
    u = secret_words(bytes(32), "layer", Direction.FORWARD, OUTPUTS)
    short, long = images(torch.from_numpy(INTEGERS), u, Direction.FORWARD)
    return CertificateWords(u[0], short, u[1], long, (MATRIX**2).sum(axis=0))


WORDS = _words()
SOURCES: dict[str, Callable[[], MaskSource]] = {
    "none": lambda: UnmaskedSource(Q31),
    "two": lambda: ShareSource(2, Q31),
    "three": lambda: ShareSource(3, Q31),
    "lattice": lambda: LatticeSource(TOY, PUBLIC_SEED, lambda which: WORKER.hint(TOY, which)),
}


def rows_of(seed: int = 0) -> np.ndarray:
    """Of all magnitudes; zeros, rows along one, three and all columns of M, some with one large feature."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((ROWS, FEATURES))
    x[20:28] = MATRIX.T[:8]
    x[28:36] = MATRIX.T[:8] - MATRIX.T[20:28] + MATRIX.T[40:48]
    x[36:40] = np.sign(MATRIX.sum(axis=1)) * generator.uniform(0.5, 1, (4, FEATURES))
    x[40:44, 5] *= 1000
    x *= 10.0 ** generator.integers(-30, 31, (ROWS, 1))
    x[[0, 19, ROWS - 1]] = 0
    return x.astype(np.float32)


def asked(
    source: MaskSource,
    x: np.ndarray,
    level: int,
    damage: Callable[[list[np.ndarray]], None] = lambda answers: None,
    most: int = ROWS,
) -> tuple[Certified, np.ndarray, np.ndarray, np.ndarray]:
    """What is found, which rows were wrong before, and results without a modulus, as integers and real."""
    budget = certified_budget(Q31, LARGEST, level, source.largest_noise)
    masked, scales = source.hide_reals(x, WHICH, budget, image=WORDS.image)
    answers = [WORKER.multiply(WHICH, share.residues) for share in masked.shares]
    damage(answers)
    scale = np.random.default_rng(1).uniform(0.5, 2, OUTPUTS).astype(np.float32)
    found = reveal_certified(masked, answers, scales, scale, WORDS, Q31.modulus)
    wrong = found.flagged.copy()
    correct(found, masked, answers, scales, scale, WORDS, Q31.modulus, most)
    z = masked.rows_again(answers, np.arange(len(x)))[0].astype(np.int64)
    assert isqrt(int((z**2).sum(axis=1).max())) <= isqrt(budget) + 100
    exact = z @ MATRIX
    finite = np.isfinite(scales)[:, None]
    real = np.where(finite, exact * (1.0 / scales)[:, None] * scale, 0).astype(np.float32)
    return found, wrong, exact * finite, real


@pytest.mark.parametrize("name", SOURCES)
def test_every_row_that_wraps_is_corrected_or_flagged_and_never_wrong(name: str) -> None:
    source, x = SOURCES[name](), rows_of()
    corrected = flagged = 0
    for level in (0, 3, 5, 6, FINEST):
        found, wrong, exact, real = asked(source, x, level)
        wrapped = np.flatnonzero((abs(exact) > Q31.half).any(axis=1))
        assert wrong.tolist() == wrapped.tolist()
        right = np.setdiff1d(np.arange(ROWS), found.flagged)
        assert np.array_equal(found.values[right], real[right])
        assert np.array_equal(found.peaks[right], abs(exact).max(axis=1)[right])
        assert not found.peaks[found.flagged].any()
        assert found.wraps == len(wrapped) - len(found.flagged)
        corrected, flagged = corrected + found.wraps, flagged + len(found.flagged)
        assert level or not len(wrapped) or name == "lattice"  # K = 1 is proven, but for noise
    assert corrected > 20 and flagged > 20


@pytest.mark.parametrize("name", SOURCES)
def test_no_row_is_flagged_at_the_proven_scale_and_two_rows_of_it_are_precise(name: str) -> None:
    source, x = SOURCES[name](), rows_of()
    x = x[x.any(axis=1)]
    noise = min(
        source.noise(int(abs(MATRIX).sum(axis=0).max())), proven_noise(LARGEST, source.noise_variance)
    )
    budget = square_budget(Q31, LARGEST, noise if source.largest_noise else 0)
    masked, scales = source.hide_reals_twice(x, WHICH, budget, None, WORDS.image)
    assert masked.shares[0].shape == (2 * len(x), FEATURES)
    answers = [WORKER.multiply(WHICH, share.residues) for share in masked.shares]
    found = reveal_certified(masked, answers, scales, None, WORDS, Q31.modulus)
    assert not len(found.flagged)
    twice, once = found.values[: len(x)] + found.values[len(x) :], found.values[: len(x)]
    exact = x.astype(np.float64) @ MATRIX
    unit = np.linalg.norm(x.astype(np.float64), axis=1)[:, None] * LARGEST**0.5
    errors = [float((abs(values - exact) / unit).max()) for values in (once, twice)]
    assert errors[1] < 2.0**-23 < 2.0**-22 < errors[0] or name != "lattice"
    assert errors[1] < 2.0**-23


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_damaged_after_it_was_verified_is_flagged(name: str) -> None:
    source, x = SOURCES[name](), rows_of()
    for bit in (0, 7, 20):

        def damage(answers: list[np.ndarray], bit: int = bit) -> None:
            answers[-1].flags.writeable = True
            answers[-1][8, 17] ^= np.uint32(1 << bit)

        for level in (0, 3):
            found, wrong, *_ = asked(source, x, level, damage)
            assert 8 in wrong and 8 in found.flagged


def test_nothing_is_looked_for_any_more_once_too_many_rows_are_left() -> None:
    found, wrong, *_ = asked(UnmaskedSource(Q31), rows_of(), FINEST, most=3)
    assert len(found.flagged) == len(wrong) > 30
    assert not found.peaks[found.flagged].any()


def test_a_changed_hint_is_flagged_at_every_row_of_its_block() -> None:
    hint = WORKER.hint(TOY, WHICH)
    hint[1, 0, 77, 3] ^= 1
    source = LatticeSource(TOY, PUBLIC_SEED, lambda which: hint)
    found, *_ = asked(source, rows_of(), 0)
    assert len(found.flagged) == ROWS - 3  # all but zeros


def test_an_operand_that_was_hidden_without_words_has_no_certificate() -> None:
    masked, scales = ShareSource(2, Q31).hide_reals(rows_of(), WHICH, 1 << 40)
    answers = [WORKER.multiply(WHICH, share.residues) for share in masked.shares]
    with pytest.raises(ValueError, match="without the words"):
        reveal_certified(masked, answers, scales, None, WORDS, Q31.modulus)


def test_levels_are_the_least_parts_that_are_large_enough() -> None:
    assert [part_of(x) for x in (0, 4, 32)] == [1.0, 0.5, 2.0**-8]
    for d in (1, 255, 256, 257, 2048, 8192, 28_672, 32_768):
        wanted, level = min(1.0, 16 / d**0.5), first_level(d)
        assert part_of(level) >= wanted * (1 - 1e-12) and (part_of(level + 1) < wanted or level == 0)
    for c in (1e-9, 0.003, 0.0625, 0.07, 0.25, 0.3, 0.5, 1.0):
        wanted, level = min(1.0, max(2.0**-8, 2 * c)), level_above(c)
        assert part_of(level) >= wanted and (part_of(level + 1) < wanted or level in (0, FINEST))


def test_a_budget_is_the_square_of_half_over_the_part_and_the_largest_norm() -> None:
    for level in range(FINEST + 1):
        for square in (0, 1, 12_345, 28_672 * 127**2):
            found = certified_budget(Q31, square, level, 3)
            exact = min((Q31.half / part_of(level)) ** 2 / max(square, 1), (Q31.half - 3) ** 2)
            assert abs(found - exact) <= 1 + exact * 1e-12
            assert found <= (Q31.half - 3) ** 2
