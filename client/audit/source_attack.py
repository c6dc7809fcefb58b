"""Blind source separation: features out of a fixed linear mix of them, without a known row.

Rows under a fixed permutation or rotation are C = X Q. Where the features of X are independent and not
Gaussian, FastICA (Hyvärinen 1999) finds Q up to order and sign, out of many rows of C alone.
"""

import warnings

import numpy as np
from scipy.stats import norm
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning

from blindtune.client.audit.knowledge import Knowledge
from blindtune.client.audit.statistics import Score
from blindtune.client.audit.transcript import Transcript

__all__ = ["by_independent_components"]

_MOST_ROWS = 4000
_MOST_ITERATIONS = 40
_RECOGNISED = 0.8


def by_independent_components(transcript: Transcript, knowledge: Knowledge) -> Score:
    """How many features are found: correlated with a separated source by more than 0.8 in magnitude."""
    masked = _rows(transcript, knowledge)
    plain = _rows(knowledge.plain, knowledge)
    scale = masked.std() or 1.0
    with warnings.catch_warnings():
        # Uniform words have no components to converge to.
        warnings.simplefilter("ignore", ConvergenceWarning)
        ica = FastICA(whiten="unit-variance", max_iter=_MOST_ITERATIONS, tol=1e-3, random_state=0)
        sources = ica.fit_transform(masked / scale)
    count, features = len(plain), plain.shape[1]
    alike = np.abs(np.corrcoef(sources.T, plain.T)[: sources.shape[1], sources.shape[1] :])
    found = int(np.count_nonzero(np.nan_to_num(alike).max(axis=0) > _RECOGNISED))
    # For one pair; a feature has as many chances as there are sources.
    by_chance = sources.shape[1] * 2 * norm.sf(np.arctanh(_RECOGNISED) * np.sqrt(count - 3))
    chance = float(np.clip(by_chance, 1e-9, 0.999))
    return Score("features by separation", "features", found, features, chance)


def _rows(transcript: Transcript, knowledge: Knowledge) -> np.ndarray:
    return np.concatenate([x.centred() for x in transcript.of(knowledge.sources)])[:_MOST_ROWS]
