"""A checkpoint's frozen layers as integers, one at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from blindtune.checkpoint.decoded import DecodedTensors, open_tensors
from blindtune.checkpoint.files import TensorFiles, resolve
from blindtune.checkpoint.precision import require_full_precision
from blindtune.checkpoint.skeleton import (
    FrozenLayer,
    build_skeleton,
    frozen_layers,
    supported_config,
)
from blindtune.errors import CheckpointError, UnsupportedError
from blindtune.protocol.weights import INT8, IntegerLayer, Scheme

__all__ = ["Checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """The public base model in a folder.

    Attributes:
        folder: where its files are.
        model: the name that the user gave.
        revision: the revision that the user gave.
        config: its configuration.
        layers: its frozen linear layers, each weight once.
        scheme: how their weights become integers.
    """

    folder: Path
    model: str
    revision: str | None
    config: PretrainedConfig
    layers: tuple[FrozenLayer, ...]
    scheme: Scheme

    @classmethod
    def open(cls, model: str | Path, revision: str | None = None, scheme: Scheme = INT8) -> "Checkpoint":
        """Finds a checkpoint and its layers, without reading a weight.

        Raises:
            CheckpointError: there is no such checkpoint, it can't be read, or it is not in full precision.
            UnsupportedError: the protocol cannot serve this kind of model.
        """
        folder = resolve(model, revision)
        config = supported_config(folder)
        skeleton = build_skeleton(config)
        with open_tensors(folder) as tensors:
            require_full_precision(skeleton, tensors)
            found = frozen_layers(skeleton, tensors)
            if isinstance(tensors, DecodedTensors) and any(x.transposed for x in found):
                raise UnsupportedError(
                    f"{model} is quantized and stores weights transposed (Conv1D), whose order is not known "
                    "then: name the checkpoint in full precision that it was made from"
                )
        if not found:
            raise UnsupportedError(f"{model} ({config.model_type}) has no frozen linear layers")
        layers = {layer.name: layer for layer in reversed(found)}
        return cls(folder, str(model), revision, config, tuple(reversed(layers.values())), scheme)

    @contextmanager
    def reader(self) -> Iterator["LayerReader"]:
        """Opens the weight files."""
        with open_tensors(self.folder) as tensors:
            yield LayerReader(tensors, self.scheme)


@dataclass(frozen=True)
class LayerReader:
    """Reads layers out of open weight files."""

    tensors: TensorFiles
    scheme: Scheme

    def read(self, layer: FrozenLayer) -> IntegerLayer:
        """A layer's integers and scales, quantized from the type that the checkpoint stores.

        Raises:
            CheckpointError: the tensor has another shape than the model, or holds no finite numbers.
        """
        weight = self.tensors.get(layer.key)
        where = f"tensor {layer.key} of {self.tensors.folder}"
        expected = (layer.rows.of if layer.rows else layer.out_features, layer.in_features)
        if layer.transposed and weight.dim() == 2:
            weight = weight.t()
        if tuple(weight.shape) != expected:
            raise CheckpointError(f"{where} has shape {tuple(weight.shape)}, but the model needs {expected}")
        if layer.rows:
            weight = weight[layer.rows.start : layer.rows.stop]
        try:
            return self.scheme.quantize(weight)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from error
