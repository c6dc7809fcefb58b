"""What a run will send and receive, before anything is connected.

For every product of R rows, with contraction c and outputs o, an operator that gets residues receives
4 R c bytes, one that gets a seed 32, and each sends 4 R o back. R is the padded size of a batch, which
follows from the recipe: the order of the examples depends on nothing else. Forward products are asked for
at every batch; backward ones while training, by each group that something trained precedes.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from blindtune.checkpoint.files import TensorFiles, resolve
from blindtune.checkpoint.skeleton import FrozenLayer, frozen_layers, require_supported
from blindtune.client.data.prepared import PreparedData, Split
from blindtune.client.groups import trace_groups
from blindtune.client.head import head_is_remote
from blindtune.client.kit import Kit, is_kit, product_outputs
from blindtune.client.recipe import Recipe
from blindtune.client.training.batches import EpochSampler, batches, padded_rows
from blindtune.client.training.checkpoints import RandomState
from blindtune.client.training.models import new_adapter
from blindtune.protocol.errors import BlindtuneError, CheckpointError
from blindtune.protocol.expansion import KEY_BYTES
from blindtune.protocol.products import Product, backward_products, forward_products

__all__ = ["Estimate", "estimate", "remote_products"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Estimate:
    """What is known of a run in advance.

    Attributes:
        steps: optimizer steps.
        epochs: passes over the data, perhaps not whole.
        tokens: tokens trained on, without padding.
        padding_share: share of the rows of training that is padding.
        rounds: products asked for, measuring before and after included.
        bytes_up, bytes_down: payload to and from all operators, measuring included.
    """

    steps: int
    epochs: float
    tokens: int
    padding_share: float
    rounds: int
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class _Cost:
    """Of one batch: products, and bytes that grow with its rows or do not."""

    rounds: int
    up_per_row: int
    up_per_batch: int
    down_per_row: int

    @classmethod
    def of(cls, products: Sequence[Product], shapes: dict[str, tuple[int, int]], operators: int) -> "_Cost":
        return cls(
            len(products) if operators else 0,
            sum(4 * x.contraction for x in products) if operators else 0,
            KEY_BYTES * max(0, operators - 1) * len(products),
            sum(4 * product_outputs(x, shapes) for x in products) * operators,
        )


def estimate(recipe: Recipe, data: PreparedData) -> Estimate:
    """The steps and the traffic of a recipe.

    Raises:
        CheckpointError, UnsupportedError: the model can't be read or served.
        ConfigurationError: PEFT refuses the adapter.
    """
    per_epoch = max(
        1, ceil(_batches_in_epoch(recipe, data.train) / recipe.training.gradient_accumulation_steps)
    )
    steps = _steps(recipe, per_epoch)
    taken = _training_batches(recipe, data.train)
    model, layers = _layers(recipe, data.labels)
    forward, backward, repeated = _products(recipe, model, layers)
    shapes = {x.name: (x.out_features, x.in_features) for x in layers}
    operators = 0 if recipe.masking.mode == "reference" else len(recipe.operators)
    ahead, back = _Cost.of(forward, shapes, operators), _Cost.of(backward + repeated, shapes, operators)
    rounds = up = down = 0

    def add(cost: _Cost, lengths: Iterable[Sequence[int]]) -> None:
        nonlocal rounds, up, down
        for batch in lengths:
            rows = padded_rows(batch)
            rounds += cost.rounds
            up += rows * cost.up_per_row + cost.up_per_batch
            down += rows * cost.down_per_row

    add(ahead, taken)
    add(back, taken)
    if data.validation is not None:
        size = recipe.training.per_device_eval_batch_size
        ordered = sorted(data.validation.lengths, reverse=True)
        measured = [ordered[i : i + size] for i in range(0, len(ordered), size)]
        for _ in range(2 + _measured_while_training(recipe, steps, per_epoch)):
            add(ahead, measured)
    rows = sum(padded_rows(x) for x in taken)
    tokens = sum(map(sum, taken))
    return Estimate(steps, steps / per_epoch, tokens, 1 - tokens / rows if rows else 0.0, rounds, up, down)


def remote_products(recipe: Recipe, labels: Sequence[str]) -> list[Product]:
    """All products of a recipe's layer groups, forward and backward."""
    model, layers = _layers(recipe, labels)
    by_module = {x.module: x for x in layers}
    products = []
    for group in trace_groups(type(model), model.config, list(by_module)):
        members = [by_module[module] for module in group]
        products += forward_products([x.name for x in members], members[0].in_features)
        products += backward_products([(x.name, x.out_features) for x in members])
    return products


