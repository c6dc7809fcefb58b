"""What the tensors of quantized checkpoints stand for, by the kinds that people download.

A decoder knows which tensors belong to a weight, and makes float32 numbers of them, as the library does that
wrote them: then nothing is lost, and a checkpoint in NF4 that is served as `nf4` has the codes that it had.
No decoder needs a GPU or runs code of a checkpoint.
"""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from blindtune.errors import CheckpointError, UnsupportedError
from blindtune.protocol.nf4 import unpacked

__all__ = ["STORAGE", "Decoder", "decoder_of"]

STORAGE = ("quantization_config", "compression_config")
"""What a configuration says of how numbers are stored, by either name."""

Tensors = Mapping[str, torch.Tensor]

_WEIGHT = ".weight"
_OTHERWISE = (
    "name the checkpoint in full precision that it was made from, or one in bitsandbytes' four or eight bits"
)


class Decoder(ABC):
    """Makes weights of stored tensors.

    Attributes:
        kind: what messages call it.
    """

    kind: str

    @abstractmethod
    def parts(self, keys: Iterable[str]) -> dict[str, list[str]]:
        """The quantized weights among a checkpoint's keys, and all tensors that each is made of."""

    @abstractmethod
    def decode(self, key: str, tensors: Tensors) -> torch.Tensor:
        """A weight, float32 [out, in].

        Args:
            key: of the weight.
            tensors: its parts.

        Raises:
            ValueError: they don't fit each other.
        """


def _beside(keys: Iterable[str], mark: str, names: Iterable[str]) -> dict[str, list[str]]:
    """Weights with a tensor beside them whose key is the weight's, less ``weight``, and a mark."""
    stored = set(keys)
    found = {}
    for key in stored:
        if key.endswith(_WEIGHT) and (stem := key.removesuffix("weight")) + mark in stored:
            found[key] = [key, *(stem + x for x in names if stem + x in stored)]
    return found


