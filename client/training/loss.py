"""The loss of one optimizer step, the same however its examples are cut into micro-batches.

With n tokens or texts that carry loss in all micro-batches of the step, p(t) the probability of each, and
label smoothing e over K classes,

    loss = -1/n sum ((1 - e) log p(t) + e/K sum_k log p(k))

and each micro-batch contributes its part of the sum. Models can't be asked for it: most classifiers take
the number of items and divide by their own batch all the same, so that a step would grow with its number
of micro-batches.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from blindtune.client.data.chat import IGNORED
from blindtune.client.recipe.schema import Task

__all__ = ["StepLoss"]


class StepLoss:
    """Computes a micro-batch's part of the loss from what the model returns.

    Args:
        task: a language model's labels are those of the token before; a classifier has one for each text.
        smoothing: label smoothing, from 0 to below 1.
    """

    def __init__(self, task: Task, smoothing: float) -> None:
        self._shifted = task == "instructions"
        self._smoothing = smoothing

    def items(self, labels: Sequence[torch.Tensor]) -> torch.Tensor:
        """How many tokens or texts carry loss in all micro-batches of a step, 1 at least."""
        counts = [self._targets(x).ne(IGNORED).sum() for x in labels]
        return torch.stack(counts).sum().clamp(min=1)

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """The part of a micro-batch.

        Args:
            outputs: of the model, with logits [batch, tokens, vocabulary] or [batch, classes].
            labels: [batch, tokens] or [batch]; `IGNORED` carries no loss.
            num_items_in_batch: of the whole step, from `items`; by default those of this micro-batch.
        """
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        targets = self._targets(labels).to(logits.device)
        if self._shifted:
            logits = logits[:, :-1]
        total = cross_entropy(
            logits.float().flatten(0, -2),
            targets.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=self._smoothing,
        )
        items = self.items([labels]) if num_items_in_batch is None else num_items_in_batch
        return total / items.to(total.device)

    def _targets(self, labels: torch.Tensor) -> torch.Tensor:
        return labels[:, 1:] if self._shifted else labels
