"""How `from_pretrained` builds a model with remote layers.

Registered with transformers under the method ``blindtune``. Before weights are loaded, each frozen linear
layer is replaced by a `RemoteLinear` and its weight struck from what loading looks for, so the weight is
never read. All else loads as usual.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub.constants
import torch
from rich.progress import track
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from blindtune.checkpoint import Checkpoint, FrozenLayer
from blindtune.checkpoint.files import TensorFiles
from blindtune.checkpoint.joined import tensor_keys
from blindtune.checkpoint.skeleton import absent_parameters, frozen_layers, weight_keys
from blindtune.client.config.blind_config import (
    METHOD,
    BlindConfig,
    Operator,
    refuse_configuration_of_checkpoint,
)
from blindtune.client.config.parameter_sets import residue_set
from blindtune.client.kit.groups import trace_groups
from blindtune.client.kit.head import head_is_remote
from blindtune.client.kit.kit import Kit, is_kit
from blindtune.client.kit.prepare import Progress, cached_kit, fingerprint, kit_of
from blindtune.client.model.guard import guard_training
from blindtune.client.model.kept import say_what_is_kept
from blindtune.client.model.layer_group import LayerGroup
from blindtune.client.model.remote_linear import RemoteGroup, RemoteLinear
from blindtune.client.model.row_guard import guard_rows
from blindtune.client.process.output import OutputConsole
from blindtune.client.rounds.connect import HintProgress, connect
from blindtune.client.rounds.multiplier import PrivateMultiplier, ReferenceMultiplier
from blindtune.errors import ConfigurationError, KitError, UnsupportedError
from blindtune.protocol.products import Product
from blindtune.protocol.weights import SCHEMES

__all__ = ["BlindConfig", "BlindQuantizer", "Operator", "multiplier_of", "preparing"]

Item = TypeVar("Item")

_logger = logging.getLogger(__name__)
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")


@register_quantizer(METHOD)
class BlindQuantizer(HfQuantizer):
    """Puts remote layers in the place of frozen linear layers."""

    quantization_config: BlindConfig

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        refuse_configuration_of_checkpoint(kwargs.get("pre_quantized", False))
        super().__init__(quantization_config, **kwargs)
        # Nothing is quantized while loading: the weights are not loaded at all.
        self.pre_quantized = False
        self.multiplier: PrivateMultiplier | None = None
        self._absent: list[str] = []

    @property
    def is_trainable(self) -> bool:
        """Adapters on remote layers can be trained."""
        return True

    def is_serializable(self) -> bool:
        """The base model is not here, so it can't be saved."""
        return False

    def update_device_map(self, device_map: Any) -> Any:
        """With one device there is nothing to spread over several."""
        if isinstance(device_map, str) and device_map in _SPREAD and torch.accelerator.device_count() <= 1:
            found = torch.accelerator.current_accelerator(check_available=True)
            return {"": torch.device("cpu") if found is None else torch.device(found.type, 0)}
        return device_map

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        config = self.quantization_config
        dtype = dtype or torch.get_default_dtype()
        if dtype == torch.float16:
            raise UnsupportedError("fp16 is not supported: load the model with dtype=torch.bfloat16")
        if not checkpoint_files:
            raise ConfigurationError("remote layers need a checkpoint: use from_pretrained")
        folder = Path(checkpoint_files[0]).parent
        with torch.device("cpu"):  # loading builds models on the meta device
            kit, self.multiplier = _open(config, folder, model.config._name_or_path)
        with TensorFiles(folder) as tensors:
            stored = set(tensors)
        keys = stored | set(tensor_keys(kit.layers))
        self._absent = absent_parameters(model, keys)
        remote = self._remote_layers(model, folder, kit, stored)
        say_what_is_kept(model, {x.module for x in remote}, keys)
        groups = trace_groups(type(model), model.config, [layer.module for layer in remote])
        built = _replace(model, remote, groups, kit, self.multiplier, dtype, _device(device_map))
        with torch.device("cpu"):
            self.multiplier.ready([product for group in built for product in group.products])
        return model

    def _remote_layers(
        self, model: PreTrainedModel, folder: Path, kit: Kit, stored: set[str]
    ) -> list[FrozenLayer]:
        keys = tensor_keys(kit.layers)
        layers = frozen_layers(model, [*keys, *(stored - set(keys))])
        head = self.quantization_config.head
        # Of a joined tensor all parts or none: with other settings, the model cuts it elsewhere than the kit.
        here = {x.key for x in layers if x.rows and x.name not in kit.layers}
        remote = [
            x
            for x in layers
            if x.name in kit.layers and x.key not in here and (not x.head or head_is_remote(x, head))
        ]
        if any(x.head and x.key not in stored and x not in remote for x in layers):
            raise ConfigurationError(
                f"head={head!r} needs the output head on the client, but the kit in {folder} was made "
                "without it: make it again with blindtune prepare --head local"
            )
        lacking = set(weight_keys(model, keys)) - {x.key for x in remote} - stored
        if lacking:
            raise KitError(
                f"the kit in {folder} lacks {min(lacking)}, which the client multiplies by: make it again "
                "with blindtune prepare MODEL"
            )
        return remote

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # The model is here: from now on nothing asks the hub or reports to it.
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
        guard_training(model, self._absent)
        config = self.quantization_config
        guard_rows(model, config.rows_follow_content or config.masking == "reference")
        return model


