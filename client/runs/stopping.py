"""Ending a run on request, after the step under way and with a checkpoint."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["StopRequest", "stop_on_signals"]


class StopRequest(TrainerCallback):
    """Stops the training after the step under way once `wanted` is set.

    What belongs to the end of an epoch, such as measuring, comes before the checkpoint: a run that goes on
    from there begins with the next epoch.

    Args:
        otherwise: is asked after each step, and stops the training as well when it says True.
    """

    def __init__(self, otherwise: Callable[[], bool] = lambda: False) -> None:
        self.wanted = False
        self._otherwise = otherwise

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        if not (state.epoch or 0.0).is_integer():
            self._stop(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self._stop(state, control)

    def _stop(self, state: TrainerState, control: TrainerControl) -> None:
        if (self.wanted or self._otherwise()) and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True


@contextmanager
def stop_on_signals(request: StopRequest, say: Callable[[str], None]) -> Iterator[None]:
    """SIGINT and SIGTERM set the request; a second one interrupts at once."""
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:  # and not whether it is wanted: that may have another reason, and then this is the first
            raise KeyboardInterrupt
        asked = request.wanted = True
        with suppress(RuntimeError):  # the signal came in the middle of another line
            say("stopping after this step, with a checkpoint; again to stop at once")

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
