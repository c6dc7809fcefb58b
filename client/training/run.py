"""One run from its recipe to its adapter: `train_recipe`."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from transformers import TrainerCallback

from blindtune.client.config import BlindConfig
from blindtune.client.data.prepared import PreparedData, Split, prepare_data
from blindtune.client.disk import disk_errors_are_clear
from blindtune.client.multiplier import PrivateMultiplier
from blindtune.client.quantizer import multiplier_of
from blindtune.client.recipe import Recipe
from blindtune.client.training.checkpoints import read_json, sync, write_json
from blindtune.client.training.figures import Figures, traffic
from blindtune.client.training.folder import SUMMARY, RunFolder
from blindtune.client.training.models import blind_config, load_base, load_tokenizer, new_adapter
from blindtune.client.training.stopping import StopRequest, stop_on_signals
from blindtune.client.training.trainer import CHECKPOINTS, FIGURES, RecipeTrainer, Rows
from blindtune.protocol.errors import ConfigurationError, InterruptedRunError

__all__ = ["Observer", "Prices", "train_recipe"]


class Observer(Protocol):
    """Is told how a run goes on."""

    def say(self, message: str) -> None:
        """Something happened."""

    def data(self, data: PreparedData) -> None:
        """The data was read."""

    def measured(self, when: str, figures: dict[str, float]) -> None:
        """The validation data was measured, ``before`` or ``after``."""

    def steps(self, so_far: Callable[[], Figures]) -> TrainerCallback:
        """What the trainer tells of each step; ``so_far`` gives the run's figures at any time."""


@dataclass(frozen=True)
class Prices:
    """What the machine and the traffic cost.

    Attributes:
        per_hour: of the run's time.
        per_gb: of 10^9 bytes, either way.
    """

    per_hour: float | None = None
    per_gb: float | None = None


def train_recipe(
    recipe: Recipe,
    observer: Observer,
    *,
    resume: bool = False,
    prices: Prices | None = None,
    private: bool = True,
) -> dict[str, Any]:
    """Trains the adapter of a recipe and writes it to the output folder.

    Args:
        recipe: what to do.
        observer: is told of it.
        resume: go on with a run that was interrupted.
        prices: for the summary.
        private: False to train with the whole unquantized model in this process, as stock PEFT does: for
            comparisons.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        BlindtuneError: see the exception tree; what was trained until then is in the checkpoints.
    """
    config = blind_config(recipe) if private else None
    tokenizer = load_tokenizer(recipe)
    data = prepare_data(recipe.data, tokenizer, recipe.training.seed)
    observer.data(data)
    with RunFolder.held(recipe.output.dir) as folder:
        if resume:
            folder.require_same(recipe, data)
            if changed := folder.differing_versions():
                observer.say(
                    f"this run began with other versions ({', '.join(changed)}): it goes on, and may "
                    "end with other last bits"
                )
            if folder.complete:
                observer.say(f"{folder.path}: this run is complete already")
                return read_json(folder.path / SUMMARY)
        else:
            folder.require_unused()
        return _Run(recipe, folder, data, tokenizer, config, observer, resume).finish(prices or Prices())


