"""Hugging Face's trainer, so that what a run computes depends on nothing but its recipe.

Five things differ from the stock trainer: the order of the examples follows from the epoch's number
alone, a step's loss does not depend on how it is cut into micro-batches, these draw random numbers each of
its own, so that several can be in flight, measuring leaves the random number generators as they were, and
checkpoints appear whole.
"""

import copy
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from torch.utils.data import Sampler
from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from blindtune.client.data.chat import IGNORED
from blindtune.client.data.prepared import Split
from blindtune.client.process.disk import disk_errors_are_clear
from blindtune.client.recipe.schema import Recipe
from blindtune.client.record.digests import require_whole
from blindtune.client.rounds.multiplier import PrivateMultiplier
from blindtune.client.training import checkpoints
from blindtune.client.training.batches import EpochSampler, labelled_collator
from blindtune.client.training.figures import Figures
from blindtune.client.training.in_flight import MicroBatches
from blindtune.client.training.loss import StepLoss
from blindtune.client.training.optimizers import require_optimizer
from blindtune.client.training.scales import restore_scales, save_scales
from blindtune.client.training.task_metrics import metrics_of
from blindtune.errors import BlindtuneError, CheckpointError, ConfigurationError

__all__ = ["CHECKPOINTS", "FIGURES", "RecipeTrainer", "training_arguments"]

CHECKPOINTS = "checkpoints"
FIGURES = "figures.json"


# What is about training makes no sense for a trainer that only measures, and is refused there.
_MEASURING = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}


def training_arguments(recipe: Recipe, folder: Path, measuring: bool = False) -> TrainingArguments:
    """The section ``training`` as Hugging Face takes it.

    Args:
        recipe: that it is in.
        folder: of the run.
        measuring: whether nothing will be trained.

    Raises:
        ConfigurationError: Hugging Face refuses a combination of its values, or the optimizer does not read
            some of them.
    """
    given = recipe.training.model_dump(exclude_none=True) | (_MEASURING if measuring else {})
    if recipe.data.validation is None and given["eval_strategy"] != "no":
        raise ConfigurationError("training.eval_strategy measures data.validation: name a file there")
    given.pop("save_total_limit", None)  # older checkpoints are removed once the new one is complete
    try:
        arguments = TrainingArguments(
            output_dir=str(folder / CHECKPOINTS),
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            batch_eval_metrics=True,
            label_names=["labels"],
            **given,
        )
    except (ValueError, TypeError, ImportError) as error:
        what = " ".join(str(error).split()).rstrip(".")
        raise ConfigurationError(f"training: {what}: change one of these arguments") from None
    _require_repeatable(arguments)
    if not measuring:
        require_optimizer(arguments)
    return arguments


def _require_repeatable(arguments: TrainingArguments) -> None:
    """Refuses what would make a resumed run differ: measurements decide, and some are in no checkpoint."""
    by_steps = arguments.save_strategy == "steps"
    if _measuring_decides(arguments) and by_steps and arguments.eval_strategy == "epoch":
        raise ConfigurationError(
            "training: what is measured decides how training goes on, so a checkpoint must hold it: with "
            "eval_strategy epoch, write save_strategy: epoch as well"
        )
    if arguments.load_best_model_at_end and by_steps and arguments.save_steps != arguments.eval_steps:
        raise ConfigurationError(
            "training: load_best_model_at_end needs a checkpoint of each step that is measured: write the "
            f"same for save_steps and eval_steps, not {arguments.save_steps:g} and {arguments.eval_steps:g}"
        )


def _measuring_decides(arguments: TrainingArguments) -> bool:
    """Whether the adapter depends on what is measured while training."""
    schedules = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
    return arguments.load_best_model_at_end or arguments.lr_scheduler_type in schedules


