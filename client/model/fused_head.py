"""TRL's fused output head for a head that workers hold.

TRL's trainers call ``model(..., labels=labels, fused_lm_head=True)`` and get log-probabilities of the
labels instead of logits. TRL computes them out of the head's weight, tile by tile; where that is absent, the
model's own forward computes logits through the head, and the same outputs follow from those. The head is
asked for all positions: asking for labelled ones alone would show workers their number.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import FunctionType
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from blindtune.client.model.absent_weight import AbsentWeight
from blindtune.errors import UnsupportedError

__all__ = ["serve_fused_head"]

_SWITCH = "fused_lm_head"
_LOSS_ARGUMENTS = ("labels", "shift_labels", "num_items_in_batch")
_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_OUTPUTS = {"loss", "label_mask", "aux_loss", *_PER_TOKEN}


@dataclass(frozen=True)
class _Request:
    """A call for fused outputs that is under way."""

    arguments: Mapping[str, Any]
    temperature: float
    wanted: frozenset[str]
    output_class: type


class _FusedHead:
    """Hooks around a model's forward pass, as an object that can be copied along with its model."""

    def __init__(self) -> None:
        self._asked = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_FusedHead":
        return _FusedHead()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model with remote layers cannot be pickled: save its adapter instead")

    def before(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._asked.request = None
        head = model.get_output_embeddings()
        if not kwargs.get(_SWITCH) or not isinstance(getattr(head, "weight", None), AbsentWeight):
            return None
        arguments = {name: kwargs.get(name) for name in _LOSS_ARGUMENTS}
        self._asked.request = _request(model, arguments)
        kept = {name: x for name, x in kwargs.items() if name != _SWITCH and name not in _LOSS_ARGUMENTS}
        return args, kept | {"use_cache": False, "return_dict": True}

    def after(self, model: PreTrainedModel, args: tuple[Any, ...], output: Any) -> Any:
        request: _Request | None = getattr(self._asked, "request", None)
        self._asked.request = None
        return output if request is None else _fused_output(request, output, model.config.get_text_config())


def serve_fused_head(model: PreTrainedModel) -> None:
    """Answers calls for TRL's fused outputs."""
    hooks = _FusedHead()
    model.register_forward_pre_hook(hooks.before, with_kwargs=True)
    model.register_forward_hook(hooks.after)


def _request(model: nn.Module, arguments: Mapping[str, Any]) -> _Request:
    """What TRL set when it gave the model a fused head.

    Raises:
        UnsupportedError: it is not what the versions of TRL that are known set.
    """
    for function in _functions_within(model.forward):
        names = function.__code__.co_freevars
        cells = dict(zip(names, (x.cell_contents for x in function.__closure__ or ()), strict=True))
        output_class = function.__globals__.get("FusedCausalLMOutput")
        if {"original_forward", "temperature", "outputs"} <= cells.keys() and output_class is not None:
            wanted = frozenset(cells["outputs"]) | {"log_probs"}
            if {x.name for x in fields(output_class)} == _OUTPUTS and wanted <= set(_PER_TOKEN):
                return _Request(arguments, cells["temperature"], wanted, output_class)
    raise UnsupportedError(
        "this version of TRL computes its loss from the output head's weight, which stays with the workers, "
        "in a way that is not known here: keep the head on the client with head='local', or use trl 1.16"
    )


def _functions_within(function: Any) -> list[FunctionType]:
    """A function and those that it wraps, by its closure: accelerate wraps forward once more."""
    found: list[FunctionType] = []
    waiting: list[Any] = [function]
    while waiting:
        inner = waiting.pop()
        inner = getattr(inner, "__func__", inner)
        if isinstance(inner, FunctionType):
            if inner in found:
                continue
            found.append(inner)
            waiting += [cell.cell_contents for cell in inner.__closure__ or ()]
        elif callable(inner) and not isinstance(inner, type | nn.Module):
            waiting += [x for x in vars(inner).values() if callable(x)] if hasattr(inner, "__dict__") else []
    return found


def _fused_output(request: _Request, output: Any, config: Any) -> Any:
    labels, shifted = request.arguments["labels"], request.arguments["shift_labels"]
    logits = output.logits
    if shifted is None:
        logits, labels = logits[:, :-1], labels[:, 1:]
    else:
        labels = shifted
    labels = labels.to(logits.device)
    mask = labels != -100
    found = {
        name: value.masked_fill(~mask, 0)
        for name, value in _per_token(logits, labels.clamp(min=0), request).items()
    }
    count = request.arguments["num_items_in_batch"]
    loss = -found["log_probs"].sum() / (mask.sum().clamp(min=1) if count is None else count)
    auxiliary = getattr(output, "aux_loss", None)
    if auxiliary is not None:
        loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * auxiliary
    return request.output_class(loss=loss, label_mask=mask, aux_loss=auxiliary, **found)


def _per_token(logits: torch.Tensor, targets: torch.Tensor, request: _Request) -> dict[str, torch.Tensor]:
    """Figures of the distribution softmax(logits / temperature), for each position.

    Args:
        logits: [batch, positions, vocabulary].
        targets: int64 [batch, positions].
    """
    z = logits.float() / request.temperature
    log_z = z.logsumexp(-1)
    figures: dict[str, Callable[[], torch.Tensor]] = {
        "log_probs": lambda: z.gather(-1, targets[..., None])[..., 0] - log_z,
        "entropy": lambda: log_z - ((z - log_z[..., None]).exp() * z).sum(-1),
        "log_sum_sq_probs": lambda: (2 * z.detach()).logsumexp(-1) - 2 * log_z.detach(),
        "mean_logits": lambda: z.detach().mean(-1),
        "is_top1": lambda: z.detach().argmax(-1) == targets,
    }
    return {name: figures[name]() for name in figures if name in request.wanted}
