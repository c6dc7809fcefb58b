"""What a run will send and receive, before anything is connected.

For every product of R rows, with contraction c and outputs o, an operator that gets residues receives
4 R c bytes, one that gets a seed 32, and each sends 4 R o back. R is the padded size of a batch, or its
number of examples in a layer that reads one token of each. It follows from the recipe: the order of the
examples depends on nothing else. Forward products are asked for at every batch; backward ones while
training, by each group that something trained precedes.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from blindtune.checkpoint.files import TensorFiles, resolve
from blindtune.checkpoint.skeleton import FrozenLayer, frozen_layers, supported_config
from blindtune.client.data.prepared import PreparedData, Split
from blindtune.client.groups import products_of, trace_groups
from blindtune.client.head import head_is_remote
from blindtune.client.kit import Kit, is_kit, product_outputs
from blindtune.client.recipe import Recipe
from blindtune.client.training.batches import EpochSampler, batches, padded_rows
from blindtune.client.training.checkpoints import RandomState
from blindtune.client.training.models import new_adapter
from blindtune.protocol.errors import BlindtuneError
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


class _Cost:
    """Of asking for some products once.

    Args:
        asked: products, and for each whether all tokens of a batch are its rows, or one of each example.
        shapes: [out, in] of each layer.
        operators: how many there are.
    """

    def __init__(
        self, asked: Sequence[tuple[Product, bool]], shapes: dict[str, tuple[int, int]], operators: int
    ) -> None:
        self.rounds = len(asked) if operators else 0
        self._seeds = KEY_BYTES * max(0, operators - 1) * len(asked)
        self._up, self._down = {True: 0, False: 0}, {True: 0, False: 0}
        for product, all_tokens in asked if operators else ():
            self._up[all_tokens] += 4 * product.contraction
            self._down[all_tokens] += 4 * product_outputs(product, shapes) * operators

    def up(self, batch: Sequence[int]) -> int:
        """Bytes to the operators, for a batch of such lengths."""
        return padded_rows(batch) * self._up[True] + len(batch) * self._up[False] + self._seeds

    def down(self, batch: Sequence[int]) -> int:
        """Bytes from them."""
        return padded_rows(batch) * self._down[True] + len(batch) * self._down[False]


def estimate(recipe: Recipe, data: PreparedData) -> Estimate:
    """The steps and the traffic of a recipe.

    Raises:
        CheckpointError, UnsupportedError: the model can't be read or served.
        ConfigurationError: PEFT refuses the adapter.
    """
    per_epoch = _steps_in_epoch(recipe, data.train)
    steps = _steps(recipe, per_epoch)
    taken = _training_batches(recipe, data.train)
    model, layers = _layers(recipe, data.labels)
    forward, training = _products(recipe, model, layers)
    shapes = {x.name: (x.out_features, x.in_features) for x in layers}
    operators = 0 if recipe.masking.mode == "reference" else len(recipe.operators)
    measuring, besides = _Cost(forward, shapes, operators), _Cost(training, shapes, operators)
    rounds = up = down = 0

    def add(cost: _Cost, lengths: Iterable[Sequence[int]]) -> None:
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
    rows = sum(padded_rows(x) for x in taken)
    tokens = sum(map(sum, taken))
    return Estimate(steps, steps / per_epoch, tokens, 1 - tokens / rows if rows else 0.0, rounds, up, down)


def remote_products(recipe: Recipe, labels: Sequence[str]) -> list[Product]:
    """All products of a recipe's layer groups, forward and backward."""
    model, layers = _layers(recipe, labels)
    return products_of(type(model), model.config, layers)


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


def _layers(recipe: Recipe, labels: Sequence[str]) -> tuple[PreTrainedModel, list[FrozenLayer]]:
    """The model that the task takes, without weights, and the layers that workers multiply by."""
    folder = resolve(recipe.model.name, recipe.model.revision)
    config = supported_config(folder)
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


@dataclass(frozen=True)
class _Call:
    """What a training step does with a module: how often, what it needs, and how much at once."""

    times: int
    gradient: bool
    all_tokens: bool


def _products(
    recipe: Recipe, model: PreTrainedModel, layers: Sequence[FrozenLayer]
) -> tuple[list[tuple[Product, bool]], list[tuple[Product, bool]]]:
    """What a batch asks for when it is measured, and what it asks for besides when it is trained on."""
    by_module = {x.module: x for x in layers}
    groups = trace_groups(type(model), model.config, list(by_module))
    for layer in layers:
        _make_remote(model.get_submodule(layer.module), layer.out_features)
    calls = _training_calls(recipe, model, [group[0] for group in groups])
    forward: list[tuple[Product, bool]] = []
    training: list[tuple[Product, bool]] = []
    for group in groups:
        members = [by_module[module] for module in group]
        call = calls[group[0]]
        once = [
            (x, call.all_tokens) for x in forward_products([x.name for x in members], members[0].in_features)
        ]
        forward += once
        training += once * (call.times - 1)
        if call.gradient:
            backward = backward_products([(x.name, x.out_features) for x in members])
            training += [(x, call.all_tokens) for x in backward]
    return forward, training


class _Elsewhere(torch.autograd.Function):
    """A product that workers compute, without numbers: like the real one, it keeps nothing of its input."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, outputs: int) -> torch.Tensor:
        ctx.shape = x.shape
        return x.new_empty((*x.shape[:-1], outputs))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0].new_empty(ctx.shape), None


def _make_remote(module: torch.nn.Module, outputs: int) -> None:
    bias = getattr(module, "bias", None)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Elsewhere.apply(x, outputs)
        return y if bias is None else y + bias

    module.forward = forward


def _training_calls(recipe: Recipe, model: PreTrainedModel, modules: Sequence[str]) -> dict[str, _Call]:
    """How a training step calls each module.

    The step is taken with the recipe's adapter on the model without weights, so that PEFT and the model
    decide, and not a table of theirs. Where it can't be taken, as in `trace_groups`, all that is known is
    that nothing trained precedes the first module.
    """
    tokens = 4
    calls: dict[str, _Call] = {}
    for name in modules:

        def hook(module: torch.nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            before = calls.get(name, _Call(0, False, False))
            calls[name] = _Call(
                before.times + 1,
                before.gradient or bool(args[0].requires_grad),
                args[0].shape[:-1].numel() >= tokens,
            )

        model.get_submodule(name).register_forward_pre_hook(hook)
    model.config.use_cache = True  # see trace_groups
    inputs = {model.main_input_name: torch.zeros((1, tokens), dtype=torch.long, device="meta")}
    random_state = RandomState()
    try:
        new_adapter(model, recipe).train()
        # Two names of one setting; the newer one goes first, as in TrainingArguments.
        training = recipe.training
        repeated = training.activation_checkpointing
        if training.gradient_checkpointing if repeated is None else repeated:
            model.config.use_cache = False
            model.activation_checkpointing_enable()
            # There is no cache then, and a mask in this form is the one that models take as it is.
            inputs["attention_mask"] = torch.zeros((1, 1, tokens, tokens), device="meta")
        model(**inputs).logits.sum().backward()
    except BlindtuneError:
        raise
    except Exception as error:  # any architecture may fail here, in any way
        _logger.warning(
            "cannot trace a training step of %s (%s: %s): the estimate is a rough one",
            type(model).__name__,
            type(error).__name__,
            error,
        )
    finally:
        random_state.restore()
    return {name: calls.get(name, _Call(1, index > 0, True)) for index, name in enumerate(modules)}
