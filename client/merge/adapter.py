"""What a LoRA adapter changes in its base model, by the name of each parameter.

PEFT decides where the adapter goes and what it adds: it is put on a model without weights, and only the
adapter's own tensors become real.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.save_and_load import load_peft_weights
from torch import nn
from transformers import PreTrainedModel

from blindtune.client.trust.adapter_config import require_plain_lora
from blindtune.errors import CheckpointError, ConfigurationError, UnsupportedError

__all__ = ["Changes", "read_changes", "read_config"]

_NAME = "default"
_PREFIX = "base_model.model."
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Settings under which an adapter is more than a product of two matrices added to a weight.
_MORE_THAN_LORA = (
    "use_dora",
    "use_qalora",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)
# Other initializations change the base weights too, and such an adapter belongs to the changed ones.
_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")


@dataclass
class Changes:
    """What becomes of a base model's parameters.

    Attributes:
        keep_ties: the same was trained for all parameters that are one tensor in the base.
        replaced: new values, float32 unless the adapter stores a bias or an embedding in another type.
        deltas: make what is added, in float32 and in the parameter's own layout, to the stored value or to
            the new one.
    """

    keep_ties: bool
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    deltas: dict[str, Callable[[], torch.Tensor]] = field(default_factory=dict)

    def __contains__(self, parameter: object) -> bool:
        return parameter in self.replaced or parameter in self.deltas

    def drop(self, parameter: str) -> None:
        """Forgets what was to become of a parameter."""
        self.replaced.pop(parameter, None)
        self.deltas.pop(parameter, None)


def read_config(adapter: Path) -> Any:
    """The ``LoraConfig`` of an adapter.

    Raises:
        ConfigurationError: the folder holds no adapter.
        UnsupportedError: it is no plain LoRA adapter.
        CheckpointError: a file is damaged.
    """
    path = adapter / "adapter_config.json"
    if not path.is_file() or not any((adapter / name).is_file() for name in _WEIGHTS):
        raise ConfigurationError(
            f"{adapter} is no adapter: it needs adapter_config.json and {_WEIGHTS[0]}, as save_pretrained of "
            "the trained PEFT model writes them"
        )
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))["peft_type"]
        config = PeftConfig.from_pretrained(str(adapter)) if kind == "LORA" else None
    except Exception as error:  # a setting of the wrong type leads to errors of any kind
        what = repr(error)[:300]
        raise CheckpointError(f"{path} is no adapter configuration: {what}; save it again") from error
    instead = "merge it with merge_and_unload of PEFT, on a machine that holds the whole model"
    if config is None:
        raise UnsupportedError(f"{adapter} is a {kind} adapter, and only LoRA can be merged here: {instead}")
    for setting in _MORE_THAN_LORA:
        if getattr(config, setting, None):
            raise UnsupportedError(f"{adapter} uses {setting}, which is more than plain LoRA: {instead}")
    if config.init_lora_weights not in _KEEP_THE_BASE:
        raise UnsupportedError(
            f"{adapter} was initialized with {config.init_lora_weights!r}, which changes the base weights: "
            "save it again with path_initial_model_for_weight_conversion, which makes it plain LoRA"
        )
    require_plain_lora(adapter)
    config.init_lora_weights = True  # nothing is initialized on a model without weights
    return config


@torch.no_grad()
def read_changes(adapter: Path, config: Any, model: PreTrainedModel) -> Changes:
    """Reads an adapter.

    Args:
        adapter: the folder of `read_config`.
        config: its result.
        model: the base model on the meta device, in float32. It is modified.

    Raises:
        CheckpointError: the adapter is damaged, or was trained on a model of another shape.
        UnsupportedError: the adapter targets a kind of layer that can't be merged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the model's name, tied weights and the like
        try:
            with torch.device("meta"):  # whatever rank the file asks for
                wrapped = get_peft_model(model, config, _NAME, low_cpu_mem_usage=True)
        except Exception as error:  # a setting of the wrong type leads to errors of any kind
            what = " ".join(str(error).split())[:500]
            raise CheckpointError(
                f"the adapter in {adapter} does not fit the base model ({type(model).__name__}): {what}"
            ) from error
        return _changes(wrapped, config, adapter)


