"""Which labels went in? The gradients of the last layers against what a loss makes of them."""

import numpy as np
from sklearn.linear_model import LogisticRegression

from blindtune.client.audit.knowledge import Integers, Knowledge, unit_rows
from blindtune.client.audit.statistics import Score
from blindtune.client.audit.transcript import Transcript

__all__ = ["by_direction", "by_negative_entry"]

_MOST_TARGETS = 400


def by_negative_entry(transcript: Transcript, knowledge: Knowledge) -> Score:
    """The column with the smallest entry: a head's output gradient is softmax less one at the label."""
    rows, labels = _rows(transcript, knowledge)
    if not knowledge.vocabulary_labels:
        raise ValueError("labels are columns of the last layer only where that is a language model's head")
    distinct = np.unique(labels, return_index=True)[1]
    distinct = distinct[:: -(-len(distinct) // _MOST_TARGETS)]
    right = int(np.count_nonzero(rows[distinct].argmin(axis=1) == labels[distinct]))
    return Score("label by negative entry", "distinct labels", right, len(distinct), 1 / len(distinct))


def by_direction(transcript: Transcript, knowledge: Knowledge) -> Score:
    """The class whose known gradients have this direction, by logistic regression on unit rows.

    Labels are told apart by gradients even where the class directions are secret (Li et al. 2022). The
    attacker knows the labels of some batches. Each class is tried equally often.
    """
    rows, labels = _rows(transcript, knowledge)
    operands = np.repeat(np.arange(len(knowledge.labels)), [np.sum(x >= 0) for x in knowledge.labels])
    known, unknown = operands < knowledge.known_labels, operands >= knowledge.known_labels
    fit = LogisticRegression(C=100.0, max_iter=1000).fit(unit_rows(rows[known]), labels[known])
    classes, counts = np.unique(labels[unknown], return_counts=True)
    chosen = np.concatenate(
        [np.flatnonzero(unknown & (labels == label))[: counts.min()] for label in classes]
    )
    right = int(np.count_nonzero(fit.predict(unit_rows(rows[chosen])) == labels[chosen]))
    return Score("label by direction", "labels", right, len(chosen), 1 / len(classes))


def _rows(transcript: Transcript, knowledge: Knowledge) -> tuple[np.ndarray, Integers]:
    """The gradients that a label belongs to, and the labels.

    Raises:
        ValueError: transcript and knowledge are not of the same run.
    """
    operands = transcript.of(knowledge.last)
    if [x.rows for x in operands] != [len(x) for x in knowledge.labels]:
        raise ValueError("the transcript is not of the run that the labels are of")
    labels = np.concatenate(knowledge.labels)
    rows = np.concatenate([x.centred() for x in operands])
    return rows[labels >= 0], labels[labels >= 0]
