"""One run from its recipe to its adapter: `train_recipe`."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from transformers import TrainerCallback

from blindtune.checkpoint.skeleton import supported_config
from blindtune.client.data.prepared import PreparedData, Split, prepare_data
from blindtune.client.model.quantizer import multiplier_of
from blindtune.client.preflight.offline import before_loading
from blindtune.client.process.disk import disk_errors_are_clear, sync
from blindtune.client.process.finite import finite
from blindtune.client.recipe import Recipe
from blindtune.client.rounds.multiplier import PrivateMultiplier, RemoteMultiplier
from blindtune.client.runs.divergence import DivergenceWarning
from blindtune.client.runs.facts import Privacy, RunFacts
from blindtune.client.runs.learning import learning_warnings
from blindtune.client.runs.monitoring import Monitor
from blindtune.client.runs.recording import RunRecord, record_key
from blindtune.client.runs.stopping import StopRequest, stop_on_signals
from blindtune.client.training.adapter import new_adapter
from blindtune.client.training.checkpoints import (
    damage_is_clear,
    owner_only,
    read_json,
    staging,
    write_json,
)
from blindtune.client.training.environment import without_accelerate_variables
from blindtune.client.training.figures import Figures, Prices, certificates, traffic
from blindtune.client.training.folder import STATE, SUMMARY, RunFolder
from blindtune.client.training.models import BaseModel, blind_config
from blindtune.client.training.stops import write_stop_tokens
from blindtune.client.training.trainer import CHECKPOINTS, FIGURES, RecipeTrainer
from blindtune.client.trust.choice import are_new, remember_operators
from blindtune.errors import InterruptedRunError

__all__ = ["Observer", "train_recipe"]


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


@without_accelerate_variables()
def train_recipe(
    recipe: Recipe,
    observer: Observer,
    *,
    resume: bool = False,
    prices: Prices | None = None,
    private: bool = True,
    stop: StopRequest | None = None,
    monitor: Monitor | None = None,
) -> dict[str, Any]:
    """Trains the adapter of a recipe and writes it to the output folder.

    Args:
        recipe: what to do.
        observer: is told of it.
        resume: go on with a run that was interrupted.
        prices: for the summary; new ones for a run that is complete already change its cost.
        private: False to train with the whole unquantized model in this process, as stock PEFT does: for
            comparisons.
        stop: ends the run after the step under way, as a signal does, when its ``wanted`` is set.
        monitor: shows the run's figures.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        BlindtuneError: see the exception tree; what was trained until then is in the checkpoints.
    """
    config = blind_config(recipe) if private else None
    now = RunFolder(recipe.output.dir).start(resume)  # before anything that takes long
    key = record_key(recipe) if private else None
    base = BaseModel.found(recipe)
    tokenizer = base.tokenizer()
    data = prepare_data(recipe.data, tokenizer, recipe.training.seed, now)
    observer.data(data)
    for finding in before_loading(recipe, base.folder, tokenizer, data):
        if finding.status == "warning":
            observer.say(finding.line)
    with RunFolder.held(recipe.output.dir) as folder:
        if resume:
            folder.require_whole_checkpoint(recipe)
        else:
            folder.require_unused()
        fingerprint = base.fingerprint() if private else None
        if resume:
            for warning in folder.require_same(recipe, data, fingerprint):
                observer.say(warning)
            if changed := folder.differing_versions():
                observer.say(
                    f"this run began with other versions ({', '.join(changed)}): it goes on, and may "
                    "end with other last bits"
                )
            if folder.complete:
                observer.say(f"{folder.path}: this run is complete already")
                return _priced_anew(folder, prices or Prices())
            if fingerprint is not None and not folder.knows_model:
                observer.say(
                    f"warning: {folder.path} does not say which base model this run began with, since an "
                    "earlier version wrote it: it goes on with this one"
                )
                folder.keep(model_fingerprint=fingerprint)
        privacy = None if config is None or fingerprint is None else Privacy(config, fingerprint)
        facts = RunFacts(recipe, folder, base, tokenizer, data, privacy)
        run = _Run(facts, observer, monitor)
        if config is not None and config.operators:
            new = " (no run of yours has used these before)" if are_new(recipe) else ""
            observer.say(config.described + new)
        run.load()
        if config is not None and config.operators and (noted := remember_operators(recipe)):
            observer.say(noted)
        if not resume:
            for warning in folder.begin(recipe, data, fingerprint, now):
                observer.say(warning)
        record = RunRecord.of(key, facts, observer.say)
        with record.kept_to_the_end():
            return run.finish(prices or Prices(), stop or StopRequest(), record)


def _priced_anew(folder: RunFolder, prices: Prices) -> dict[str, Any]:
    """The summary of a complete run, with its cost at other prices when there are some."""
    summary = read_json(folder.path / SUMMARY)
    with damage_is_clear(folder.path / SUMMARY):
        cost = prices.cost(summary["seconds"]["total"], summary["bytes_up"] + summary["bytes_down"])
    if cost:
        summary |= cost
        write_json(folder.path / SUMMARY, summary)
    return summary


class _Run:
    def __init__(self, facts: RunFacts, observer: Observer, monitor: Monitor | None) -> None:
        self._recipe = facts.recipe
        self._folder = facts.folder
        self._base = facts.base
        self._data = facts.data
        self._tokenizer = facts.tokenizer
        self._config = None if facts.privacy is None else facts.privacy.config
        self._observer = observer
        self._monitor = monitor
        self._multiplier: PrivateMultiplier | None = None

    def load(self) -> None:
        """Loads the model, which connects to its workers, and puts the adapter on it."""
        self._tell_padding()
        model = self._base.load(self._data.labels, self._tokenizer, self._config)
        if self._config is not None:
            self._multiplier = multiplier_of(model)
            if self._monitor is not None:
                self._monitor.watch(self._multiplier)
        self._model = new_adapter(model, self._recipe, self._base.keys(), say=self._observer.say)
        self._started = time.monotonic()

    def _tell_padding(self) -> None:
        stated = getattr(supported_config(self._base.folder).get_text_config(), "pad_token_id", None)
        pad = self._tokenizer.pad_token_id
        if self._recipe.data.task == "classification" and stated not in (None, pad):
            self._observer.say(
                f"the model's config.json pads with token {stated} and its tokenizer with {pad}: the "
                "tokenizer counts; where you load the adapter yourself, set model.config.pad_token_id = "
                f"{pad}"
            )

    def finish(self, prices: Prices, stop: StopRequest, record: RunRecord) -> dict[str, Any]:
        """Trains from the newest checkpoint, or from the start, to the end."""
        try:
            return self._finish(prices, stop, record)
        finally:
            self._close()

    def _close(self) -> None:
        if self._multiplier is not None:
            self._multiplier.close()

    def _finish(self, prices: Prices, stop: StopRequest, record: RunRecord) -> dict[str, Any]:
        validation = self._data.validation
        # Where nothing waits for workers, side by side would gain nothing.
        remote = isinstance(self._multiplier, RemoteMultiplier)
        in_flight = self._recipe.masking.micro_batches_in_flight if remote else 1
        checkpoint = self._folder.newest_checkpoint()
        # Kept with the newest checkpoint or, before the first one, with the figures before training.
        kept = self._folder.state.get("so_far", {}) if checkpoint is None else read_json(checkpoint / FIGURES)
        with damage_is_clear(self._folder.path / STATE if checkpoint is None else checkpoint / FIGURES):
            self._earlier = Figures.from_json(kept)
        trainer = RecipeTrainer(
            self._recipe,
            self._folder.path,
            self._model,
            self._tokenizer,
            self._data.train,
            validation,
            self._this_process,
            in_flight,
            self._close,
            self._multiplier,
        )
        several = min(in_flight, self._recipe.training.gradient_accumulation_steps) > 1
        if several and trainer.one_at_a_time is not None:
            self._observer.say(f"only one micro-batch is in flight at a time: {trainer.one_at_a_time}")
        trainer.add_callback(DivergenceWarning(self._observer.say))
        before = self._before(trainer)

        def so_far() -> Figures:
            return self._this_process() + trainer.trained

        trainer.add_callback(stop)
        trainer.add_callback(record.follow(self._folder.path / CHECKPOINTS, self._multiplier))
        trainer.add_callback(self._observer.steps(so_far))
        if self._monitor is not None:
            trainer.add_callback(self._monitor)
        if checkpoint is not None:
            self._observer.say(f"going on from {checkpoint.name}")
        with stop_on_signals(stop, self._observer.say):
            trainer.train_from(checkpoint)
        if trainer.state.global_step < trainer.state.max_steps:
            raise InterruptedRunError(
                f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}, which is "
                "saved: go on with --resume"
            )
        self._save_adapter(trainer)
        after = self._measure(trainer, "after")
        summary = self._summary(so_far(), before, after, prices)
        state = trainer.state
        warnings = learning_warnings(
            self._model, state.global_step, state.epoch or 0.0, before, after, state.log_history
        )
        for warning in warnings:
            self._observer.say(f"warning: {warning}")
        summary["warnings"] = warnings
        summary["record"] = record.finish(
            self._folder.path, summary["steps"], summary["verified_responses"], summary["lies"]
        )
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
        figures = trainer.measure(validation)
        self._observer.measured(when, figures)
        return figures

    def _save_adapter(self, trainer: RecipeTrainer) -> None:
        """Writes the adapter elsewhere first, so that each file of the result is whole or not there."""
        folder = self._folder.path
        with disk_errors_are_clear(folder):
            with staging(folder / CHECKPOINTS) as written:
                trainer.save_model(str(written))
                self._tokenizer.save_pretrained(written)
                if self._recipe.data.task == "instructions":
                    write_stop_tokens(self._model, self._tokenizer, self._data.train.stops, written)
                (written / "training_args.bin").unlink(missing_ok=True)  # a pickle of what recipe.yaml says
                owner_only(written)
                for path in sorted(written.iterdir()):
                    sync(path)  # the summary, which says that all is there, is not to be there first
                    path.replace(folder / path.name)
                sync(folder)

    def _summary(
        self,
        figures: Figures,
        before: dict[str, float] | None,
        after: dict[str, float] | None,
        prices: Prices,
    ) -> dict[str, Any]:
        recipe, train, validation = self._recipe, self._data.train, self._data.validation
        summary: dict[str, Any] = {
            "model": recipe.model.name,
            "task": recipe.data.task,
            "masking": recipe.masking.mode if self._multiplier is not None else "none (not private)",
            "labels": list(self._data.labels) or None,
            "before": before,
            "after": after,
            "examples": {"train": _counts(train), "validation": validation and _counts(validation)},
            **figures.summary(prices),
            **certificates(self._multiplier),
        }
        return dict(finite(summary))  # as it will be read back


def _counts(split: Split) -> dict[str, int]:
    return {
        "used": len(split.rows),
        "cut_off": split.cut,
        "without_loss": split.dropped,
        "empty": len(split.empty),
    }
