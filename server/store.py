"""The frozen layers that a worker holds: int8 matrices in the memory of one device."""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from blindtune.checkpoint import Checkpoint
from blindtune.errors import ConfigurationError, ResourceError
from blindtune.protocol.kernels.allocator import give_back_freed_memory
from blindtune.protocol.multiplication.exactness import exact_method
from blindtune.protocol.multiplication.four_bit_matrix import FourBitMatrix
from blindtune.protocol.multiplication.layer_memory import LayerMemory
from blindtune.protocol.multiplication.methods import Method
from blindtune.protocol.multiplication.multiplier import Layer, Multiplier
from blindtune.protocol.parameters import PARAMETER_SETS
from blindtune.protocol.products import contraction_lengths
from blindtune.protocol.weights import INT8, IntegerLayer, Scheme, model_fingerprint
from blindtune.server.memory import Available, available_bytes, memory_needed, require_memory

__all__ = ["LayerStore", "StoredLayer", "layer_fingerprints"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """A frozen layer as a worker keeps it. Its scales are the client's business, but for four-bit codes.

    Attributes:
        integers: int8 [out_features, in_features], on the store's device, or the codes that it is kept as.
        fingerprint: over integers and scales.
    """

    integers: Layer
    fingerprint: str

    @property
    def out_features(self) -> int:
        return self.integers.shape[0]

    @property
    def in_features(self) -> int:
        return self.integers.shape[1]


@dataclass(frozen=True, eq=False)
class LayerStore:
    """Layers, and a way to multiply by them that was seen to be exact here.

    Attributes:
        model: name of the model, as the manifest states it.
        revision: empty for a local checkpoint.
        fingerprint: of the whole checkpoint, also when only some of its layers are held.
        layers: those that are held, by name.
        methods: how products are computed on this device, for each parameter set.
        scheme: how the weights became integers.
        contractions: the contraction lengths at which they were checked; no others are served.
    """

    model: str
    revision: str
    fingerprint: str
    layers: Mapping[str, StoredLayer]
    methods: tuple[Method, ...]
    contractions: frozenset[int]
    scheme: Scheme

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        device: torch.device | str = "cpu",
        *,
        held: Collection[str] | None = None,
        available: Available = available_bytes,
        workspace: int = 0,
    ) -> "LayerStore":
        """Reads a checkpoint's frozen layers, one at a time.

        Args:
            checkpoint: opened, not yet read.
            device: where the integers go.
            held: names of the layers to keep; all of them unless given.
            available: tells how much memory a device has left.
            workspace: bytes that must be left for requests, see `blindtune.server.rows.workspace_bytes`.

        Raises:
            CheckpointError: a layer can't be read.
            ConfigurationError: ``held`` names a layer that there is not, or the device cannot multiply.
            ResourceError: memory does not suffice.
        """
        device = torch.device(device)
        unknown = set(held or ()) - {layer.name for layer in checkpoint.layers}
        if unknown:
            raise ConfigurationError(f"{checkpoint.model} has no frozen layer {min(unknown)}")
        kept = [layer for layer in checkpoint.layers if held is None or layer.name in held]
        require_memory(memory_needed(kept, device, workspace, checkpoint.scheme), available, workspace)
        local = checkpoint.folder == Path(checkpoint.model)
        return cls.from_layers(
            _read(checkpoint),
            device,
            model=checkpoint.folder.resolve().name if local else checkpoint.model,
            revision="" if local else checkpoint.revision or "main",
            held=held,
            scheme=checkpoint.scheme,
        )

    @classmethod
    def from_layers(
        cls,
        layers: Iterable[tuple[str, IntegerLayer]],
        device: torch.device | str = "cpu",
        *,
        model: str,
        revision: str = "",
        held: Collection[str] | None = None,
        scheme: Scheme = INT8,
    ) -> "LayerStore":
        """Keeps integer layers as they come by; ``layers`` must be all of the model's.

        Raises:
            ConfigurationError: no product is exact on this device.
            ResourceError: the device's memory does not suffice.
        """
        device = torch.device(device)
        memory = LayerMemory() if device.type == "cpu" else None
        stored: dict[str, StoredLayer] = {}
        fingerprints: dict[str, str] = {}
        for name, layer in layers:
            fingerprints[name] = layer.fingerprint()
            if held is None or name in held:
                try:
                    stored[name] = StoredLayer(_kept(layer, memory, device), fingerprints[name])
                except (torch.OutOfMemoryError, MemoryError) as error:
                    raise ResourceError(
                        f"{device} ran out of memory at layer {name} ({len(stored)} layers are loaded)"
                    ) from error
        contractions = contraction_lengths((x.out_features, x.in_features) for x in stored.values())
        try:
            methods = tuple(
                exact_method(contractions, parameters, device, log=_logger.warning)
                for parameters in PARAMETER_SETS.values()
            )
        except RuntimeError as error:
            raise ConfigurationError(f"{error}: use another --device or machine") from error
        # Each layer was a matrix of floating point numbers, several times as large as what is kept of it.
        give_back_freed_memory()
        _logger.info(
            "products are exact",
            extra={
                "method": _method_names(methods),
                "device": str(device),
                "contractions": len(contractions),
            },
        )
        return cls(model, revision, model_fingerprint(fingerprints), stored, methods, contractions, scheme)

    def multiplier(self) -> Multiplier:
        """Multiplies by the layers that are held."""
        return Multiplier({name: layer.integers for name, layer in self.layers.items()}, *self.methods)

    @property
    def product_method(self) -> str:
        """How products are computed, in words."""
        return _method_names(self.methods)


def _method_names(methods: Iterable[Method]) -> str:
    """The name of methods that have the same, else of each with its parameter set."""
    names = {method.parameters.name: method.name for method in methods}
    if len(set(names.values())) == 1:
        return next(iter(names.values()))
    return ", ".join(f"{method} ({parameters})" for parameters, method in names.items())


def _kept(layer: IntegerLayer, memory: LayerMemory | None, device: torch.device) -> Layer:
    """What stays of a layer.

    Raises:
        ConfigurationError: four-bit codes do not give its integers on this machine.
    """
    if layer.four_bit is None:
        return memory.keep(layer.integers) if memory else layer.integers.to(device)
    matrix = FourBitMatrix(layer.four_bit, layer.scales, device)
    everything = slice(0, layer.in_features)
    for rows in matrix.pieces(layer.out_features, layer.in_features):
        # Seen, and not believed: what was compiled here, or runs on a GPU, may round otherwise.
        if not torch.equal(matrix.integers(rows, everything).cpu(), layer.integers[rows]):
            raise ConfigurationError(
                f"four-bit codes do not give the right integers on {device}: use another --device or "
                "machine, or --quantization int8"
            )
    return matrix


def layer_fingerprints(checkpoint: Checkpoint) -> dict[str, str]:
    """The fingerprint of each frozen layer, read one at a time and not kept.

    Raises:
        CheckpointError: a layer can't be read.
    """
    return {name: layer.fingerprint() for name, layer in _read(checkpoint)}


def _read(checkpoint: Checkpoint) -> Iterator[tuple[str, IntegerLayer]]:
    """All frozen layers in turn; progress is logged about ten times."""
    count = len(checkpoint.layers)
    with checkpoint.reader() as reader:
        for index, layer in enumerate(checkpoint.layers, 1):
            yield layer.name, reader.read(layer)
            if index * 10 // count != (index - 1) * 10 // count:
                _logger.info("reading layers", extra={"done": index, "of": count})
