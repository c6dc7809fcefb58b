"""Constants from measurements: seconds are the sum over kinds of work of amount times constant.

Whatever else runs on the machine lengthens some measurements. So the fit gives little weight to those that
depart from it by far more than most do (Huber's loss, by reweighted least squares). And a constant is
never negative, since no work takes less than no time.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

__all__ = ["fit"]

_Array = NDArray[np.float64]

_ROUNDS = 20
# Huber's: of normal errors, 95 % of what plain least squares would make of them.
_USUAL = 1.345
# From the median of absolute values to the standard deviation, for normal errors.
_NORMAL = 1.4826


def fit(amounts: _Array, seconds: _Array) -> _Array:
    """The constants that fit best, none of them negative.

    Errors count by the square root of what was measured: a plan adds many products up, so the large ones
    should be right, and yet the small ones tell what is fixed.

    Args:
        amounts: [measurements, kinds of work], of units that differ by orders of magnitude.
        seconds: [measurements], positive.

    Returns:
        [kinds of work]; 0 where the measurements show no such work.
    """
    weights = 1 / np.sqrt(seconds)
    weighted, target = amounts * weights[:, None], seconds * weights
    # Columns of like size, so that the solution does not depend on the units.
    size = np.maximum(np.abs(weighted).max(axis=0), np.finfo(np.float64).tiny)
    columns = weighted / size
    found, _ = nnls(columns, target)
    for _ in range(_ROUNDS):
        errors = np.abs(columns @ found - target)
        usual = _USUAL * _NORMAL * float(np.median(errors))
        if not usual:
            break
        trust = np.sqrt(usual / np.maximum(errors, usual))
        found, _ = nnls(columns * trust[:, None], target * trust)
    return found / size
