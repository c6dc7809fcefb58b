"""What a run will send and receive, before anything is connected.

It follows from the recipe: the order of the examples depends on nothing else. What a batch costs is in
`blindtune.client.plan.traffic`, and what it asks for in `blindtune.client.plan.asked`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from blindtune.checkpoint.skeleton import FrozenLayer, frozen_layers, supported_config
from blindtune.client.config.parameter_sets import lattice_set, residue_set
from blindtune.client.data.prepared import PreparedData, Split
from blindtune.client.kit.groups import products_of
from blindtune.client.kit.head import head_is_remote
from blindtune.client.kit.hints import missing_hints
from blindtune.client.kit.kit import product_outputs
from blindtune.client.kit.prepare import kit_folder
from blindtune.client.plan.asked import Step, asked_products
from blindtune.client.plan.traffic import Traffic
from blindtune.client.recipe import Recipe
from blindtune.client.training.adapter import new_adapter
from blindtune.client.training.batches import EpochSampler, batches, padded_rows
from blindtune.client.training.models import BaseModel, require_fitting_head, stored_keys
from blindtune.errors import BlindtuneError, CheckpointError, ConfigurationError
from blindtune.protocol.expansion import KEY_BYTES
from blindtune.protocol.lattice.parameters import DEGREE
from blindtune.protocol.products import Product
from blindtune.protocol.weights import SCHEMES

__all__ = ["Estimate", "estimate", "remote_products", "skeleton"]


@dataclass(frozen=True)
class Estimate:
    """What is known of a run in advance.

    Attributes:
        steps: optimizer steps.
        epochs: passes over the data, perhaps not whole.
        tokens: tokens trained on, without padding.
        padding_share: share of the rows of training that is padding.
        rounds: products asked for, measuring before and after included.
        bytes_up, bytes_down: payload to and from all operators, measuring and hints included.
        hint_bytes: of ``bytes_down``, what the hints of masking ``lattice`` take that are not there yet.
    """

    steps: int
    epochs: float
    tokens: int
    padding_share: float
    rounds: int
    bytes_up: int
    bytes_down: int
    hint_bytes: int


def estimate(recipe: Recipe, data: PreparedData, folder: Path | None = None) -> Estimate:
    """The steps and the traffic of a recipe.

    Args:
        folder: of the model, where it was asked for already.

    Raises:
        CheckpointError, UnsupportedError: the model can't be read or served.
        ConfigurationError: PEFT refuses the adapter.
    """
    per_epoch = _steps_in_epoch(recipe, data.train)
    steps = _steps(recipe, per_epoch)
    taken = _training_batches(recipe, data.train)
    folder = folder or BaseModel.found(recipe).folder
    keys = stored_keys(folder)
    model, layers = _layers(recipe, folder, keys, data.labels)
    repeated = recipe.training.activation_checkpointing
    # Two names of one setting; the newer one goes first, as in TrainingArguments.
    repeated = recipe.training.gradient_checkpointing if repeated is None else repeated

    def with_adapter(model: PreTrainedModel) -> PeftModel:
        try:
            return new_adapter(model, recipe, keys, [x.module for x in layers])
        except BlindtuneError:
            raise
        except Exception as error:  # of PEFT, at what it did not expect
            what = " ".join(str(error).split())
            raise ConfigurationError(
                f"adapter: PEFT can't put it on ({type(error).__name__}: {what}): change the section adapter"
            ) from error

    forward, training = asked_products(model, layers, Step(with_adapter, bool(repeated)))
    shapes = {x.name: (x.out_features, x.in_features) for x in layers}
    operators = 0 if recipe.masking.mode == "reference" else len(recipe.operators)
    residues = residue_set(recipe.masking.mode, recipe.masking.chosen_set)
    measuring = Traffic(forward, shapes, operators, residues)
    besides = Traffic(training, shapes, operators, residues)
    rounds = up = down = 0

    def add(cost: Traffic, lengths: Iterable[Sequence[int]]) -> None:
        nonlocal rounds, up, down
        for batch in lengths:
            rounds += cost.rounds
            up += cost.up(batch)
            down += cost.down(batch)

    add(measuring, taken)
    add(besides, taken)
    if data.validation is not None:
        size = recipe.training.per_device_eval_batch_size
        ordered = sorted(data.validation.lengths, reverse=True)
        measured = [ordered[i : i + size] for i in range(0, len(ordered), size)]
        for _ in range(2 + _measured_while_training(recipe, steps, per_epoch)):
            add(measuring, measured)
    hints_up, hints_down = _hints(recipe, folder, data.labels, shapes)
    rows = sum(padded_rows(x) for x in taken)
    tokens = sum(map(sum, taken))
    padding = 1 - tokens / rows if rows else 0.0
    return Estimate(
        steps, steps / per_epoch, tokens, padding, rounds, up + hints_up, down + hints_down, hints_down
    )


def remote_products(recipe: Recipe, folder: Path, labels: Sequence[str]) -> list[Product]:
    """All products of a recipe's layer groups, forward and backward."""
    model, layers = _layers(recipe, folder, stored_keys(folder), labels)
    return products_of(type(model), model.config, layers)


