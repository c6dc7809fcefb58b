"""Named lattices: only the two that are strong enough can be selected."""

import dataclasses
from math import e, log, log2, pi, sqrt

import numpy as np
import pytest
from lattice_reference import HALF, TOY

from blindtune.protocol.lattice.parameters import (
    DEGREE,
    LATTICE_PARAMETER_SETS,
    MAX_RANK,
    MLWE1024_Q24,
    MLWE1280,
    MLWE1280_Q24,
    MLWE1536,
    LatticeParameters,
)
from blindtune.protocol.parameters import PARAMETER_SETS, Q31

SETS = list(LATTICE_PARAMETER_SETS.values())


def core_svp(parameters: LatticeParameters) -> float:
    """Block size that the primal attack needs (Alkim, Ducas, Pöppelmann, Schwabe 2016), any samples."""
    n, q, deviation = parameters.dimension, parameters.residues.modulus, sqrt(parameters.eta / 2)
    for b in range(50, 2000):
        delta = ((pi * b) ** (1 / b) * b / (2 * pi * e)) ** (1 / (2 * (b - 1)))
        for m in range(n // 2, 3 * n, 16):
            d = n + m + 1
            if log(deviation * sqrt(b)) <= (2 * b - d - 1) * log(delta) + m / d * log(q):
                return b
    raise AssertionError


def test_no_set_but_the_published_ones_can_be_selected_by_name() -> None:
    published = [MLWE1280, MLWE1536, MLWE1280_Q24, MLWE1024_Q24]
    assert {x.name: x for x in published} == LATTICE_PARAMETER_SETS
    assert next(iter(LATTICE_PARAMETER_SETS)) == "mlwe1280"
    assert TOY.name not in LATTICE_PARAMETER_SETS
    assert not set(LATTICE_PARAMETER_SETS) & set(PARAMETER_SETS)


@pytest.mark.parametrize(
    ("parameters", "classical", "quantum"),
    [
        (MLWE1280, 124, 112),
        (MLWE1536, 157, 143),
        (MLWE1280_Q24, 148, 135),
        (MLWE1024_Q24, 124, 112),
    ],
)
def test_the_stated_core_svp_figures_are_those_of_the_primal_attack(
    parameters: LatticeParameters, classical: int, quantum: int
) -> None:
    b = core_svp(parameters)
    assert round(0.292 * b) == classical and round(0.265 * b) == quantum
    assert f"core-SVP 2^{classical} classical and 2^{quantum} quantum" in parameters.security


def test_rank_4_and_eta_2_are_weaker_than_what_is_offered() -> None:
    standard = core_svp(MLWE1280)
    assert core_svp(dataclasses.replace(MLWE1280, rank=4)) < 0.8 * standard
    assert core_svp(dataclasses.replace(MLWE1280, eta=2)) < 0.9 * standard


@pytest.mark.parametrize("parameters", SETS)
def test_workers_need_nothing_but_the_modulus(parameters: LatticeParameters) -> None:
    assert parameters.residues is PARAMETER_SETS[parameters.residues.name]
    assert parameters.dimension == 256 * parameters.rank == DEGREE * parameters.rank
    assert (parameters.residues.modulus - 1) % (2 * DEGREE) == 0


def test_the_largest_rank_still_fits_the_accumulator_and_its_reduction() -> None:
    assert MAX_RANK * HALF**2 < 2**63
    assert MAX_RANK * HALF**2 < 2**32 * Q31.modulus
    assert log2(HALF) < 30


@pytest.mark.parametrize("rank", [-1, 0, MAX_RANK + 1])
def test_a_rank_whose_sums_could_overflow_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="rank"):
        dataclasses.replace(MLWE1280, rank=rank)


@pytest.mark.parametrize("eta", [-1, 0, 33])
def test_an_eta_that_takes_more_than_a_word_is_refused(eta: int) -> None:
    with pytest.raises(ValueError, match="eta"):
        dataclasses.replace(MLWE1280, eta=eta)


@pytest.mark.parametrize("parameters", [*SETS, TOY])
def test_the_noise_bound_is_what_the_worst_noise_reaches(parameters: LatticeParameters) -> None:
    matrix = np.random.default_rng(0).integers(-127, 128, (50, 20))
    largest = int(np.abs(matrix).sum(0).max())
    worst = max(int(parameters.eta * np.sign(column) @ column) for column in matrix.T)
    assert parameters.noise(largest) == worst
    assert parameters.noise(0) == 0