class _Run:
    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        data: PreparedData,
        tokenizer: Any,
        config: BlindConfig | None,
        observer: Observer,
        resume: bool,
    ) -> None:
        self._recipe = recipe
        self._folder = folder
        self._data = data
        self._tokenizer = tokenizer
        self._observer = observer
        base = load_base(recipe, data.labels, tokenizer, config)
        self._multiplier: PrivateMultiplier | None = None if config is None else multiplier_of(base)
        _require_positions(base, data)
        self._model = new_adapter(base, recipe)
        if not resume:
            folder.begin(recipe, data)
        self._checkpoint = folder.newest_checkpoint()
        # Kept with the newest checkpoint or, before the first one, with the figures before training.
        kept = folder.state.get("so_far", {})
        if self._checkpoint is not None:
            kept = read_json(self._checkpoint / FIGURES)
        self._earlier = Figures.from_json(kept)
        self._started = time.monotonic()

    def finish(self, prices: Prices) -> dict[str, Any]:
        try:
            return self._finish(prices)
        finally:
            if self._multiplier is not None:
                self._multiplier.close()

    def _finish(self, prices: Prices) -> dict[str, Any]:
        validation = self._data.validation
        trainer = RecipeTrainer(
            self._recipe,
            self._folder.path,
            self._model,
            self._tokenizer,
            Rows(self._data.train.rows),
            None if validation is None else Rows(validation.rows),
            self._this_process,
        )
        before = self._before(trainer)

        def so_far() -> Figures:
            return self._this_process() + trainer.trained

        stop = StopRequest()
        trainer.add_callback(stop)
        trainer.add_callback(self._observer.steps(so_far))
        if self._checkpoint is not None:
            self._observer.say(f"going on from {self._checkpoint.name}")
        with stop_on_signals(stop, self._observer.say):
            trainer.train_from(self._checkpoint)
        if trainer.state.global_step < trainer.state.max_steps:
            raise InterruptedRunError(
                f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}, which is "
                "saved: go on with --resume"
            )
        self._save_adapter(trainer)
        after = self._measure(trainer, "after")
        summary = self._summary(so_far(), before, after, prices)
        write_json(self._folder.path / SUMMARY, summary)
        return summary

    def _this_process(self) -> Figures:
        """Figures of the run but for what the trainer counts."""
        seconds = time.monotonic() - self._started
        return self._earlier + replace(traffic(self._multiplier), seconds=seconds)

    def _before(self, trainer: RecipeTrainer) -> dict[str, float] | None:
        """The figures before training, measured once in a run."""
        kept = self._folder.state
        if "before" in kept:
            return kept["before"]
        before = self._measure(trainer, "before")
        self._folder.keep(before=before, so_far=vars(self._this_process()))
        return before

    def _measure(self, trainer: RecipeTrainer, when: str) -> dict[str, float] | None:
        validation = self._data.validation
        if validation is None:
            return None
        figures = trainer.measure(Rows(validation.rows))
        self._observer.measured(when, figures)
        return figures

    def _save_adapter(self, trainer: RecipeTrainer) -> None:
        """Writes the adapter elsewhere first, so that each file of the result is whole or not there."""
        folder = self._folder.path
        with disk_errors_are_clear(folder):
            written = folder / CHECKPOINTS / ".adapter"
            shutil.rmtree(written, ignore_errors=True)
            trainer.save_model(str(written))
            self._tokenizer.save_pretrained(written)
            (written / "training_args.bin").unlink(missing_ok=True)  # a pickle of what recipe.yaml says
            for path in sorted(written.iterdir()):
                sync(path)  # the summary, which says that all is there, is not to be there first
                path.replace(folder / path.name)
            written.rmdir()
            sync(folder)

    def _summary(
        self,
        figures: Figures,
        before: dict[str, float] | None,
        after: dict[str, float] | None,
        prices: Prices,
    ) -> dict[str, Any]:
        recipe, train, validation = self._recipe, self._data.train, self._data.validation
        return {
            "model": recipe.model.name,
            "task": recipe.data.task,
            "masking": recipe.masking.mode if self._multiplier is not None else "none (not private)",
            "labels": list(self._data.labels) or None,
            "before": before,
            "after": after,
            "examples": {"train": _counts(train), "validation": validation and _counts(validation)},
            **figures.summary(prices.per_hour, prices.per_gb),
        }


def _require_positions(base: Any, data: PreparedData) -> None:
    """Checks that the model has a position for every token.

    Raises:
        ConfigurationError: an example is longer.
    """
    positions = getattr(base.config, "max_position_embeddings", None)
    splits = [x for x in (data.train, data.validation) if x is not None]
    longest = max(max(x.lengths) for x in splits)
    if positions is not None and longest > positions:
        raise ConfigurationError(
            f"the longest example has {longest} tokens, and the model takes {positions}: "
            f"set data.max_length to {positions}"
        )


def _counts(split: Split) -> dict[str, int]:
    return {"used": len(split.rows), "cut_off": split.cut, "without_loss": split.dropped}
