"""Constants from measurements: seconds are the sum over kinds of work of amount times constant."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["fit"]


def fit(amounts: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """The constants that fit best by least squares, none of them negative.

    Errors count by the square root of what was measured: a plan adds many products up, so the large ones
    should be right, and yet the small ones tell what is fixed.

    Args:
        amounts: [measurements, kinds of work], of units that differ by orders of magnitude.
        seconds: [measurements], positive.

    Returns:
        [kinds of work]; a kind whose constant would be negative is left out, and its constant is 0.
    """
    weights = 1 / np.sqrt(seconds)
    weighted, target = amounts * weights[:, None], seconds * weights
    # Columns of like size, so that the solution does not depend on the units.
    size = np.maximum(np.abs(weighted).max(axis=0), np.finfo(np.float64).tiny)
    kinds = list(range(amounts.shape[1]))
    found = np.zeros(amounts.shape[1])
    while kinds:
        solution = np.linalg.lstsq(weighted[:, kinds] / size[kinds], target, rcond=None)[0]
        if solution.min() >= 0:
            found[kinds] = solution
            break
        kinds.pop(int(np.argmin(solution)))
    return found / size
