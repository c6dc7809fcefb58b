"""Constants are found again in measurements that a busy machine disturbed."""

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from blindtune.client.plan.fitting import fit

Array = NDArray[np.float64]

# Of a worker's products: a call, operations, weights, elements of the operand and of the result.
CONSTANTS = np.array([1e-3, 5e-13, 3e-11, 2e-10, 1e-9])
SHAPES = [(2048, 2560), (2048, 256), (2048, 8192), (4096, 2048)]


def worker_amounts(shapes: list[tuple[int, int]] = SHAPES) -> Array:
    amounts = []
    for rows, (a, b) in product((16, 64, 256), shapes):
        for c, o in ((a, b), (b, a)):
            amounts.append((1, 8 * rows * c * o, c * o, rows * c, rows * o))
    return np.array(amounts, np.float64)


def test_the_constants_are_found_again() -> None:
    amounts = worker_amounts()
    assert fit(amounts, amounts @ CONSTANTS) == pytest.approx(CONSTANTS, rel=1e-6)


def test_no_constant_is_negative_and_the_others_make_the_best_of_it() -> None:
    generator = np.random.default_rng(0)
    amounts = generator.uniform(1, 2, (12, 3)) * np.array([1e12, 1e6, 1.0])
    found = fit(amounts, amounts @ np.array([1e-12, 3e-7, -0.1]))
    assert found[2] == 0 and (found[:2] > 0).all()


@pytest.mark.parametrize("seed", range(20))
def test_some_measurements_that_took_several_times_as_long_change_little(seed: int) -> None:
    generator = np.random.default_rng(seed)
    amounts = worker_amounts()
    seconds = amounts @ CONSTANTS * generator.normal(1, 0.05, len(amounts))
    disturbed = generator.choice(len(seconds), 4, replace=False)
    seconds[disturbed] *= generator.uniform(2, 6, len(disturbed))
    operation = fit(amounts, seconds)[1]
    assert operation == pytest.approx(CONSTANTS[1], rel=0.15)


@pytest.mark.parametrize("seed", range(20))
def test_what_always_takes_up_to_three_times_as_long_still_shows_its_operations(seed: int) -> None:
    generator = np.random.default_rng(seed)
    amounts = worker_amounts()
    seconds = amounts @ CONSTANTS * generator.uniform(1, 3, len(amounts))
    assert fit(amounts, seconds)[1] > 0


def test_a_narrow_matrix_is_what_tells_operations_from_elements() -> None:
    """Without one, the same disturbance hides them: the measured shapes are not there for show."""
    hidden = 0
    for seed in range(20):
        generator = np.random.default_rng(seed)
        amounts = worker_amounts([x for x in SHAPES if min(x) > 256])
        seconds = amounts @ CONSTANTS * generator.uniform(1, 3, len(amounts))
        hidden += fit(amounts, seconds)[1] == 0
    assert hidden > 0
