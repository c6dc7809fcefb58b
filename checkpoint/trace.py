"""A forward pass without weights: which layers read the same tensor, and which weights code reads itself.

The model is built without weights and run once on the processor, on a few tokens (or a picture, or a sound):
linear layers give constants instead of products, and each other parameter is one number, stretched to its
shape. So a model of any size runs in the memory of its activations, and whatever depends on values works.
"""

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from blindtune.checkpoint.weight_reads import DESCRIBES, FOLLOWS_SHAPE, FOLLOWS_TYPE, KEEPS

__all__ = ["Trace", "example_inputs", "trace"]

_logger = logging.getLogger(__name__)

_TOKENS = (4, 16)
_SAMPLES = 4000  # of a sound: a quarter of a second
_CONSTANT = 0.01
_CACHED = 16
_COUNTING = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@dataclass(frozen=True)
class Trace:
    """What a forward pass of a model did.

    Attributes:
        groups: names of linear layers, those together that read the same tensor, in the order of their calls.
        read: names of linear layers whose weight was read by other code than their own forward pass.
        failure: why the model, or a part of it, could not be run; empty if all of it was.
    """

    groups: tuple[tuple[str, ...], ...]
    read: frozenset[str]
    failure: str


def trace(model_class: type[PreTrainedModel], config: PretrainedConfig) -> Trace:
    """Runs a model without weights."""
    return _traced(_Model(model_class, config, config.to_json_string(use_diff=False)))


@dataclass(frozen=True)
class _Model:
    """A class and a configuration, which is compared by its content."""

    model_class: type[PreTrainedModel]
    config: PretrainedConfig = field(compare=False)
    content: str