class _BitsAndBytes4(Decoder):
    """NF4 and FP4, nested or not, in blocks of any size."""

    kind = "bitsandbytes 4-bit"
    _STATE = ".quant_state.bitsandbytes__"
    _NAMES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")

    def parts(self, keys: Iterable[str]) -> dict[str, list[str]]:
        stored = set(keys)
        found: dict[str, list[str]] = {}
        for state in stored:
            key, mark, _ = state.partition(self._STATE)
            if mark and key in stored:
                names = (f"{key}.{x}" for x in self._NAMES)
                found[key] = [key, state, *(x for x in names if x in stored)]
        return found

    def decode(self, key: str, tensors: Tensors) -> torch.Tensor:
        functional = _functional()
        sides = {x.removeprefix(f"{key}."): tensor for x, tensor in tensors.items() if x != key}
        state = functional.QuantState.from_dict(sides, torch.device("cpu"))
        packed = tensors[key].contiguous().view(torch.uint8).reshape(-1, 1)
        count, block = prod(state.shape), state.blocksize
        if len(state.shape) != 2 or min(state.shape) < 1 or len(packed) != -(-count // 2):
            raise ValueError(
                f"{len(packed)} bytes are not the codes of a matrix of shape {tuple(state.shape)}"
            )
        if block not in (32, 64, 128, 256, 512, 1024, 2048, 4096) or len(state.absmax) != -(-count // block):
            raise ValueError(f"{len(state.absmax)} scales do not fit {count} numbers in blocks of {block}")
        if len(state.code) != 16 or state.code.dtype != torch.float32:
            raise ValueError("its table does not have sixteen float32 values")
        expected = functional.get_4bit_type(state.quant_type, device="cpu")
        if not torch.equal(state.code, expected):
            raise ValueError(f"its table is not that of {state.quant_type}")
        absmax = state.absmax
        if state.nested:
            scales = state.state2
            if absmax.dtype != torch.uint8 or len(scales.absmax) != -(-len(absmax) // scales.blocksize):
                raise ValueError("its nested scales do not fit")
            if scales.code.shape != (256,) or scales.absmax.dtype != torch.float32:
                raise ValueError("its nested table does not have 256 values")
            # In torch's operations, which are those of the library: table, scale, offset.
            scale = scales.absmax.repeat_interleave(scales.blocksize)[: len(absmax)]
            absmax = scales.code[absmax.long()] * scale + state.offset
        if absmax.dtype != torch.float32:
            raise ValueError(f"its scales are {absmax.dtype}")
        # Not by the library's kernel, which errs where a vector has elements of two blocks (0.50, AVX-512).
        codes = unpacked(packed.flatten())[:count]
        return (state.code[codes] * absmax.repeat_interleave(block)[:count]).view(*state.shape)


class _BitsAndBytes8(Decoder):
    """LLM.int8(): a byte a weight and a scale for each output."""

    kind = "bitsandbytes 8-bit"

    def parts(self, keys: Iterable[str]) -> dict[str, list[str]]:
        return _beside(keys, "SCB", ("SCB", "weight_format"))

    def decode(self, key: str, tensors: Tensors) -> torch.Tensor:
        stem, integers = key.removesuffix("weight"), tensors[key]
        scales, layout = tensors[stem + "SCB"], tensors.get(stem + "weight_format")
        if integers.dtype != torch.int8 or integers.dim() != 2 or scales.shape != integers.shape[:1]:
            raise ValueError(
                f"{len(scales)} scales do not fit {integers.dtype} of shape {tuple(integers.shape)}"
            )
        if layout is not None and int(layout) != 0:
            raise ValueError("its rows are in an order for certain GPUs")
        return _functional().int8_vectorwise_dequant(integers, scales.float()).float()


class _Fp8Blocks(Decoder):
    """FP8 with one scale for each block, as of DeepSeek and Qwen.

    Args:
        block: rows and columns of a block.
    """

    kind = "block-scaled FP8"

    def __init__(self, block: tuple[int, int]) -> None:
        self._block = block

    def parts(self, keys: Iterable[str]) -> dict[str, list[str]]:
        return _beside(keys, "weight_scale_inv", ("weight_scale_inv", "input_scale", "activation_scale"))

    def decode(self, key: str, tensors: Tensors) -> torch.Tensor:
        numbers, scales = tensors[key], tensors[key.removesuffix("weight") + "weight_scale_inv"].float()
        rows, columns = self._block
        if numbers.dtype != torch.float8_e4m3fn or numbers.dim() != 2:
            raise ValueError(f"it is {numbers.dtype} of shape {tuple(numbers.shape)}, and no FP8 matrix")
        if scales.shape != (-(-numbers.shape[0] // rows), -(-numbers.shape[1] // columns)):
            raise ValueError(f"scales of shape {tuple(scales.shape)} do not fit blocks of {rows} x {columns}")
        wide = scales.repeat_interleave(rows, 0)[: numbers.shape[0]].repeat_interleave(columns, 1)
        return numbers.float() * wide[:, : numbers.shape[1]]


def _functional() -> Any:
    # It says that it misses a package of kernels that nobody asked for.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional


def decoder_of(folder: Path) -> Decoder | None:
    """What decodes a checkpoint's weights, by its configuration; None for one in full precision.

    Raises:
        CheckpointError: the configuration cannot be read, or says nothing that makes sense.
        UnsupportedError: it is quantized in a way that is not known here.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_bytes())
        said = next((settings[name] for name in STORAGE if settings.get(name)), None)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder} has no usable config.json: {str(error)[:300]}") from error
    if said is None:
        return None
    if not isinstance(said, dict):
        raise CheckpointError(f"{path}: quantization_config is no mapping")
    method = said.get("quant_method") or ("bitsandbytes" if said.get("load_in_4bit") else None)
    if method == "bitsandbytes" and said.get("load_in_4bit"):
        return _BitsAndBytes4()
    if method == "bitsandbytes" and said.get("load_in_8bit"):
        return _BitsAndBytes8()
    if method == "fp8":
        block = said.get("weight_block_size")
        if isinstance(block, list) and len(block) == 2 and all(type(x) is int and x > 0 for x in block):
            return _Fp8Blocks((block[0], block[1]))
        method = f"fp8 with weight_block_size {block}"
    raise UnsupportedError(
        f"the checkpoint in {folder} is already quantized with {str(method)[:80]}, which is not read here: "
        f"{_OTHERWISE}"
    )
