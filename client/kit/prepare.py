"""Making a kit: one pass over the client's own copy of the public checkpoint, a layer at a time."""

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file as save_tensors

from blindtune.checkpoint import Checkpoint, FrozenLayer
from blindtune.checkpoint.decoded import open_tensors
from blindtune.checkpoint.decoders import STORAGE
from blindtune.checkpoint.files import TensorFiles
from blindtune.client.kit.head import Head, head_is_remote
from blindtune.client.kit.kit import (
    ARRAYS,
    DESCRIPTION,
    KIT_FOLDER,
    KIT_VERSION,
    SECRET,
    Kit,
    KitDescription,
    LayerDescription,
    file_sha256,
    is_kit,
    kit_files,
    vectors_name,
)
from blindtune.client.process.disk import folder_written_at_once, write_private
from blindtune.errors import ConfigurationError, KitError
from blindtune.protocol.certificate.words import images
from blindtune.protocol.certificate.words import secret_words as certificate_words
from blindtune.protocol.expansion import KEY_BYTES
from blindtune.protocol.parameters import PARAMETER_SETS
from blindtune.protocol.products import MAX_CONTRACTION, Direction
from blindtune.protocol.verification import check_vectors, secret_vectors
from blindtune.protocol.weights import INT8, IntegerLayer, Scheme, model_fingerprint

__all__ = [
    "Progress",
    "cached_kit",
    "cached_whole_kit",
    "fingerprint",
    "kit_bytes",
    "kit_folder",
    "kit_of",
    "prepare",
]

_logger = logging.getLogger(__name__)

Progress = Callable[[Iterable[FrozenLayer]], Iterable[FrozenLayer]]
"""Wraps the layers to show progress as they are consumed."""

_COPIED = ("*.json", "*.txt", "*.model", "*.jinja")
_NOT_COPIED = ("*.index.json",)


def prepare(
    checkpoint: Checkpoint, destination: Path, head: Head = "auto", progress: Progress = lambda x: x
) -> Kit:
    """Writes a kit that ``from_pretrained`` accepts in place of the checkpoint.

    Besides what `Kit` reads it holds the configuration, the tokenizer and every parameter that stays on
    the client. Nothing appears at the destination until all of it is written.

    Raises:
        ConfigurationError: the destination exists and is not an empty folder.
        ResourceError: the disk is full.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConfigurationError(f"{destination} exists and is not empty: choose another output folder")
    with folder_written_at_once(destination) as folder:
        for pattern in _COPIED:
            for path in checkpoint.folder.glob(pattern):
                if path.is_file() and not any(path.match(x) for x in _NOT_COPIED):
                    shutil.copyfile(path, folder / path.name)
        _say_nothing_of_storage(folder / "config.json")
        remote = _not_in_the_kit(checkpoint, head)
        with open_tensors(checkpoint.folder) as tensors:
            stay = {key: tensors.get(key).contiguous() for key in tensors if key not in remote}
            save_tensors(_unshared(stay), folder / "model.safetensors", {"format": "pt"})
        del stay
        _write(checkpoint, folder, progress)
    return Kit.open(destination)


def _say_nothing_of_storage(path: Path) -> None:
    """A kit's tensors are numbers as they stand, whatever the checkpoint's configuration says of its own."""
    settings = json.loads(path.read_bytes())
    if any(settings.pop(name, None) for name in STORAGE):
        path.write_text(json.dumps(settings, indent=2) + "\n")


def fingerprint(checkpoint: Checkpoint, progress: Progress = lambda x: x) -> str:
    """The fingerprint of a checkpoint's frozen layers, which takes a pass over all of them."""
    with checkpoint.reader() as reader:
        return model_fingerprint({x.name: reader.read(x).fingerprint() for x in progress(checkpoint.layers)})


def kit_bytes(checkpoint: Checkpoint, head: Head) -> int:
    """About how large a kit will be: parameters that stay here, and what is kept of each layer."""
    remote = _not_in_the_kit(checkpoint, head)
    with open_tensors(checkpoint.folder) as tensors:
        stay = sum(tensors.get(key).nbytes for key in tensors if key not in remote)
    vectors = sum((36 + 4) * x.out_features + (36 + 12) * x.in_features for x in checkpoint.layers)
    return stay + vectors