def multiplier_of(model: nn.Module) -> PrivateMultiplier:
    """The multiplier behind a model's remote layers, for its statistics.

    Raises:
        ConfigurationError: the model has no remote layers.
    """
    for module in model.modules():
        quantizer = getattr(module, "hf_quantizer", None)
        if isinstance(quantizer, BlindQuantizer) and quantizer.multiplier is not None:
            return quantizer.multiplier
    raise ConfigurationError("this model has no remote layers: load it with a BlindConfig")


def preparing(name: str, shown: bool = True) -> Progress:
    """Shows on stderr how far the making of a model's kit is."""
    return lambda layers: _track(layers, f"Preparing {Path(name).name} (once)", shown)


def _open(config: BlindConfig, folder: Path, name: str) -> tuple[Kit, PrivateMultiplier]:
    """The kit for a checkpoint folder, and what multiplies."""
    progress, scheme = preparing(name, config.progress), SCHEMES[config.quantization]
    if config.masking == "reference":
        if is_kit(folder):
            kit = kit_of(folder, progress, scheme)
            checkpoint = _origin(kit)
        else:
            checkpoint = Checkpoint.open(folder, scheme=scheme)
            kit = cached_kit(checkpoint, progress=progress)
        return kit, ReferenceMultiplier(
            checkpoint, residue_set(config.masking, config.parameter_set), kit, config.most_reasks
        )
    kit = kit_of(folder, progress, scheme)
    return kit, connect(config, kit, _hint_progress(config))


def _origin(kit: Kit) -> Checkpoint:
    """The checkpoint that a kit was made from, if it is here: the reference needs all weights."""
    origin = Path(kit.description.model)
    if not origin.is_dir() or is_kit(origin):
        raise ConfigurationError(
            f"masking 'reference' needs the whole checkpoint, and {kit.folder} is a kit without the weights, "
            f"made from {origin}, which is no checkpoint folder here"
        )
    checkpoint = Checkpoint.open(origin, scheme=kit.scheme)
    if fingerprint(checkpoint) != kit.description.fingerprint:
        raise ConfigurationError(f"the weights in {origin} are not those that the kit {kit.folder} is for")
    return checkpoint


def _track(items: Iterable[Item], what: str, shown: bool) -> Iterable[Item]:
    console = OutputConsole(stderr=True)
    # In a file or a log, all that a bar would leave is an empty line.
    return track(items, what, console=console, disable=not (shown and console.is_terminal), transient=True)


def _hint_progress(config: BlindConfig) -> HintProgress:
    def show(products: Sequence[Product], size: int) -> Iterable[Product]:
        _logger.info("obtaining hints for %d products, %.1f MB, kept with the kit", len(products), size / 1e6)
        return _track(products, f"Obtaining {size / 1e6:,.0f} MB of hints (once)", config.progress)

    return show


def _device(device_map: Any) -> torch.device:
    if not device_map:
        return torch.device("cpu")
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if len(devices) > 1 or devices & {*_SPREAD, "disk"}:
        raise UnsupportedError("remote layers need the rest of the model on one device: device_map='cpu'")
    return torch.device(devices.pop())


def _replace(
    model: PreTrainedModel,
    layers: list[FrozenLayer],
    groups: list[list[str]],
    kit: Kit,
    multiplier: PrivateMultiplier,
    dtype: torch.dtype,
    device: torch.device,
) -> list[LayerGroup]:
    """Puts remote layers into a model, and strikes their weights from what loading looks for."""
    built = []
    by_module = {layer.module: layer for layer in layers}
    prefix = f"{model.base_model_prefix}."
    ignored = set(model._keys_to_ignore_on_load_unexpected or ())
    for group in _without_repeats(groups, by_module):
        members = [by_module[module] for module in group]
        singles = [LayerGroup([layer.name], kit, multiplier) for layer in members]
        whole = LayerGroup([x.name for x in members], kit, multiplier) if len(members) > 1 else singles[0]
        shared = RemoteGroup(whole, singles)
        built.append(whole)
        for index, layer in enumerate(members):
            old = model.get_submodule(layer.module)
            remote = RemoteLinear(
                layer.in_features,
                layer.out_features,
                getattr(old, "bias", None) is not None,
                shared,
                index,
                device,
                dtype,
                layer.module,
            )
            model.set_submodule(layer.module, remote)
            parameter = f"{layer.module}.weight"
            # Loading knows the weight by its name in the model or, once that is gone, in the checkpoint; that
            # of a part of a joined tensor by the former, without the base model's name before it.
            names = (parameter, parameter.removeprefix(prefix), layer.key)
            ignored |= {f"^{re.escape(name)}$" for name in names}
            tied = getattr(model, "all_tied_weights_keys", None)
            if tied:
                tied.pop(parameter, None)
    model._keys_to_ignore_on_load_unexpected = ignored
    return built


def _without_repeats(groups: list[list[str]], by_module: dict[str, FrozenLayer]) -> Iterator[list[str]]:
    """Groups in which no weight occurs twice: modules that share a weight are asked for one by one."""
    for group in groups:
        first = {by_module[module].name: module for module in reversed(group)}
        yield [module for module in group if module in first.values()]
        yield from ([module] for module in group if module not in first.values())
