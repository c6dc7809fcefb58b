"""Saying once that a training diverges."""

import math
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["DivergenceWarning"]


class DivergenceWarning(TrainerCallback):
    """Warns at the first loss, gradient or measured figure that is infinite or no number.

    Args:
        say: takes the warning.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        numbers = {name: x for name, x in (logs or {}).items() if isinstance(x, float)}
        wrong = [name for name, x in numbers.items() if not math.isfinite(x)]
        if wrong and not self._said:
            self._said = True
            self._say(
                f"warning: {', '.join(wrong)} at step {state.global_step} is no finite number, and null in "
                "JSON: the training diverges; stop it, and begin anew with a lower training.learning_rate"
            )