def _not_in_the_kit(checkpoint: Checkpoint, head: Head) -> set[str]:
    """Keys of the weights that only workers need; a tied head is the embedding, which stays."""
    remote = {layer.key for layer in checkpoint.layers if not layer.head}
    return remote | {x.key for x in checkpoint.layers if x.head and head_is_remote(x, head) and not x.tied}


def cached_kit(checkpoint: Checkpoint, cache: Path | None = None, progress: Progress = lambda x: x) -> Kit:
    """The kit of a checkpoint on this machine, made at first use.

    A damaged one is made again. It has no model parameters of its own: ``from_pretrained`` reads those
    from the checkpoint.
    """
    folder = _cached_kit_folder(checkpoint, cache)

    def make() -> None:
        with folder_written_at_once(folder) as unfinished:
            _write(checkpoint, unfinished, progress)

    return _from_cache(folder, make)


def cached_whole_kit(
    checkpoint: Checkpoint, head: Head, cache: Path | None = None, progress: Progress = lambda x: x
) -> Kit:
    """What `prepare` makes of a checkpoint on this machine, made at first use.

    For quantized checkpoints, which ``from_pretrained`` would not read as what they stand for.
    """
    folder = _cached_kit_folder(checkpoint, cache)
    folder = folder.with_name(f"{folder.name}-whole-{head}")
    return _from_cache(folder, lambda: prepare(checkpoint, folder, head, progress))


def _from_cache(folder: Path, make: Callable[[], object]) -> Kit:
    if folder.exists():
        try:
            return Kit.open(folder)
        except KitError as error:
            _logger.warning("making the cached kit again: %s", error)
            # Moved out of the way first: another process may be about to put a good one in its place.
            damaged = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
            os.replace(folder, damaged)
            shutil.rmtree(damaged)
    make()
    return Kit.open(folder)


def _cached_kit_folder(checkpoint: Checkpoint, cache: Path | None = None) -> Path:
    root = cache or Path(os.environ.get("BLINDTUNE_CACHE", Path.home() / ".cache" / "blindtune"))
    with TensorFiles(checkpoint.folder) as tensors:
        identity = [f"{KIT_VERSION} {checkpoint.scheme.identifier}"]
        for path in tensors.paths():
            stat = path.stat()
            identity.append(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}")
    identity += sorted(layer.name for layer in checkpoint.layers)
    return root / "kits" / hashlib.sha256("\n".join(identity).encode()).hexdigest()[:32]


def kit_folder(folder: Path, scheme: Scheme = INT8) -> Path | None:
    """Where the kit of a checkpoint folder is, which may be that folder; None as long as it is not made."""
    if is_kit(folder):
        return folder
    cached = _cached_kit_folder(Checkpoint.open(folder, scheme=scheme))
    return cached if cached.exists() else None


def kit_of(folder: Path, progress: Progress = lambda x: x, scheme: Scheme = INT8) -> Kit:
    """The kit that a folder is, or the one of the checkpoint that it holds.

    Raises:
        ConfigurationError: the folder is a kit of another scheme.
    """
    if not is_kit(folder):
        return cached_kit(Checkpoint.open(folder, scheme=scheme), progress=progress)
    kit = Kit.open(folder)
    if kit.scheme is not scheme:
        raise ConfigurationError(
            f"the kit in {folder} is for quantization {kit.scheme.name}, and {scheme.name} is configured: "
            f"configure {kit.scheme.name}, or make the kit again with --quantization {scheme.name}"
        )
    return kit


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies tensors that share memory, which safetensors refuses to save."""
    seen: set[int] = set()
    for key, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[key] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors


@dataclass(frozen=True)
class _Bounds:
    """Sums of a layer's integers, for each span of the contraction."""

    row: NDArray[np.int32]  # forward: [input spans, out]
    column: NDArray[np.int64]  # backward: [output spans, in]