def _hints(
    recipe: Recipe, folder: Path, labels: Sequence[str], shapes: dict[str, tuple[int, int]]
) -> tuple[int, int]:
    """Bytes to and from the operator for the hints that are not there yet."""
    if recipe.masking.mode != "lattice":
        return 0, 0
    parameters = lattice_set(recipe.masking.chosen_set)
    kit = kit_folder(folder, SCHEMES[recipe.quantization.scheme])
    missing = missing_hints(kit, parameters, remote_products(recipe, folder, labels))
    # A hint is asked for in blocks of rows, each with the public seed.
    up = KEY_BYTES * len(missing) * (parameters.dimension // DEGREE)
    return up, sum(
        parameters.residues.word_bytes * parameters.dimension * product_outputs(x, shapes) for x in missing
    )


def _steps_in_epoch(recipe: Recipe, split: Split) -> int:
    training = recipe.training
    count, size = len(split.rows), training.per_device_train_batch_size
    whole = count // size if training.dataloader_drop_last else ceil(count / size)
    return max(1, ceil(whole / training.gradient_accumulation_steps))


def _measured_while_training(recipe: Recipe, steps: int, per_epoch: int) -> int:
    """How often Hugging Face's trainer measures, by ``eval_strategy``."""
    training = recipe.training
    times = int(training.eval_on_start)
    if training.eval_strategy == "epoch":
        # The last epoch may end early, and then its number is no whole one.
        ends = [min(epoch, steps / per_epoch) for epoch in range(1, ceil(steps / per_epoch) + 1)]
        return times + sum(epoch >= training.eval_delay for epoch in ends)
    if training.eval_strategy == "steps":
        every = training.eval_steps or training.logging_steps
        every = ceil(steps * every) if every < 1 else int(every)
        at = {*range(every, steps + 1, every), steps}
        return times + sum(step >= training.eval_delay for step in at)
    return times


def _steps(recipe: Recipe, per_epoch: int) -> int:
    training = recipe.training
    return training.max_steps if training.max_steps > 0 else ceil(training.num_train_epochs * per_epoch)


def _training_batches(recipe: Recipe, split: Split) -> list[list[int]]:
    """Lengths of the examples of every batch of the run."""
    training, size = recipe.training, recipe.training.per_device_train_batch_size
    seed = training.seed if training.data_seed is None else training.data_seed
    sampler = EpochSampler(split.lengths, size, seed, recipe.data.group_by_length)
    accumulated = training.gradient_accumulation_steps
    per_epoch = _steps_in_epoch(recipe, split)
    left = _steps(recipe, per_epoch)
    taken: list[list[int]] = []
    epoch = 0
    while left > 0:
        sampler.set_epoch(epoch)
        whole = batches(sampler, split.lengths, size, training.dataloader_drop_last)
        if not whole:
            break
        taken += whole[: left * accumulated]
        left -= per_epoch
        epoch += 1
    return taken


def skeleton(recipe: Recipe, folder: Path, labels: Sequence[str]) -> PreTrainedModel:
    """The model that the task takes, on the meta device, without weights.

    Raises:
        CheckpointError, UnsupportedError: there is none for this task, or it can't be served.
    """
    config = supported_config(folder)
    loader: Any = AutoModelForCausalLM
    if recipe.data.task == "classification":
        require_fitting_head(config, labels)
        config.num_labels = len(labels)
        loader = AutoModelForSequenceClassification
    try:
        with torch.device("meta"):
            model: PreTrainedModel = loader.from_config(config)
    except Exception as error:  # a setting of the wrong size leads to errors of any kind
        what = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{recipe.model.name} ({config.model_type}) has no model for data.task: {recipe.data.task} "
            f"({type(error).__name__}: {what}): take another model, or another task"
        ) from error
    return model


def _layers(
    recipe: Recipe, folder: Path, keys: Sequence[str], labels: Sequence[str]
) -> tuple[PreTrainedModel, list[FrozenLayer]]:
    """The model that the task takes, without weights, and the layers that workers multiply by."""
    model = skeleton(recipe, folder, labels)
    found = frozen_layers(model, keys)
    return model, [x for x in found if not x.head or head_is_remote(x, recipe.quantization.head)]