def _changes(wrapped: PeftModel, config: Any, adapter: Path) -> Changes:
    stored = _stored(adapter)
    state = wrapped.state_dict()
    expected = get_peft_model_state_dict(wrapped, state, _NAME, save_embedding_layers=False)
    # Trained biases and saved embeddings are stored under the names of the base's own parameters.
    own = {key: tensor for key, tensor in stored.items() if key in state}
    _check_fit(adapter, stored, {key: state[key] for key in own} | expected)
    for module in wrapped.modules():
        for attribute in getattr(module, "adapter_layer_names", ()):
            container = getattr(module, attribute, None)
            if isinstance(container, nn.Module):
                container.to_empty(device="cpu")
                for parameter in container.parameters():
                    parameter.fill_(torch.nan)  # what is not loaded over does not go unnoticed
    set_peft_model_state_dict(wrapped, {k: v for k, v in stored.items() if k not in own}, _NAME)
    changes = Changes(bool(getattr(config, "ensure_weight_tying", False)))
    base = wrapped.get_base_model()
    for name, module in base.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save[_NAME].state_dict()
            changes.replaced |= {f"{name}.{key}": tensor for key, tensor in trained.items()}
        elif isinstance(module, LoraLayer):
            _add_deltas(changes, name, module)
    for key, tensor in own.items():
        name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
        if ".original_module." not in name:
            changes.replaced.setdefault(name, tensor)
    return changes


def _stored(adapter: Path) -> dict[str, torch.Tensor]:
    try:
        stored: dict[str, torch.Tensor] = load_peft_weights(str(adapter), device="cpu")
    except Exception as error:  # torch raises many types for a damaged file
        raise CheckpointError(f"the weights in {adapter} cannot be read: {error}; save it again") from error
    return stored


def _check_fit(adapter: Path, found: dict[str, torch.Tensor], needed: dict[str, torch.Tensor]) -> None:
    what = f"the adapter in {adapter} was trained on another model"
    then = "name the checkpoint that it was trained on"
    for key, tensor in found.items():
        layer, shape = key.removeprefix(_PREFIX), tuple(tensor.shape)
        if key not in needed:
            raise CheckpointError(
                f"{what}: it has {layer} with shape {shape}, for which the base has no place; {then}"
            )
        if shape != tuple(needed[key].shape):
            raise CheckpointError(
                f"{what}: {layer} has shape {shape}, but the base needs {tuple(needed[key].shape)}; "
                f"{then}, and for a classifier one label for each class"
            )
    if missing := sorted(needed.keys() - found.keys()):
        layer = missing[0].removeprefix(_PREFIX)
        raise CheckpointError(
            f"{what}: it lacks {layer}, which has shape {tuple(needed[missing[0]].shape)} there; {then}"
        )


def _add_deltas(changes: Changes, name: str, layer: LoraLayer) -> None:
    if not isinstance(layer, Linear | Embedding) or _NAME in layer.lora_variant:
        kind = type(layer.lora_variant.get(_NAME) or layer).__name__
        raise UnsupportedError(
            f"{name} has a {kind} adapter, and only plain LoRA on linear layers and embeddings can be "
            "merged: merge it with merge_and_unload of PEFT, on a machine that holds the whole model"
        )
    changes.deltas[f"{name}.weight"] = partial(layer.get_delta_weight, _NAME)
    if layer.lora_bias[_NAME]:
        bias, scaling = layer.lora_B[_NAME].bias, layer.scaling[_NAME]
        changes.deltas[f"{name}.bias"] = lambda: bias * scaling