def _bounds(integers: torch.Tensor, power: int) -> _Bounds:
    """Sums of magnitudes (power 1) or squares (power 2), exact: 127^2 * 2^17 terms fit int32."""
    out_features, in_features = integers.shape
    rows = np.zeros((-(-in_features // MAX_CONTRACTION), out_features), np.int32)
    columns = np.zeros((-(-out_features // MAX_CONTRACTION), in_features), np.int64)
    step = max(1, (1 << 24) // in_features)
    for start in range(0, out_features, step):
        block = integers[start : start + step].to(torch.int32).abs_().pow_(power)
        for i in range(len(rows)):
            span = block[:, i * MAX_CONTRACTION : (i + 1) * MAX_CONTRACTION]
            rows[i, start : start + len(block)] = span.sum(dim=1).numpy()
        first, last = start // MAX_CONTRACTION, (start + len(block) - 1) // MAX_CONTRACTION
        for o in range(first, last + 1):
            span = block[max(0, o * MAX_CONTRACTION - start) : (o + 1) * MAX_CONTRACTION - start]
            columns[o] += span.sum(dim=0).numpy()
    return _Bounds(rows, columns)


def _layer_arrays(name: str, layer: IntegerLayer, secret: bytes) -> dict[str, np.ndarray]:
    squares, magnitudes = _bounds(layer.integers, 2), _bounds(layer.integers, 1)
    arrays: dict[str, np.ndarray] = {
        "scales": layer.scales,
        "row_squares": squares.row,
        "column_squares": squares.column,
        "row_magnitudes": magnitudes.row.max(axis=1),
        "column_magnitudes": magnitudes.column,
    }
    for direction in Direction:
        features = layer.out_features if direction is Direction.FORWARD else layer.in_features
        for parameters in PARAMETER_SETS.values():
            s = secret_vectors(secret, name, direction, features, parameters)
            arrays[vectors_name(direction, parameters)] = check_vectors(
                layer.integers, s, direction, parameters
            )
        words = certificate_words(secret, name, direction, features)
        for image in images(layer.integers, words, direction):
            arrays[f"{direction.name.lower()}_{image.dtype.name}"] = image
    return {f"{name}:{what}": array for what, array in arrays.items()}


def _write(checkpoint: Checkpoint, folder: Path, progress: Progress) -> None:
    """Writes the folder ``blindtune/`` of a kit."""
    inside = folder / KIT_FOLDER
    inside.mkdir(mode=0o700)
    secret = os.urandom(KEY_BYTES)
    write_private(inside / SECRET, secret)
    arrays: dict[str, np.ndarray] = {}
    layers: dict[str, LayerDescription] = {}
    with checkpoint.reader() as reader:
        for layer in progress(checkpoint.layers):
            integer_layer = reader.read(layer)
            arrays |= _layer_arrays(layer.name, integer_layer, secret)
            layers[layer.name] = LayerDescription(
                out_features=layer.out_features,
                in_features=layer.in_features,
                fingerprint=integer_layer.fingerprint(),
                head=layer.head,
            )
    write_private(inside / ARRAYS, b"")
    save_arrays(arrays, inside / ARRAYS)
    (inside / ARRAYS).chmod(0o600)
    head_included = not (folder / "model.safetensors").exists() or _holds_head(checkpoint, folder)
    description = KitDescription(
        model=checkpoint.model,
        revision=checkpoint.revision,
        scheme=checkpoint.scheme.identifier,
        fingerprint=model_fingerprint({name: x.fingerprint for name, x in layers.items()}),
        layers=layers,
        head_included=head_included,
        arrays_sha256=file_sha256(inside / ARRAYS),
        secret_sha256=hashlib.sha256(secret).hexdigest(),
        files={name: file_sha256(folder / name) for name in kit_files(folder)},
    )
    description = description.model_copy(update={"keyed_digest": description.digest(secret)})
    (inside / DESCRIPTION).write_text(description.model_dump_json(indent=1) + "\n")


def _holds_head(checkpoint: Checkpoint, folder: Path) -> bool:
    with TensorFiles(folder) as tensors:
        return all(layer.key in tensors for layer in checkpoint.layers if layer.head)
