"""A run's first step with a tiny model in the place of the real one, before that is loaded.

The trainer, its optimizer, its schedule, its measuring and its checkpoints are those of the run, with the
arguments of the run, so whatever they refuse or trip over shows here, in a fraction of a second. What the
stand-in learns is made up: nothing private takes part.
"""

import gc
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from blindtune.client.data.prepared import PreparedData, Split
from blindtune.client.recipe.schema import Recipe
from blindtune.client.training.checkpoints import RandomState
from blindtune.client.training.effects import require_effect
from blindtune.client.training.trainer import RecipeTrainer
from blindtune.errors import BlindtuneError, ConfigurationError

__all__ = ["rehearse"]

_TOKENS = [1, 2, 3]
_NO_FIGURES = ("runtime", "per_second", "preparation_time", "epoch")
# Of a long schedule as many steps are looked at.
_MOST_RATES = 2000


def rehearse(recipe: Recipe, data: PreparedData, tokenizer: Any) -> None:
    """Takes the first step of a recipe with a stand-in for its model, measures and saves as the run would.

    Args:
        recipe: of the run.
        data: gives the number of examples and classes; no token of it is used.
        tokenizer: that pads.

    Raises:
        ConfigurationError: the run would fail; the message says at what.
    """
    random_state = RandomState()
    with _nothing_to_collect():
        try:
            _rehearse(recipe, data, tokenizer)
        except (BlindtuneError, MemoryError):
            raise
        except Exception as error:  # of any library that the arguments lead to
            what = " ".join(str(error).split())[:400]
            raise ConfigurationError(
                f"training: a first step with a stand-in for the model fails ({type(error).__name__}: "
                f"{what}): change the argument that this names"
            ) from error
        finally:
            random_state.restore()


def _rehearse(recipe: Recipe, data: PreparedData, tokenizer: Any) -> None:
    with tempfile.TemporaryDirectory(prefix="blindtune-") as folder:
        trainer = _trainer(recipe, data, tokenizer, Path(folder))
        if data.validation is not None:
            _require_metric(trainer, recipe.data.task)
        trainer.train()
    if trainer.state.global_step == 0:
        raise ConfigurationError(
            f"training: no step can be taken, since {len(data.train)} examples make no whole batch of "
            f"{recipe.training.per_device_train_batch_size}, and dataloader_drop_last leaves out any other: "
            "lower per_device_train_batch_size"
        )
    optimizer: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    require_effect(trainer.args, trainer.model, optimizer, trainer.state.max_steps)
    _require_rates(trainer)


@contextmanager
def _nothing_to_collect() -> Iterator[None]:
    """Keeps the garbage collection that a trainer starts off what was there before, which takes long."""
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _require_metric(trainer: RecipeTrainer, task: str) -> None:
    """What decides on the best checkpoint is measured, and does not depend on the machine's speed."""
    measured = [x.removeprefix("eval_") for x in trainer.evaluate()]
    names = [x for x in measured if not x.endswith(_NO_FIGURES)]
    wanted = (trainer.args.metric_for_best_model or "loss").removeprefix("eval_")
    if wanted not in names:
        raise ConfigurationError(
            f"training.metric_for_best_model: data.task: {task} has no {wanted!r}: one of {', '.join(names)}"
        )


def _require_rates(trainer: RecipeTrainer) -> None:
    """Every learning rate of the schedule is a number that an optimizer takes."""
    schedule: Any = trainer.lr_scheduler
    rules = getattr(schedule, "lr_lambdas", ())
    steps = trainer.state.max_steps
    name = f"training.lr_scheduler_type {trainer.args.lr_scheduler_type.value}"
    fix = "change lr_scheduler_kwargs or warmup_steps"
    for step in sorted({*range(0, steps + 1, max(1, steps // _MOST_RATES)), steps}):
        for rule in rules:
            try:
                rate = rule(step)
            except ArithmeticError as error:
                raise ConfigurationError(f"{name} fails at step {step} of {steps} ({error}): {fix}") from None
            if isinstance(rate, complex) or not math.isfinite(rate) or rate < 0:
                raise ConfigurationError(
                    f"{name} gives {rate} times the learning rate at step {step} of {steps}: {fix}"
                )


def _trainer(recipe: Recipe, data: PreparedData, tokenizer: Any, folder: Path) -> RecipeTrainer:
    few = 2 * recipe.training.per_device_eval_batch_size
    validation = None if data.validation is None else _made_up(data.validation, few)
    trainer = RecipeTrainer(
        recipe, folder, _stand_in(recipe, data.labels), tokenizer, _made_up(data.train), validation
    )
    trainer.add_callback(_OneStep())
    return trainer


def _made_up(split: Split, most: int | None = None) -> Split:
    """As many examples, or a few, which say nothing."""
    labels = [0, 1, 2] if split.labels == () else 0
    row = {"input_ids": _TOKENS, "labels": labels}
    return replace(split, rows=([row] * len(split.rows))[:most], parsed=[], digests=[])


def _stand_in(recipe: Recipe, labels: Sequence[str]) -> PeftModel:
    """A model of a few numbers, of the right kind and type, with an adapter."""
    config = LlamaConfig(
        vocab_size=len(_TOKENS) + 1,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_labels=max(2, len(labels)),
        pad_token_id=0,
    )
    classifies = recipe.data.task == "classification"
    model: Any = (LlamaForSequenceClassification if classifies else LlamaForCausalLM)(config)
    lora = LoraConfig(r=1, target_modules=["q_proj"], task_type="SEQ_CLS" if classifies else "CAUSAL_LM")
    return get_peft_model(model.to(getattr(torch, recipe.model.dtype)), lora)


class _OneStep(TrainerCallback):
    """Ends the training after its first step, with whatever the recipe has happen now and then."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        control.should_log = True
        control.should_evaluate = args.eval_strategy != "no"
        control.should_save = args.save_strategy != "no"
        control.should_training_stop = True