def _batches_in_epoch(recipe: Recipe, split: Split) -> int:
    count, size = len(split.rows), recipe.training.per_device_train_batch_size
    return count // size if recipe.training.dataloader_drop_last else ceil(count / size)


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
    per_epoch = max(1, ceil(_batches_in_epoch(recipe, split) / accumulated))
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


def _layers(recipe: Recipe, labels: Sequence[str]) -> tuple[PreTrainedModel, list[FrozenLayer]]:
    """The model that the task takes, without weights, and the layers that workers multiply by."""
    folder = resolve(recipe.model.name, recipe.model.revision)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} has no usable config.json: {error}") from error
    require_supported(config)
    with TensorFiles(folder) as tensors:
        keys = list(tensors)
    if is_kit(folder):
        kit = Kit.open(folder)
        keys = [*kit.layers, *(key for key in keys if key not in kit.layers)]
    loader: Any = AutoModelForCausalLM
    if recipe.data.task == "classification":
        config.num_labels = len(labels)
        loader = AutoModelForSequenceClassification
    with torch.device("meta"):
        model: PreTrainedModel = loader.from_config(config)
    found = frozen_layers(model, keys)
    return model, [x for x in found if not x.head or head_is_remote(x, recipe.quantization.head)]


def _products(
    recipe: Recipe, model: PreTrainedModel, layers: Sequence[FrozenLayer]
) -> tuple[list[Product], list[Product], list[Product]]:
    """What one batch asks for: forward, backward, and forward once more when activations are not kept."""
    by_module = {x.module: x for x in layers}
    groups = trace_groups(type(model), model.config, list(by_module))
    calls = _training_calls(recipe, model, [group[0] for group in groups])
    forward: list[Product] = []
    backward: list[Product] = []
    repeated: list[Product] = []
    for group in groups:
        members = [by_module[module] for module in group]
        once = forward_products([x.name for x in members], members[0].in_features)
        count, with_gradient = calls[group[0]]
        forward += once
        repeated += once * (count - 1)
        if with_gradient:
            backward += backward_products([(x.name, x.out_features) for x in members])
    return forward, backward, repeated


def _training_calls(
    recipe: Recipe, model: PreTrainedModel, modules: Sequence[str]
) -> dict[str, tuple[int, bool]]:
    """How often a training step calls each module, and whether a gradient goes on to what it reads.

    The step is taken with the recipe's adapter on the model without weights, so that PEFT and the model
    decide, and not a table of theirs. Where it can't be taken, as in `trace_groups`, all that is known is
    that nothing trained precedes the first module.
    """
    calls: dict[str, tuple[int, bool]] = {}
    for name in modules:

        def hook(module: torch.nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            count, with_gradient = calls.get(name, (0, False))
            calls[name] = count + 1, with_gradient or bool(args[0].requires_grad)

        model.get_submodule(name).register_forward_pre_hook(hook)
    model.config.use_cache = True  # see trace_groups
    before = RandomState()
    try:
        new_adapter(model, recipe).train()
        if recipe.training.gradient_checkpointing:
            model.activation_checkpointing_enable()
        inputs = torch.zeros((1, 4), dtype=torch.long, device="meta")
        model(**{model.main_input_name: inputs}).logits.sum().backward()
    except BlindtuneError:
        raise
    except Exception as error:  # any architecture may fail here, in any way
        _logger.warning(
            "cannot trace a training step of %s (%s): the estimate is a rough one",
            type(model).__name__,
            type(error).__name__,
        )
    finally:
        before.restore()
    return {name: calls.get(name, (1, index > 0)) for index, name in enumerate(modules)}
