"""Measured figures, compared with a loop over tokens and with scikit-learn."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch.nn.utils.rnn import pad_sequence
from transformers import EvalPrediction

from blindtune.client.data.chat import IGNORED
from blindtune.client.training.task_metrics import metrics_of

VOCABULARY = 11
Rows = Sequence[tuple[torch.Tensor, torch.Tensor]]


def sequences(lengths: Sequence[int], seed: int = 0) -> Rows:
    """Logits [n, vocabulary] and labels [n] of sequences; some tokens carry no loss."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        logits = 3 * torch.randn((length, VOCABULARY), generator=generator)
        labels = torch.randint(0, VOCABULARY, (length,), generator=generator)
        labels[torch.rand((length,), generator=generator) < 0.4] = IGNORED
        labels[-1] = int(logits[-2].argmax())  # at least one carries loss, and is right
        rows.append((logits, labels))
    return rows


def language_reference(rows: Rows) -> dict[str, float]:
    total, right, count = 0.0, 0, 0
    for logits, labels in rows:
        for position in range(1, len(labels)):
            target = int(labels[position])
            if target != IGNORED:
                scores = torch.log_softmax(logits[position - 1].double(), 0)
                total -= float(scores[target])
                right += int(scores.argmax()) == target
                count += 1
    return {"nll": total / count, "perplexity": math.exp(total / count), "token_accuracy": right / count}


def measured(metrics: Any, batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """Figures as the trainer asks for them."""
    figures: dict[str, float] = {}
    for number, (logits, labels) in enumerate(batches, 1):
        reduced = metrics.reduce(logits, labels)
        assert len(reduced) == len(labels)
        found = metrics.add(EvalPrediction(reduced.numpy(), labels.numpy()), number == len(batches))
        assert bool(found) == (number == len(batches))
        figures = found
    return figures


def padded(rows: Rows, size: int, extra: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    batches = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        logits = pad_sequence([x for x, _ in part], batch_first=True, padding_value=7.0)
        labels = pad_sequence([y for _, y in part], batch_first=True, padding_value=IGNORED)
        batches.append(
            (
                torch.nn.functional.pad(logits, (0, 0, 0, extra), value=-3.0),
                torch.nn.functional.pad(labels, (0, extra), value=IGNORED),
            )
        )
    return batches


@pytest.mark.parametrize(("size", "extra"), [(1, 0), (2, 0), (3, 5), (7, 1)])
def test_language_figures_are_those_of_a_loop_however_tokens_are_padded(size: int, extra: int) -> None:
    rows = sequences([5, 2, 9, 4, 30, 3, 6])
    found = measured(metrics_of("instructions"), padded(rows, size, extra))
    expected = language_reference(rows)
    assert found.keys() == expected.keys()
    assert 0 < expected["token_accuracy"] < 1
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6)


def test_each_token_counts_the_same_and_not_each_batch() -> None:
    rows = sequences([40, 2])
    batches = padded(rows, 1)
    means = [language_reference([x])["nll"] for x in rows]
    assert measured(metrics_of("instructions"), batches)["nll"] != pytest.approx(sum(means) / 2, rel=1e-3)


def test_the_first_token_carries_no_loss() -> None:
    logits, labels = sequences([6])[0]
    changed = labels.clone()
    changed[0] = 3
    first = measured(metrics_of("instructions"), [(logits[None], labels[None])])
    assert measured(metrics_of("instructions"), [(logits[None], changed[None])]) == first


def test_figures_start_anew_after_the_last_batch() -> None:
    metrics = metrics_of("instructions")
    rows = sequences([5, 7], 1)
    measured(metrics, padded(sequences([9, 3], 2), 1))
    assert measured(metrics, padded(rows, 1)) == measured(metrics_of("instructions"), padded(rows, 1))


def test_half_precision_logits_are_summed_precisely() -> None:
    rows = [(x.bfloat16(), y) for x, y in sequences([50, 60])]
    found = measured(metrics_of("instructions"), padded(rows, 2))
    assert found["nll"] == pytest.approx(language_reference(rows)["nll"], rel=1e-6)


def test_a_model_that_is_certain_and_wrong_has_a_finite_perplexity() -> None:
    logits = torch.zeros((1, 2, VOCABULARY))
    logits[0, 0, 3] = 5000.0
    figures = measured(metrics_of("instructions"), [(logits, torch.tensor([[IGNORED, 4]]))])
    assert figures["nll"] == pytest.approx(5000)
    assert math.isfinite(figures["perplexity"])


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("size", [1, 4, 50])
def test_classification_figures_are_those_of_scikit_learn(classes: int, size: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn((50, classes), generator=generator)
    labels = torch.randint(0, classes, (50,), generator=generator)
    batches = [(logits[i : i + size], labels[i : i + size]) for i in range(0, 50, size)]
    found = measured(metrics_of("classification"), batches)
    true, predicted = labels.numpy(), logits.argmax(1).numpy()
    log_softmax = torch.log_softmax(logits.double(), 1)
    expected = {
        "nll": -float(np.mean([float(log_softmax[i, int(y)]) for i, y in enumerate(labels)])),
        "accuracy": accuracy_score(true, predicted),
        "macro_f1": f1_score(true, predicted, average="macro"),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6)


def test_a_class_that_is_never_predicted_counts_as_zero_and_warns_nobody() -> None:
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    found = measured(metrics_of("classification"), [(logits, torch.tensor([0, 0, 1]))])
    assert found["macro_f1"] == pytest.approx(0.4)  # (4/5 + 0) / 2
    assert found["accuracy"] == pytest.approx(2 / 3)
