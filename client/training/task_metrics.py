"""How good a model is, computed batch by batch, so that no logits pile up.

Instructions: with n tokens that carry loss, and p(t) the probability of each given what precedes it,

    loss = -1/n sum log p(t)      perplexity = exp(loss)      token_accuracy = share of t that are most likely

Classification: loss is the mean cross entropy, macro_f1 the unweighted mean over classes of F1.
"""

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from sklearn.metrics import f1_score
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction

from blindtune.client.data.chat import IGNORED
from blindtune.client.recipe.schema import Task

__all__ = ["TaskMetrics", "metrics_of"]


class TaskMetrics(ABC):
    """Collects what batches of predictions say, and gives the figures after the last."""

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []

    @abstractmethod
    def reduce(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What is kept of a batch: float64 [batch, figures]."""

    @abstractmethod
    def figures(self, rows: np.ndarray) -> dict[str, float]:
        """The figures of all batches' rows."""

    def add(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        """Takes a batch that `reduce` made; gives the figures after the last one."""
        self._rows.append(torch.as_tensor(prediction.predictions).cpu().numpy())
        if not compute_result:
            return {}
        rows, self._rows = np.concatenate(self._rows), []
        return self.figures(rows)


class _Language(TaskMetrics):
    def reduce(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sum of losses, tokens that carry loss, and how many of them were most likely, of each row."""
        predicted, targets = logits[:, :-1].float(), labels[:, 1:]
        losses = cross_entropy(predicted.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
        counted = targets != IGNORED
        right = (predicted.argmax(-1) == targets) & counted
        return torch.stack([losses.double().sum(1), counted.sum(1).double(), right.sum(1).double()], dim=1)

    def figures(self, rows: np.ndarray) -> dict[str, float]:
        loss, tokens, right = (float(x) for x in rows.sum(axis=0))
        mean = loss / tokens
        # Beyond this a double overflows; such a model knows nothing anyway.
        return {"nll": mean, "perplexity": math.exp(min(mean, 700.0)), "token_accuracy": right / tokens}


class _Classification(TaskMetrics):
    def reduce(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss, predicted class and true class of each row."""
        losses = cross_entropy(logits.float(), labels, reduction="none")
        return torch.stack([losses.double(), logits.argmax(-1).double(), labels.double()], dim=1)

    def figures(self, rows: np.ndarray) -> dict[str, float]:
        predicted, true = rows[:, 1].astype(int), rows[:, 2].astype(int)
        return {
            "nll": float(rows[:, 0].mean()),
            "accuracy": float((predicted == true).mean()),
            "macro_f1": float(f1_score(true, predicted, average="macro", zero_division=0.0)),
        }


def metrics_of(task: Task) -> TaskMetrics:
    """What is measured for a task."""
    return _Classification() if task == "classification" else _Language()
