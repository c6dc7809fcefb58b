"""Refuses or warns about training settings that remote layers can't serve, at the first forward pass.

Adapters are added after the model is loaded, by code that knows nothing of remote layers, so this is
the first moment to see them.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from blindtune.client.model.fused_head import serve_fused_head
from blindtune.client.model.remote_linear import RemoteLinear
from blindtune.errors import UnsupportedError

__all__ = ["guard_training"]

_logger = logging.getLogger(__name__)


def guard_training(model: PreTrainedModel, absent: Sequence[str] = ()) -> None:
    """Watches a model's forward passes.

    Args:
        absent: names of the parameters that the checkpoint lacks, and that are random therefore.
    """
    model.register_forward_pre_hook(_Guard(absent), with_kwargs=True)
    serve_fused_head(model)


class _Guard:
    """A hook, as an object that can be copied along with its model."""

    def __init__(self, absent: Sequence[str]) -> None:
        self._warned = False
        self._absent = absent

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        for name, child in module.named_modules():
            if any(dict(getattr(child, "use_dora", None) or {}).values()):
                raise UnsupportedError(
                    f"{name} uses DoRA, which needs the base model's weights: they stay with the workers. "
                    "Use plain LoRA (use_dora=False)"
                )
            if any(isinstance(x, RemoteLinear) for x in _trained_copies(child)):
                raise UnsupportedError(
                    f"{name} is to be trained whole, but its weight stays with the workers: name it in "
                    "target_modules of an adapter that adds to its output (LoRA), not in modules_to_save; "
                    "keep an output head here with head='local'"
                )
        if left := [x for x in self._absent if not _trained_whole(module, x)]:
            _logger.warning(
                "%s: not in the checkpoint, so random, and not trained whole: wherever the adapter is loaded "
                "it will be random anew, and results will differ. Name %s in modules_to_save",
                ", ".join(left),
                "its module" if len(left) == 1 else "their modules",
            )
        self._absent = ()
        if not self._warned and any(
            getattr(child, "gradient_checkpointing", False) for child in module.modules()
        ):
            self._warned = True
            _logger.warning(
                "gradient checkpointing is on: every forward round trip happens twice, for about half as "
                "much traffic again. Unless memory is short, set gradient_checkpointing=False"
            )


def _trained_copies(module: nn.Module) -> list[nn.Module]:
    """Copies of a module that peft trains in its place (modules_to_save, LN tuning)."""
    if not type(module).__module__.startswith("peft."):
        return []
    return [x for copies in module.children() if isinstance(copies, nn.ModuleDict) for x in copies.values()]


def _trained_whole(model: nn.Module, parameter: str) -> bool:
    """Whether a parameter, or the copy of it that an adapter saves, is trained itself."""
    module: Any = model
    for name in parameter.split("."):
        # Adapters put layers of their own around a module, which hand its names on.
        module = getattr(module, name, None)
        if module is None:
            return True  # somebody has put something else there
        if isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict) and module.modules_to_save:
            return True
    return bool(module.requires_grad)
