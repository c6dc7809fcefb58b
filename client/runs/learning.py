"""Saying at the end of a run when it learned nothing.

A warning that comes without need is soon overlooked, so each has to be sure:

- The adapter is still zero: every ``lora_B`` is exactly 0, and the tuned model is the base model.
- The validation loss fell by less than `_LEAST` of itself, and no share of right answers rose by as much
  as `_LEAST`. The same examples are measured before and after, so there is no chance in it. A fine-tuning
  that was worth its time moves the loss by several percent; 1 % is less than other seeds change.
- Without validation data, the training loss of the last quarter of the steps is not lower by `_LEAST` than
  that of the first. Batches differ, so this is said only where the standard error of the difference,
  sqrt(s1^2/n1 + s2^2/n2), is at most `_ERROR`: a run that gains 5 % is then called flat once in 250 times.

All but the first need a whole epoch, or `_STEPS` steps: who tries out a few expects nothing of them.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, variance
from typing import Any

from torch import nn

__all__ = ["learning_warnings"]

_LEAST = 0.01
_ERROR = 0.015
_STEPS = 10
_NOTHING_LEFT = 0.01
"""Nats: a loss below this can't fall by much."""

_SHARES = ("accuracy", "macro_f1", "token_accuracy")
_ADVICE = (
    "try a higher training.learning_rate, more steps, or more layers in adapter.target_modules, and see with "
    "--dry-run what carries loss"
)

Measured = Mapping[str, Any]


def learning_warnings(
    model: nn.Module,
    steps: int,
    epochs: float,
    before: Measured | None,
    after: Measured | None,
    history: Sequence[Mapping[str, Any]],
) -> list[str]:
    """What is to be said of a run that is over; nothing, as a rule.

    Args:
        model: with its adapter.
        steps: optimizer steps.
        epochs: passes over the data.
        before, after: figures of the validation data, where there is any.
        history: what the trainer logged.
    """
    if _still_zero(model):
        return [
            f"the adapter is still zero after {steps} steps: every lora_B is exactly 0, so its layers are "
            "those of the base model; look at training.learning_rate, and whether the loss reaches the "
            "layers in adapter.target_modules"
        ]
    if steps < _STEPS and epochs < 1:
        return []
    if before is not None and after is not None:
        return _of_validation(steps, before, after)
    return _of_training([float(x["loss"]) for x in history if "loss" in x])


def _still_zero(model: nn.Module) -> bool:
    ends = [x for name, x in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    return bool(ends) and not any(x.detach().any() for x in ends)


def _of_validation(steps: int, before: Measured, after: Measured) -> list[str]:
    first, last = before["loss"], after["loss"]
    # A figure that was written down and read again is None where it was no number.
    if first is None or not (math.isfinite(first) and math.isfinite(last)) or first < _NOTHING_LEFT:
        return []
    if any(after[x] - before[x] >= _LEAST for x in _SHARES if x in before and x in after):
        return []
    went = f"the validation loss went from {first:.4g} to {last:.4g} in {steps} steps"
    if last > first * (1 + _LEAST):
        return [
            f"worse than before: {went}; take a lower training.learning_rate or fewer epochs, or check that "
            "data.validation is like data.train"
        ]
    return [f"hardly anything was learned: {went}; {_ADVICE}"] if last > first * (1 - _LEAST) else []


def _of_training(losses: Sequence[float]) -> list[str]:
    quarter = len(losses) // 4
    if quarter < 2 or not all(map(math.isfinite, losses)):
        return []
    first, last = losses[:quarter], losses[-quarter:]
    begin, end = mean(first), mean(last)
    error = math.sqrt((variance(first) + variance(last)) / quarter)
    if begin < _NOTHING_LEFT or error > _ERROR * begin or end <= begin * (1 - _LEAST):
        return []
    return [
        f"hardly anything was learned: the mean training loss went from {begin:.4g} in the first quarter of "
        f"the steps to {end:.4g} in the last; {_ADVICE}"
    ]
