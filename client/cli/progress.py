"""How a run shows itself: one line for people, a line of JSON for each event for programs."""

import time
from collections.abc import Callable
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from blindtune.client.cli.console import emit, messages
from blindtune.client.data.prepared import PreparedData, Split
from blindtune.client.training.figures import Figures

__all__ = ["JsonObserver", "LineObserver", "counted", "figures_text"]


def counted(split: Split) -> str:
    """What a file gave, in words."""
    parts = [f"{len(split.rows):,} examples, format {split.layout}, {sum(split.lengths):,} tokens"]
    if split.cut:
        parts.append(f"{split.cut:,} cut off")
    if split.dropped:
        parts.append(f"{split.dropped:,} left out, since nothing of their answer is left")
    return ", ".join(parts)


def figures_text(figures: dict[str, float]) -> str:
    """Figures in one line."""
    return "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())


class LineObserver:
    """Shows a run on a terminal."""

    def __init__(self) -> None:
        self._line: _Line | None = None

    def say(self, message: str) -> None:
        messages.print(message, markup=False, highlight=False, soft_wrap=True)

    def data(self, data: PreparedData) -> None:
        self.say(f"train       {counted(data.train)}")
        if data.validation is not None:
            self.say(f"validation  {counted(data.validation)}")
        if data.labels:
            self.say(f"labels      {len(data.labels)}")
        for split in filter(None, (data.train, data.validation)):
            if split.unused:
                self.say(f"{split.path}: {len(split.unused):,} fields are not used; --dry-run names them")
            for warning in split.warnings:
                self.say(f"warning: {warning}")

    def measured(self, when: str, figures: dict[str, float]) -> None:
        self.say(f"{when:11} {figures_text(figures)}")

    def steps(self, so_far: Callable[[], Figures]) -> TrainerCallback:
        self._line = _Line(so_far)
        return self._line

    def close(self) -> None:
        """Ends the progress line, however the run ended."""
        if self._line is not None:
            self._line.close()


class JsonObserver:
    """Tells programs about a run."""

    def say(self, message: str) -> None:
        emit("message", text=message)

    def data(self, data: PreparedData) -> None:
        for name, split in (("train", data.train), ("validation", data.validation)):
            if split is not None:
                emit(
                    "data",
                    split=name,
                    examples=len(split.rows),
                    format=split.layout,
                    tokens=sum(split.lengths),
                    cut_off=split.cut,
                    without_loss=split.dropped,
                    empty=len(split.empty),
                    fields_not_used=len(split.unused),
                    warnings=split.warnings,
                )

    def measured(self, when: str, figures: dict[str, float]) -> None:
        emit("measured", when=when, **figures)

    def steps(self, so_far: Callable[[], Figures]) -> TrainerCallback:
        return _Events(so_far)

    def close(self) -> None:
        """Nothing is left open."""


class _Steps(TrainerCallback):
    """Follows the trainer; the rate is that of the steps of this process."""

    def __init__(self, so_far: Callable[[], Figures]) -> None:
        self._so_far = so_far
        self._start = so_far()
        self._loss: float | None = None
        self._began = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self._start, self._began = self._so_far(), time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            self._loss = float(logs["loss"])
            self.show(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self.show(state)

    def rate(self, figures: Figures) -> float:
        """Tokens a second."""
        return (figures.tokens - self._start.tokens) / max(1e-9, time.monotonic() - self._began)

    def show(self, state: TrainerState) -> None:
        """Shows where the run is."""


class _Line(_Steps):
    def __init__(self, so_far: Callable[[], Figures]) -> None:
        super().__init__(so_far)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=messages,
        )
        self._task: TaskID | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        super().on_train_begin(args, state, control)
        self._task = self._progress.add_task("", total=state.max_steps, completed=state.global_step, text="")
        self._progress.start()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the line."""
        self._progress.stop()

    def show(self, state: TrainerState) -> None:
        if self._task is None:
            return
        figures = self._so_far()
        loss = "" if self._loss is None else f"loss {self._loss:.4f}  "
        text = (
            f"{loss}{self.rate(figures):,.0f} tokens/s  "
            f"{figures.bytes_up / 1e6:,.1f} MB up  {figures.bytes_down / 1e6:,.1f} MB down"
        )
        self._progress.update(self._task, completed=state.global_step, text=text)


class _Events(_Steps):
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """A step's event comes with its loss, when that is logged."""

    def show(self, state: TrainerState) -> None:
        figures = self._so_far()
        emit(
            "step",
            step=state.global_step,
            steps=state.max_steps,
            loss=self._loss,
            tokens_per_second=self.rate(figures),
            bytes_up=figures.bytes_up,
            bytes_down=figures.bytes_down,
        )
