"""A merged checkpoint's files: weights written as they are made, and the small files beside them.

Libraries save a safetensors file out of a dictionary that holds all of it. The format needs less: the
header (https://github.com/safetensors/safetensors#format) has to know types and shapes, not values.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from blindtune.client.trust.links import require_inside
from blindtune.errors import CheckpointError, UnsupportedError

__all__ = ["copy_tokenizer", "pad_with", "padding_token", "write_tensors"]

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

_VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")
_SETTINGS = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TOKENIZER = (*_VOCABULARY, *_SETTINGS)
_BESIDE = ("generation_config.json", "*.jinja")


def write_tensors(path: Path, shapes: Mapping[str, torch.Tensor], make: Callable[[str], torch.Tensor]) -> int:
    """Writes a safetensors file with one tensor in memory at a time; returns its size in bytes.

    Args:
        path: of the file.
        shapes: type and shape of each tensor, as a tensor on the meta device.
        make: gives a tensor of that type and shape when its turn comes.

    Raises:
        UnsupportedError: a tensor has a type that is not for weights in full precision.
    """
    for key, shape in shapes.items():
        if shape.dtype not in _TYPES:
            raise UnsupportedError(f"tensor {key} is {shape.dtype}: name a base checkpoint in full precision")
    # Wide types first, so that each tensor starts at a multiple of its element size.
    order = sorted(shapes, key=lambda key: -shapes[key].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in order:
        start, end = end, end + shapes[key].nbytes
        header[key] = {
            "dtype": _TYPES[shapes[key].dtype],
            "shape": list(shapes[key].shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for key in order:
            tensor = make(key)
            if (tensor.dtype, tensor.shape) != (shapes[key].dtype, shapes[key].shape):
                raise ValueError(f"{key} is {tensor.dtype} {tuple(tensor.shape)}, unlike its place in {path}")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del tensor  # or it would still be there while the next one is made
        return file.tell()


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a whole tokenizer."""
    return (folder / "tokenizer_config.json").is_file() and any(_matching(folder, _VOCABULARY))


def copy_tokenizer(base: Path, adapter: Path, folder: Path) -> None:
    """Copies the tokenizer, the chat template and the generation settings; the adapter's win.

    A tokenizer that is whole beside the adapter is taken alone: files of the base that it lacks, such as
    special_tokens_map.json, would override its settings.

    Raises:
        ConfigurationError: a file beside the adapter is a link that leads elsewhere.
    """
    for path in _matching(base, _BESIDE if has_tokenizer(adapter) else (*_BESIDE, *_TOKENIZER)):
        shutil.copyfile(path, folder / path.name)
    for path in _matching(adapter, (*_BESIDE, *_TOKENIZER)):
        require_inside(path, adapter)
        shutil.copyfile(path, folder / path.name)


def padding_token(adapter: Path) -> int | None:
    """What the tokenizer beside an adapter pads with; None where there is none.

    Raises:
        CheckpointError: the tokenizer cannot be read.
    """
    if not has_tokenizer(adapter):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=False)
    except Exception as error:  # a damaged file leads to errors of any kind
        what = " ".join(str(error).split())[:300]
        raise CheckpointError(f"the tokenizer in {adapter} cannot be read: {what}; save it again") from error
    number: int | None = tokenizer.pad_token_id
    return number


def pad_with(number: int, settings: dict[str, Any], folder: Path) -> None:
    """Makes a configuration, and the generation settings in a folder, say which token pads texts."""
    settings["pad_token_id"] = number
    if isinstance(text := settings.get("text_config"), dict):
        text["pad_token_id"] = number
    generation = folder / "generation_config.json"
    if generation.is_file():
        content = json.loads(generation.read_text(encoding="utf-8")) | {"pad_token_id": number}
        generation.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
