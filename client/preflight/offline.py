"""What can be found of a recipe before any weight is loaded and anyone is connected to.

One list, for ``blindtune check``, ``blindtune train --dry-run`` and the run itself: a step either yields what
it found, or raises the error that the run would end with.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from blindtune.checkpoint.files import TensorFiles
from blindtune.client.config.blind_config import BlindConfig
from blindtune.client.data.prepared import PreparedData, Split, prepare_data
from blindtune.client.plan.estimate import Estimate, estimate, skeleton
from blindtune.client.preflight.finding import Finding
from blindtune.client.preflight.weights import require_finite, require_shapes
from blindtune.client.recipe import Recipe
from blindtune.client.training.effects import idle_arguments
from blindtune.client.training.fit import require_positions, require_rows
from blindtune.client.training.folder import STATE, RunFolder
from blindtune.client.training.models import BaseModel, blind_config
from blindtune.client.training.rehearsal import rehearse
from blindtune.client.training.trainer import training_arguments
from blindtune.errors import ConfigurationError

__all__ = ["Known", "Step", "before_loading", "offline_steps"]


@dataclass
class Known:
    """What earlier steps found out for later ones.

    Attributes:
        resume: whether a run is to be gone on with; None where nobody said.
    """

    resume: bool | None = None
    config: BlindConfig | None = None
    arguments: bool = False
    folder: Path | None = None
    tokenizer: Any = None
    data: PreparedData | None = None
    model: PreTrainedModel | None = None
    expected: Estimate | None = None


@dataclass(frozen=True)
class Step:
    """One thing to look at.

    Attributes:
        name: of what it finds.
        needs: attributes of `Known` without which it can't be looked at.
        find: yields findings, or raises an error of ours.
    """

    name: str
    needs: tuple[str, ...]
    find: Callable[[Recipe, Known], Iterable[Finding]]

    def possible(self, known: Known) -> bool:
        """Whether everything that it needs was found."""
        return all(getattr(known, name) for name in self.needs)


def offline_steps() -> tuple[Step, ...]:
    """All of them, in the order in which they are to be taken."""
    return (
        Step("configuration", (), _configuration),
        Step("training", (), _training),
        Step("output", (), _output),
        Step("model", (), _model),
        Step("data", ("tokenizer",), _data),
        *_FITTING,
    )


def before_loading(recipe: Recipe, folder: Path, tokenizer: Any, data: PreparedData) -> Iterator[Finding]:
    """The steps that a run itself takes, when it has its data.

    Raises:
        BlindtuneError: the run would fail.
    """
    known = Known(arguments=True, folder=folder, tokenizer=tokenizer, data=data)
    for step in _FITTING:
        yield from step.find(recipe, known)


def _configuration(recipe: Recipe, known: Known) -> Iterator[Finding]:
    known.config = blind_config(recipe)
    yield Finding("configuration", "ok", f"masking {recipe.masking.mode}, {known.config.described}")
    if known.config.not_private:
        yield Finding(
            "independence",
            "warning",
            known.config.not_private,
            "remove masking.allow_one_machine before you train on private data",
        )


def _training(recipe: Recipe, known: Known) -> Iterator[Finding]:
    training_arguments(recipe, recipe.output.dir)
    known.arguments = True
    yield Finding("training", "ok", "Hugging Face takes these arguments")


def _output(recipe: Recipe, known: Known) -> Iterator[Finding]:
    folder = recipe.output.dir
    begun = (folder / STATE).exists()
    if known.resume and not begun:
        raise ConfigurationError(f"{folder} holds no run to resume: start it without --resume")
    if begun and known.resume is None:
        yield Finding(
            "output",
            "warning",
            f"{folder} holds a run already",
            "go on with it with --resume, or choose another output.dir for a new one",
        )
    elif folder.exists() and not known.resume:
        RunFolder(folder).require_unused()
    yield Finding("output", "ok", f"{folder}")


def _model(recipe: Recipe, known: Known) -> Iterator[Finding]:
    base = BaseModel.found(recipe)
    known.tokenizer = base.tokenizer()
    known.folder = base.folder
    yield Finding("tokenizer", "ok", f"{len(known.tokenizer):,} tokens")


def _data(recipe: Recipe, known: Known) -> Iterator[Finding]:
    # A run that goes on keeps the date on which it began.
    now = RunFolder(recipe.output.dir).began if known.resume else None
    known.data = data = prepare_data(recipe.data, known.tokenizer, recipe.training.seed, now)
    for name, split in (("train", data.train), ("validation", data.validation)):
        if split is None:
            continue
        yield Finding(f"data.{name}", "ok", f"{len(split.rows):,} examples, format {split.layout}")
        for warning in split.warnings:
            yield Finding(f"data.{name}", "warning", warning, "correct the data if that is not meant")
        if split.dropped:
            yield Finding(
                f"data.{name}",
                "warning",
                f"{split.dropped:,} examples have nothing of their answer left and are not used",
                "raise data.max_length",
            )


def _weights(recipe: Recipe, known: Known) -> Iterator[Finding]:
    if known.folder is None or known.data is None:
        return
    model = skeleton(recipe, known.folder, known.data.labels)
    require_positions(model.config, _splits(known.data))
    require_rows(model, known.tokenizer.pad_token_id, _splits(known.data))
    with TensorFiles(known.folder) as tensors:
        require_shapes(tensors, model)
        require_finite(tensors)
    known.model = model
    yield Finding("fit", "ok", f"{type(model).__name__} takes all tokens, and the tensors fit it")


def _traffic(recipe: Recipe, known: Known) -> Iterator[Finding]:
    if known.data is None:
        return
    known.expected = expected = estimate(recipe, known.data, known.folder)
    yield Finding(
        "traffic",
        "ok",
        f"{expected.steps:,} steps, {expected.rounds:,} rounds, {expected.bytes_up / 1e6:,.1f} MB up, "
        f"{expected.bytes_down / 1e6:,.1f} MB down",
    )


def _rehearsal(recipe: Recipe, known: Known) -> Iterator[Finding]:
    if known.data is None:
        return
    rehearse(recipe, known.data, known.tokenizer)
    yield Finding("rehearsal", "ok", "a first step with a stand-in for the model works")
    for idle in idle_arguments(recipe.training):
        yield Finding("training", "warning", idle, "leave it out")


def _splits(data: PreparedData) -> list[Split]:
    return [x for x in (data.train, data.validation) if x is not None]


_FITTING = (
    Step("fit", ("folder", "data"), _weights),
    Step("rehearsal", ("arguments", "data"), _rehearsal),
    Step("traffic", ("arguments", "model"), _traffic),
)
