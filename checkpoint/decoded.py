"""The weights of a checkpoint as numbers, whether it stores them in full precision or quantized.

Everything else sees the keys and tensors of the checkpoint in full precision that it might have been.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from blindtune.checkpoint.decoders import Decoder, decoder_of
from blindtune.checkpoint.files import TensorFiles
from blindtune.errors import CheckpointError

__all__ = ["DecodedTensors", "open_tensors"]


class DecodedTensors(TensorFiles):
    """Tensors of a quantized checkpoint, of which weights are decoded when they are asked for.

    Args:
        folder: of the checkpoint.
        decoder: for what it says of itself.

    Attributes:
        quantized: keys of the weights that are not stored as they are.
    """

    def __init__(self, folder: Path, decoder: Decoder) -> None:
        super().__init__(folder)
        self._decoder = decoder
        self._parts = decoder.parts(self._files)
        if not self._parts:
            raise CheckpointError(
                f"{folder} says that it is quantized ({decoder.kind}), and stores no such weight: restore it"
            )
        self.quantized = self._parts.keys()
        self._sides = {part for key, parts in self._parts.items() for part in parts if part != key}

    def __iter__(self) -> Iterator[str]:
        return (key for key in self._files if key not in self._sides)

    def __contains__(self, key: object) -> bool:
        return key in self._files and key not in self._sides

    def keys_of(self, path: Path) -> list[str]:
        return [key for key in super().keys_of(path) if key in self]

    def get(self, key: str) -> torch.Tensor:
        parts = self._parts.get(key)
        if parts is None:
            return super().get(key)
        stored = {part: TensorFiles.get(self, part) for part in parts}
        try:
            return self._decoder.decode(key, stored)
        except Exception as error:  # libraries raise many types for what is damaged
            what = " ".join(str(error).split())[:300] or type(error).__name__
            raise CheckpointError(
                f"tensor {key} of {self.folder} cannot be decoded as {self._decoder.kind}: {what}"
            ) from error

    def dtype(self, key: str) -> str:
        return "float32" if key in self._parts else super().dtype(key)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.get(key).shape) if key in self._parts else super().shape(key)


def open_tensors(folder: Path) -> TensorFiles:
    """The tensors of a checkpoint, decoded where they are quantized.

    Raises:
        CheckpointError: it holds no weights, or files are damaged.
        UnsupportedError: it is quantized in a way that is not known here.
    """
    decoder = decoder_of(folder)
    return TensorFiles(folder) if decoder is None else DecodedTensors(folder, decoder)
