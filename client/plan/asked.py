"""What a training step asks workers for.

Forward products are asked for at every batch; backward ones while training, by each group that
something trained precedes. PEFT and the model decide which those are, and not a table of theirs: a step is
taken on the model without weights, with what workers compute left out.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from blindtune.checkpoint.skeleton import FrozenLayer
from blindtune.client.kit.groups import trace_groups
from blindtune.client.training.checkpoints import RandomState
from blindtune.errors import BlindtuneError
from blindtune.protocol.products import Product, backward_products, forward_products

__all__ = ["Adapt", "Asked", "Step", "asked_products", "make_remote", "training_step"]

_logger = logging.getLogger(__name__)

Adapt = Callable[[PreTrainedModel], nn.Module]
"""Puts an adapter on a model."""


class Asked(NamedTuple):
    """A product that is asked for.

    Attributes:
        product: of which all that matters is its shape.
        all_tokens: whether all tokens of a batch are its rows, or one of each example.
    """

    product: Product
    all_tokens: bool


@dataclass(frozen=True)
class Step:
    """The training step to take.

    Attributes:
        adapt: gives the model its adapter.
        repeated: whether activations are not kept, and the forward pass is repeated for the backward pass.
        batch: examples.
        length: tokens of each.
        labels: whether the loss is that of labels, and not just some scalar to begin the backward pass with.
        watched: told of the model with its adapter, and returns what the step is taken within.
    """

    adapt: Adapt
    repeated: bool = False
    batch: int = 1
    length: int = 4
    labels: bool = False
    watched: Callable[[nn.Module], AbstractContextManager[object]] = lambda model: nullcontext()


@dataclass(frozen=True)
class _Call:
    """What a training step does with a module: how often, what it needs, and how much at once."""

    times: int
    gradient: bool
    all_tokens: bool


def asked_products(
    model: PreTrainedModel, layers: Sequence[FrozenLayer], step: Step
) -> tuple[list[Asked], list[Asked]]:
    """What a batch asks for when it is measured, and what it asks for besides when it is trained on.

    Args:
        model: on the meta device. It gets the step's adapter, and its frozen layers are emptied.
        layers: that workers multiply by.
        step: the training step.

    Raises:
        ConfigurationError: PEFT refuses the adapter.
    """
    by_module = {x.module: x for x in layers}
    groups = trace_groups(type(model), model.config, list(by_module))
    for layer in layers:
        make_remote(model.get_submodule(layer.module), layer.out_features)
    calls = _training_calls(model, [group[0] for group in groups], step)
    forward: list[Asked] = []
    training: list[Asked] = []
    for group in groups:
        members = [by_module[module] for module in group]
        call = calls[group[0]]
        once = [
            Asked(x, call.all_tokens)
            for x in forward_products([x.name for x in members], members[0].in_features)
        ]
        forward += once
        training += once * (call.times - 1)
        if call.gradient:
            backward = backward_products([(x.name, x.out_features) for x in members])
            training += [Asked(x, call.all_tokens) for x in backward]
    return forward, training


class _Elsewhere(torch.autograd.Function):
    """A product that workers compute, without numbers.

    Like the real one, it keeps nothing of its input, and goes by float32.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, outputs: int, wait: Callable[[], object]) -> torch.Tensor:
        ctx.shape, ctx.wait = x.shape, wait
        wait()
        return _by_float32(x, (*x.shape[:-1], outputs))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.wait()
        return _by_float32(gradients[0], ctx.shape), None, None


def _by_float32(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return x.to(torch.float32).new_ones(shape).to(x.dtype)


def make_remote(module: nn.Module, outputs: int, wait: Callable[[], object] = lambda: None) -> None:
    """Leaves out of a linear layer what workers compute.

    Args:
        module: the layer.
        outputs: its features.
        wait: called instead, in both directions.
    """
    bias = getattr(module, "bias", None)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Elsewhere.apply(x, outputs, wait)
        return y if bias is None else y + bias

    module.forward = forward


def training_step(model: nn.Module, config: Any, main_input: str, step: Step, device: str) -> None:
    """Forward and backward pass of a model that has its adapter."""
    inputs = {main_input: torch.zeros((step.batch, step.length), dtype=torch.long, device=device)}
    if step.labels:
        classifies = type(model.get_base_model()).__name__.endswith("ForSequenceClassification")  # type: ignore[operator]
        shape = (step.batch,) if classifies else (step.batch, step.length)
        inputs["labels"] = torch.zeros(shape, dtype=torch.long, device=device)
    if step.repeated:
        config.use_cache = False
        model.activation_checkpointing_enable()  # type: ignore[operator]
        # There is no cache then, and a mask in this form is the one that models take as it is.
        inputs["attention_mask"] = torch.zeros((step.batch, 1, step.length, step.length), device=device)
    with step.watched(model):
        outputs = model(**inputs)
        (outputs.loss if step.labels else outputs.logits.sum()).backward()


def _training_calls(model: PreTrainedModel, modules: Sequence[str], step: Step) -> dict[str, _Call]:
    """How a training step calls each module.

    Where it can't be taken, all that is known is that nothing trained precedes the
    first module.
    """
    calls: dict[str, _Call] = {}
    for name in modules:

        def hook(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            before = calls.get(name, _Call(0, False, False))
            calls[name] = _Call(
                before.times + 1,
                before.gradient or bool(args[0].requires_grad),
                args[0].shape[:-1].numel() >= step.batch * step.length,
            )

        model.get_submodule(name).register_forward_pre_hook(hook)
    config = model.config
    config.use_cache = True  # without a cache, masks depend on the values of positions, which are not there
    random_state = RandomState()
    try:
        training_step(step.adapt(model).train(), config, model.main_input_name, step, "meta")
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