@lru_cache(_CACHED)
def _traced(model: _Model) -> Trace:
    recorder = _Recorder()
    failures: list[str] = []
    config = copy.deepcopy(model.config)
    config.use_cache = False
    try:
        config._attn_implementation = "eager"  # others need a GPU, or a library
        with torch.device("meta"):
            skeleton = model.model_class(config)
        _hollow(skeleton, recorder)
        skeleton.eval()
    except Exception as error:  # any architecture may fail here, in any way
        return Trace((), frozenset(), _described(error))
    # Loading a model sets other defaults.
    with torch.no_grad(), torch.device("cpu"):
        for part in _parts(skeleton, recorder):
            failed = _run(part)
            if failed is not None:
                failures.append(f"{type(part).__name__}: {_described(failed)}")
    return Trace(recorder.groups(), frozenset(recorder.read), "; ".join(failures))


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class _Recorder:
    """What linear layers of a skeleton were given, and whose weights were read."""

    def __init__(self) -> None:
        self.linear: set[str] = set()
        self.called: dict[tuple[int, int], list[str]] = {}
        self.read: set[str] = set()
        self._inputs: list[torch.Tensor] = []  # kept alive, so that no two of them get the same id

    def call(self, name: str, x: torch.Tensor) -> None:
        self._inputs.append(x)
        self.called.setdefault((id(x), x._version), []).append(name)

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Each layer where it was called first."""
        seen: set[str] = set()
        groups = []
        for names in self.called.values():
            fresh = tuple(name for name in dict.fromkeys(names) if name not in seen)
            seen.update(fresh)
            if fresh:
                groups.append(fresh)
        return tuple(groups)

    def known(self) -> set[str]:
        return self.read.union(*self.called.values())


class _WatchedWeight(torch.Tensor):
    """The weight of a linear layer, which tells when it is read."""

    tell: Callable[[], None]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in DESCRIBES:
                return func(*args, **kwargs)
            first = args[0] if args else None
            if func in KEEPS and isinstance(first, _WatchedWeight):
                again = func(first, *args[1:], **kwargs)
                return _watched(again, first.tell) if isinstance(again, torch.Tensor) else again
        if func not in FOLLOWS_SHAPE | FOLLOWS_TYPE:
            _tell_all((args, kwargs))
        plain = _plain((args, kwargs))
        return func(*plain[0], **plain[1])


def _watched(weight: torch.Tensor, tell: Callable[[], None]) -> _WatchedWeight:
    watched = weight.as_subclass(_WatchedWeight)
    watched.tell = tell
    return watched


def _tell_all(value: Any) -> None:
    if isinstance(value, _WatchedWeight):
        value.tell()
    elif isinstance(value, Mapping | tuple | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            _tell_all(part)


def _plain(value: Any) -> Any:
    if isinstance(value, _WatchedWeight):
        with torch._C.DisableTorchFunctionSubclass():
            return value.as_subclass(torch.Tensor).contiguous()  # what reads it may write, too
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (tuple, list) else value


def _hollow(model: nn.Module, recorder: _Recorder) -> None:
    """Puts constants in the place of parameters, buffers and products."""
    for name, module in model.named_modules():
        for values in (module._parameters, module._buffers):
            for key, value in values.items():
                if value is not None:
                    values[key] = _constant(value)
        if isinstance(module, nn.Linear | Conv1D):
            recorder.linear.add(name)
            _watch(name, module, recorder)


def _constant(value: torch.Tensor) -> torch.Tensor:
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    number = 0 if dtype in _COUNTING else _CONSTANT
    constant = torch.full((), number, dtype=dtype, device="cpu").expand(value.shape)
    return nn.Parameter(constant, requires_grad=False) if isinstance(value, nn.Parameter) else constant


def _watch(name: str, module: nn.Linear | Conv1D, recorder: _Recorder) -> None:
    outputs = module.out_features if isinstance(module, nn.Linear) else module.nf

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        recorder.call(name, x)
        return torch.full((*x.shape[:-1], outputs), _CONSTANT, dtype=x.dtype)

    weight = module._parameters["weight"]
    if weight is not None:
        module._parameters["weight"] = _watched(weight, lambda: recorder.read.add(name))  # type: ignore[assignment]
    module.forward = forward  # type: ignore[method-assign]


def _parts(model: PreTrainedModel, recorder: _Recorder) -> Iterator[PreTrainedModel]:
    """The model, then each model within it that has layers which nothing called so far."""
    yield model
    for name, part in model.named_modules():
        if part is model or not isinstance(part, PreTrainedModel):
            continue
        within = {x for x in recorder.linear if x.startswith(f"{name}.")}
        if within - recorder.known():
            yield part


def _run(model: PreTrainedModel) -> Exception | None:
    """Runs a model on the first inputs that it takes; returns the last error if there are none."""
    error: Exception | None = None
    for inputs in example_inputs(model):
        try:
            model(**inputs)
            return None
        except Exception as failed:  # any architecture may fail here, in any way
            error = failed
    return error


def example_inputs(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """What a model may take: its main input, then all inputs that are known here."""
    names = set(inspect.signature(model.forward).parameters)
    main = {model.main_input_name, *({"decoder_input_ids"} & names)}
    shapes = [{name: _candidates(name, model.config) for name in chosen} for chosen in (main, names)]
    for known in shapes:
        known = {name: found for name, found in known.items() if found}
        for choice in range(max((len(x) for x in known.values()), default=0)):
            yield {name: found[min(choice, len(found) - 1)] for name, found in known.items()}


def _candidates(name: str, config: PretrainedConfig) -> list[torch.Tensor]:
    """Inputs of that name, of the shapes that models have for it."""
    if name in ("input_ids", "decoder_input_ids"):
        vocabulary = max(2, _setting(config, "vocab_size") or 2)
        return [torch.arange(1, 1 + count)[None] % vocabulary for count in _TOKENS]
    if name == "pixel_values":
        size = _setting(config, "image_size") or 224
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = _setting(config, "num_channels", "in_channels", "in_chans") or 3
        return [torch.full((1, channels, height, width), _CONSTANT)]
    if name == "input_features":
        bins = _setting(config, "num_mel_bins", "feature_projection_input_dim") or 80
        frames = 2 * (_setting(config, "max_source_positions") or 50)
        return [torch.full((1, bins, frames), _CONSTANT), torch.full((1, frames, bins), _CONSTANT)]
    if name == "input_values":
        bins, frames = _setting(config, "num_mel_bins"), _setting(config, "max_length") or 100
        pictures = [torch.full((1, frames, bins), _CONSTANT)] if bins else []
        return [*pictures, torch.full((1, _SAMPLES), _CONSTANT)]
    return []


def _setting(config: PretrainedConfig, *names: str) -> Any:
    """The first of some settings that a configuration or one of its parts has."""
    parts = [x for x in vars(config).values() if isinstance(x, PretrainedConfig)]
    for part in (config, *parts):
        for name in names:
            if getattr(part, name, None):
                return getattr(part, name)
    return None
