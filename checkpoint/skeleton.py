"""Which layers of a model are frozen linear layers, and what the checkpoint calls them.

A layer's name, for both sides, is the key of its weight in the checkpoint, with a range of rows where the
tensor holds other weights too (``attn.Wqkv.weight[0:768]``). Module names won't do: they depend on the class
(``encoder.layer.0...`` in BertModel is ``bert.encoder.layer.0...`` in BertForSequenceClassification).

Frozen are the linear layers inside the base model, and the output head of a language model. Linear
layers outside the base model, such as a classification head, are small and often trained: they stay
on the client.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from blindtune.checkpoint.decoders import decoder_of
from blindtune.checkpoint.experts import require_dense
from blindtune.checkpoint.files import require_no_pointer
from blindtune.checkpoint.joined import Rows, split_rows
from blindtune.checkpoint.trace import trace
from blindtune.errors import CheckpointError

__all__ = [
    "FrozenLayer",
    "absent_parameters",
    "build_skeleton",
    "checkpoint_keys",
    "converted_parameters",
    "frozen_layers",
    "is_small",
    "require_supported",
    "row_ranges",
    "supported_config",
    "unknown_keys",
    "weight_keys",
]

_BLOCKS = re.compile(r"(num_|n_)?((hidden|encoder|decoder)_)?layers?")
# Several times as deep as any model: what a damaged number asks for would fill the memory.
_MOST_BLOCKS = 1000
# Multiplications for each number that a request sends or brings. A product costs the client about that much
# work in masks and conversions alone.
_LEAST_WORK = 4


@dataclass(frozen=True, slots=True)
class FrozenLayer:
    """A linear layer whose weight never changes.

    Attributes:
        name: key of the weight in the checkpoint, or `Rows.name`.
        module: name of the module in the model at hand.
        out_features, in_features: shape of the integer weight matrix.
        transposed: the checkpoint stores [in, out] (GPT-2's Conv1D).
        head: the output head of a language model.
        tied: the weight is also the input embedding.
        rows: the part of a joined tensor that is its weight; None where the tensor is its weight alone.
    """

    name: str
    module: str
    out_features: int
    in_features: int
    transposed: bool = False
    head: bool = False
    tied: bool = False
    rows: Rows | None = None

    @property
    def key(self) -> str:
        """Of the tensor in the checkpoint that the weight is, or is a part of."""
        return self.name if self.rows is None else self.rows.key


def supported_config(folder: Path) -> PretrainedConfig:
    """The configuration of a checkpoint that the protocol can serve. Code that comes with it never runs.

    Raises:
        CheckpointError: there is none, or it can't be read.
        UnsupportedError: see `require_supported`.
    """
    path = folder / "config.json"
    require_no_pointer(path)
    try:
        settings = json.loads(path.read_bytes())
        blocks = [x for name, x in _settings(settings) if _BLOCKS.fullmatch(name) and isinstance(x, int)]
        if max(blocks, default=0) > _MOST_BLOCKS:
            raise ValueError(f"it asks for {max(blocks)} blocks, more than {_MOST_BLOCKS}")
        # Left open, the stock loader asks whether to run a checkpoint's own code, and takes any "y" on stdin.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a setting of the wrong type leads to errors of any kind
        what = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder} has no usable config.json: {what or type(error).__name__}"
        ) from error
    decoder_of(folder)
    # How numbers are stored is no property of the model, and loading must not act on it.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    require_supported(config)
    return config


def require_supported(config: PretrainedConfig) -> None:
    """Refuses models that the protocol cannot serve.

    Raises:
        UnsupportedError: mixture of experts.
    """
    require_dense(config, build_skeleton)


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every setting of a configuration, those of its parts included."""
    for name, value in config.items():
        yield str(name), value
        if isinstance(value, dict):
            yield from _settings(value)


def build_skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a checkpoint on the meta device: all its modules, no weights.

    Raises:
        CheckpointError: no model can be built with these settings.
    """
    try:
        architecture = next(iter(config.architectures or []), None)
        # Nothing but a model: the name comes out of a file.
        cls = getattr(transformers, architecture, None) if isinstance(architecture, str) else None
        with torch.device("meta"):
            if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
                return cls(config)
            return AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:  # a setting of the wrong size leads to errors of any kind
        what = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"no model can be built from the config.json in {config.name_or_path} "
            f"({type(error).__name__}: {what}): restore the file"
        ) from error


def checkpoint_keys(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Maps names in a model's state dict to checkpoint keys, by the rules that loading follows.

    Parameters that loading splits off a tensor, or puts together out of several, are left out.
    """
    return {x.names[0]: x.key for x in _loaded(model, keys) if x.converter is None}


def row_ranges(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, Rows]:
    """Maps names in a model's state dict to the rows of a tensor that loading splits.

    Tensors that it splits in other ways are left out, and so are those with a part that the checkpoint also
    stores elsewhere.
    """
    state = model.state_dict()
    loaded = list(_loaded(model, keys))
    sources = Counter(name for x in loaded for name in x.names)
    found: dict[str, Rows] = {}
    for x in loaded:
        if x.converter is None or any(name not in state or sources[name] > 1 for name in x.names):
            continue
        counts = [len(state[name]) if state[name].dim() else 0 for name in x.names]
        found |= zip(x.names, split_rows(x.converter, x.key, counts) or (), strict=False)
    return found


def absent_parameters(model: PreTrainedModel, keys: Iterable[str]) -> list[str]:
    """Names of the parameters that no tensor of a checkpoint gives, so that loading makes them up.

    Args:
        model: on any device, as loading builds it.
        keys: of all tensors in the checkpoint.
    """
    given = {name for x in _loaded(model, keys) for name in x.names}
    given |= dict(getattr(model, "all_tied_weights_keys", None) or {}).keys()
    known = [re.compile(x) for x in model._keys_to_ignore_on_load_missing or ()]
    names = (name for name, _ in model.named_parameters(remove_duplicate=False))
    return [x for x in names if x not in given and not any(pattern.search(x) for pattern in known)]


def converted_parameters(model: PreTrainedModel, keys: Iterable[str]) -> set[str]:
    """Names in a model's state dict of what loading makes of tensors in other ways than `row_ranges`."""
    keys = list(keys)
    made = {name for x in _loaded(model, keys) if x.converter for name in x.names}
    return made - row_ranges(model, keys).keys()


def weight_keys(model: PreTrainedModel, keys: Iterable[str]) -> list[str]:
    """Checkpoint keys of all that a model's parameters are made of."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return [x.key for x in _loaded(model, keys) if not parameters.isdisjoint(x.names)]


def unknown_keys(model: PreTrainedModel, keys: Iterable[str]) -> list[str]:
    """Checkpoint keys that a model has no place for, but for those that it is known to pass over."""
    keys = list(keys)
    placed = {x.key for x in _loaded(model, keys)}
    passed = [re.compile(x) for x in model._keys_to_ignore_on_load_unexpected or ()]
    return [x for x in keys if x not in placed and not any(pattern.search(x) for pattern in passed)]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What becomes of a tensor of a checkpoint.

    Attributes:
        key: in the checkpoint.
        names: in the model.
        converter: splits it, or puts it together with others; None where it is taken as it is.
    """

    key: str
    names: tuple[str, ...]
    converter: WeightConverter | None


def _loaded(model: PreTrainedModel, keys: Iterable[str]) -> Iterator[_Loaded]:
    """The tensors that a model has a place for."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {source: x for x in converters for source in x.source_patterns}
    state = dict.fromkeys(model.state_dict(), True)
    prefix = model.base_model_prefix
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name in state:
            converter = None if pattern is None else by_pattern[pattern]
            first, *others = ("",) if converter is None else converter.target_patterns
            yield _Loaded(key, (name, *(name.replace(first, x) for x in others)), converter)


def is_small(rows: int, columns: int) -> bool:
    """Whether a weight is too small to be worth a request."""
    return rows * columns < _LEAST_WORK * (rows + columns)


def frozen_layers(model: PreTrainedModel, keys: Iterable[str]) -> list[FrozenLayer]:
    """The frozen linear layers of a model whose weights are in a checkpoint, in the model's order.

    A layer whose weight other code than its own forward pass reads is none of them, nor is one so small that
    asking for its product takes more than the product. Of a joined tensor all parts are, or none: the rest of
    it could not be loaded.

    Args:
        model: on any device, the meta device included.
        keys: of all tensors in the checkpoint.
    """
    keys = list(keys)
    stored = checkpoint_keys(model, keys)
    parts = row_ranges(model, keys)
    read = trace(type(model), model.config).read
    head = model.get_output_embeddings()
    # The weights of modules that `tie_word_embeddings` joins: target parameter -> source parameter.
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    shared = {*tied, *tied.values()}
    base = {id(module) for module in model.base_model.modules()}
    layers = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or (id(module) not in base and module is not head):
            continue
        parameter = f"{name}.weight"
        source = tied.get(parameter)
        key = stored.get(parameter) or stored.get(source or "")
        part = None if key or module is head or parameter in shared else parts.get(parameter)
        called = part.name if part else key
        if called is None:
            continue
        rows, columns = module.weight.shape
        transposed = isinstance(module, Conv1D)
        if name in read or is_small(rows, columns) or (part and transposed):
            continue
        layers.append(
            FrozenLayer(
                name=called,
                module=name,
                out_features=columns if transposed else rows,
                in_features=rows if transposed else columns,
                transposed=transposed,
                head=module is head,
                tied=source is not None,
                rows=part,
            )
        )
    return _of_whole_tensors(layers)


def _of_whole_tensors(layers: list[FrozenLayer]) -> list[FrozenLayer]:
    """Layers but for parts of joined tensors of which other parts are no layers."""
    rows = Counter[str]()
    for part in {x.rows for x in layers if x.rows}:
        rows[part.key] += len(part)
    return [x for x in layers if x.rows is None or rows[x.key] == x.rows.of]