class RecipeTrainer(Trainer):
    """Trains and measures the model of a recipe.

    Args:
        recipe: what to do.
        folder: where checkpoints go.
        model: with its adapter.
        tokenizer: pads batches.
        train: what to train on; None to measure only.
        validation: what to measure while training, when the recipe says so.
        so_far: figures of the run when a checkpoint is written, kept with it.
        in_flight: how many micro-batches of a step may wait for workers at once. What is trained does not
            depend on it.
        abandon: ends all waiting for workers; called when an interrupt ends the training at once.
        multiplier: behind the model's remote layers, whose scales are kept in checkpoints.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        model: Any,
        tokenizer: Any,
        train: Split | None,
        validation: Split | None = None,
        so_far: Callable[[], Figures] = Figures,
        in_flight: int = 1,
        abandon: Callable[[], None] = lambda: None,
        multiplier: PrivateMultiplier | None = None,
    ) -> None:
        self._recipe = recipe
        self._metrics = metrics_of(recipe.data.task)
        self._loss = StepLoss(recipe.data.task, recipe.training.label_smoothing_factor)
        self._so_far = so_far
        self._multiplier = multiplier
        self._staging: Path | None = None
        self._after_step: checkpoints.RandomState | None = None
        self._measuring = False
        self._this_step = Figures()
        self._micro_batches = MicroBatches(in_flight, abandon)
        self._step: list[Any] = []
        self._losses: deque[torch.Tensor] = deque()
        self.trained = Figures()
        collator: Any
        padding = _padding(tokenizer, model)
        if recipe.data.task == "classification":
            collator = labelled_collator(padding, model.config)
        else:
            collator = DataCollatorForSeq2Seq(padding, label_pad_token_id=IGNORED)
        super().__init__(
            model=model,
            args=training_arguments(recipe, folder, measuring=train is None),
            train_dataset=train,
            eval_dataset=validation,
            data_collator=collator,
            processing_class=tokenizer,
            compute_loss_func=self._loss,
            compute_metrics=self._metrics.add,
            preprocess_logits_for_metrics=self._reduce,
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(_AfterStep(self))
        # Autocast keeps casts of the parameters, and forgets them when any thread leaves it: a layer that is
        # used twice would get its gradients in one sum or in two, by what other micro-batches do meanwhile.
        self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        if self.one_at_a_time is not None:
            self._micro_batches.limit = 1

    @property
    def one_at_a_time(self) -> str | None:
        """Why only one micro-batch can be in flight; None where several can."""
        if self.args.device.type != "cpu":
            # Torch's own threads do the backward pass there, and they know nothing of a baton.
            return f"the client computes on {self.args.device.type}"
        if self.args.optim in (OptimizerNames.LOMO, OptimizerNames.ADALOMO):
            return f"training.optim {self.args.optim} changes the adapter while the gradients are computed"
        return None

    def measure(self, split: Split) -> dict[str, float]:
        """The task's figures on some examples; see `blindtune.client.training.task_metrics`."""
        found = self.evaluate(split)
        names = ("accuracy", "macro_f1", "perplexity", "token_accuracy")
        figures = {"loss": found["eval_nll"]}
        return figures | {name: found[f"eval_{name}"] for name in names if f"eval_{name}" in found}

    def train_from(self, checkpoint: Path | None) -> None:
        """Trains to the end, from the start or from a checkpoint.

        When workers fail in the middle of a step, the state after the last complete step is saved first.

        Args:
            checkpoint: one that is whole; see `blindtune.client.record.digests`.

        Raises:
            CheckpointError: the best checkpoint, which is the result, was damaged meanwhile; or the one to go
                on from lacks the scales of a certified parameter set.
        """
        if checkpoint is not None:
            restore_scales(self._multiplier, checkpoint)
        try:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except BlindtuneError:
            self._save_last_step()
            raise

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        before = checkpoints.RandomState()
        # Hugging Face would leave out the last examples of what is measured, too.
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        self._measuring = True  # and so it stays when measuring fails
        try:
            figures: dict[str, float] = super().evaluate(*args, **options)
        finally:
            self.args.dataloader_drop_last = drop_last
            before.restore()
        self._measuring = False
        return figures

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        output = super().evaluation_loop(*args, **options)
        # The stock loss is a mean over batches, so which checkpoint is the best would depend on their size.
        output.metrics["eval_loss"] = output.metrics["eval_nll"]
        return output

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        # The stock loop takes one step more when it goes on from the last step, in the middle of an epoch.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **options)

    def _determine_best_metric(self, *args: Any, **options: Any) -> bool:
        # With save_strategy best this decides whether a checkpoint is saved; a run that stops needs one.
        return bool(super()._determine_best_metric(*args, **options)) or self.control.should_save

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        try:
            return super().create_optimizer(*args, **options)
        except (ImportError, ValueError, TypeError) as error:
            what = " ".join(str(error).split()).rstrip(".")
            raise ConfigurationError(
                f"training.optim {self.args.optim.value}: {what}: install what it names, or change optim or "
                "optim_args"
            ) from None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **options: Any) -> None:
        with checkpoints.damage_is_clear(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **options)

    def _load_optimizer_and_scheduler(self, checkpoint: str) -> None:
        with checkpoints.damage_is_clear(Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with checkpoints.damage_is_clear(Path(checkpoint or "")):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str) -> None:
        with checkpoints.damage_is_clear(Path(checkpoint)):
            super()._load_rng_state(checkpoint)

    def get_batch_samples(self, *args: Any, **options: Any) -> tuple[list[Any], Any]:
        self._step, items = super().get_batch_samples(*args, **options)
        self._losses.clear()
        return self._step, items

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | None:
        # The stock count goes by what the model does with labels, and ours never gets any.
        return self._loss.items([x["labels"] for x in batch_samples]).to(device) if batch_samples else None

    def training_step(self, model: Any, inputs: Any, *args: Any, **options: Any) -> torch.Tensor:
        # The stock loop asks for one micro-batch after the other; at the first, all of its step are computed.
        if not self._losses:
            stock = super().training_step

            def computation(micro_batch: Any) -> Callable[[], torch.Tensor]:
                return lambda: stock(model, micro_batch, *args, **options)

            self._losses.extend(self._compute(model, [computation(x) for x in self._step]))
        mask = inputs["attention_mask"]
        self._this_step += Figures(tokens=int(mask.sum()), padded_tokens=mask.numel())
        return self._losses.popleft()

    def _compute(self, model: Any, step: Sequence[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
        if len(step) == 1:
            return [step[0]()]  # as the stock trainer does, random numbers included
        return self._micro_batches.run([x for x in model.parameters() if x.requires_grad], step)

    def _reduce(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        return self._metrics.reduce(logits[0] if isinstance(logits, tuple) else logits, labels)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows = train_dataset or self.train_dataset
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        return EpochSampler(rows.lengths, args.train_batch_size, seed, self._recipe.data.group_by_length)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int]:
        return _ByLength(eval_dataset.lengths)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        with disk_errors_are_clear(folder), checkpoints.staging(folder) as self._staging:
            try:
                super()._save_checkpoint(model, trial)
                written = self._staging / f"checkpoint-{self.state.global_step}"
            finally:
                self._staging = None
            best = self.state.best_global_step
            if best:
                self.state.best_model_checkpoint = str(folder / f"checkpoint-{best}")
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            checkpoints.write_json(written / FIGURES, vars(self._so_far() + self.trained))
            save_scales(self._multiplier, written)
            checkpoints.install(
                written, folder, self._recipe.training.save_total_limit, self.state.best_model_checkpoint
            )

    def _load_best_model(self) -> None:
        # Where it is gone, the stock trainer would warn and leave the last one in its place.
        require_whole(Path(str(self.state.best_model_checkpoint)))
        super()._load_best_model()

    def _save_last_step(self) -> None:
        """Saves the state after the last complete step, where no checkpoint has it already."""
        step = self.state.global_step
        if self._after_step is None or (Path(self.args.output_dir) / f"checkpoint-{step}").exists():
            return
        if self._measuring and _measuring_decides(self.args):
            return  # going on from there would leave out a measurement that decides
        # The step that failed used random numbers, and will use the same ones again.
        self._after_step.restore()
        self._save_checkpoint(self.model, None)

    def after_step(self) -> None:
        """Remembers where the generators are, and counts."""
        self._after_step = checkpoints.RandomState()
        self.trained += self._this_step + Figures(steps=1)
        self._this_step = Figures()


def _padding(tokenizer: Any, model: Any) -> Any:
    """The tokenizer, padding on the side where no token of a text is seen in another place for it.

    Models with absolute positions count from the left. Those that summarise a text by the last place want
    it to be the text's, which is why theirs are padded there.
    """
    padding = copy.deepcopy(tokenizer)
    padding.padding_side = "left" if getattr(model.config, "summary_type", None) == "last" else "right"
    return padding


class _AfterStep(TrainerCallback):
    def __init__(self, trainer: RecipeTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        # A checkpoint knows the best one by its path, which may be of another folder, and anyone's.
        if state.best_model_checkpoint is None:
            return
        best = Path(str(args.output_dir)) / f"checkpoint-{state.best_global_step}"
        if not best.is_dir() and args.load_best_model_at_end:
            raise CheckpointError(
                f"{args.output_dir} lacks the best checkpoint, of step {state.best_global_step}: restore it, "
                "or begin anew in another output.dir"
            )
        state.best_model_checkpoint = str(best) if best.is_dir() else None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self._trainer.after_step()


class _ByLength(Sampler[int]):
    """Longest first, so that padding is little and a batch that is too large shows at once."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._order = sorted(range(len(lengths)), key=lambda i: -lengths[i])

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Any:
        return iter(self._order)
