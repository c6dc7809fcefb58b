"""The model of a configuration, without weights, and what of it workers multiply by."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from blindtune.checkpoint.skeleton import FrozenLayer, frozen_layers, supported_config
from blindtune.client.kit.head import Head, head_is_remote
from blindtune.errors import CheckpointError, UnsupportedError

__all__ = ["Skeleton", "Task", "config_folder", "skeleton_of"]

Task = Literal["auto", "instructions", "classification"]


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device.

    Attributes:
        model: without weights.
        layers: that workers multiply by.
        held: bytes of all layers at a worker, which holds the head as well, whoever computes it.
    """

    model: PreTrainedModel
    layers: list[FrozenLayer]
    held: int

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of each layer."""
        return {x.name: (x.out_features, x.in_features) for x in self.layers}

    @property
    def local_bytes(self) -> int:
        """Of the parameters that stay on the client. A tied head is the embedding, and stays."""
        remote = {f"{x.module}.weight" for x in self.layers}
        return sum(x.nbytes for name, x in self.model.named_parameters() if name not in remote)


def config_folder(model: str, revision: str | None) -> Path:
    """The folder with a model's configuration: a local one, or one with nothing but that from the hub.

    Raises:
        CheckpointError: there is none, or the hub can't be reached.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or model.startswith("."):
        raise CheckpointError(f"there is no folder {model}")
    try:
        return Path(hf_hub_download(model, "config.json", revision=revision)).parent
    except (HfHubHTTPError, LocalEntryNotFoundError, EntryNotFoundError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{model} is neither a local folder nor a model whose config.json the Hugging Face hub gave "
            f"(revision {revision or 'main'}): {' '.join(str(error).split())[:300]}"
        ) from error


def skeleton_of(folder: Path, task: Task, head: Head, dtype: torch.dtype) -> Skeleton:
    """Builds a model from its configuration alone.

    Args:
        folder: holds config.json; weights are not looked for.
        task: ``auto`` goes by the architecture that the configuration names.
        head: where the output head is computed.
        dtype: of the parameters.

    Raises:
        CheckpointError: the configuration can't be read, or no model can be built with it.
        UnsupportedError: the protocol cannot serve the model, or it can't be trained for the task.
    """
    config = supported_config(folder)
    chosen = _task(config) if task == "auto" else task
    loader: Any = AutoModelForCausalLM
    if chosen == "classification":
        loader = AutoModelForSequenceClassification
    if type(config) not in loader._model_mapping:
        raise UnsupportedError(f"a {config.model_type} model can't be trained for the task {chosen}")
    try:
        with torch.device("meta"):
            model: PreTrainedModel = loader.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # a setting of the wrong size leads to errors of any kind
        what = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"no model can be built from the config.json in {folder} ({type(error).__name__}: {what})"
        ) from error
    found = frozen_layers(model, model.state_dict())
    layers = [x for x in found if not x.head or head_is_remote(x, head)]
    if not layers:
        raise UnsupportedError(f"a {config.model_type} model has no frozen linear layers for workers")
    return Skeleton(model, layers, sum(x.out_features * x.in_features for x in found))


def _task(config: PretrainedConfig) -> Task:
    architecture = next(iter(config.architectures or []), None)
    if architecture is None:
        return "instructions" if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else "classification"
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return "instructions" if architecture in causal else "classification"
