"""The files of a checkpoint: where they are, and its tensors one at a time."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from blindtune.checkpoint.pointers import pointer_of
from blindtune.errors import CheckpointError

__all__ = ["TensorFiles", "require_no_pointer", "resolve"]

_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """The folder that holds a checkpoint: a local one, or a snapshot from the Hugging Face hub.

    Raises:
        CheckpointError: there is no such folder, and the hub has no such model or can't be reached.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(model).startswith("."):
        raise CheckpointError(f"there is no checkpoint folder {model}")
    try:
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=_WANTED))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{model} is neither a local folder nor a model that the Hugging Face hub gave "
            f"(revision {revision or 'main'}): {error}"
        ) from error


def require_no_pointer(path: Path) -> None:
    """Refuses the few lines that stand for a large file where it was not fetched.

    Raises:
        CheckpointError: the file is such a pointer. What can't be read is none.
    """
    try:
        pointer = pointer_of(path)
    except OSError:
        return
    if pointer is not None:
        raise CheckpointError(
            f"{path} is a {pointer.kind}, and not the file itself: fetch it with {pointer.command} in that "
            "folder, or download the model again"
        )


class TensorFiles(AbstractContextManager["TensorFiles"]):
    """The tensors of a checkpoint folder, read one at a time and memory-mapped.

    Safetensors files are preferred; PyTorch's pickled files are read without running code in them.

    Raises:
        CheckpointError: the folder holds no weights, or a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}
        self._files = self._find()

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self._open.clear()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, key: object) -> bool:
        return key in self._files

    def get(self, key: str) -> torch.Tensor:
        """A tensor, in the type that the checkpoint stores."""
        path = self._files[key]
        try:
            if path.suffix == ".bin":
                return self._pickled(path)[key]
            return self._safetensors(path).get_tensor(key)
        except (SafetensorError, OSError, KeyError) as error:
            raise CheckpointError(f"cannot read tensor {key} of {path}: {str(error)[:300]}") from error

    def dtype(self, key: str) -> str:
        """The type of a tensor, by torch's name or, where it has none, safetensors'; nothing is read."""
        path = self._files[key]
        try:
            if path.suffix == ".bin":
                return str(self._pickled(path)[key].dtype).removeprefix("torch.")
            code = str(self._safetensors(path).get_slice(key).get_dtype())
        except (SafetensorError, OSError, KeyError) as error:
            raise CheckpointError(f"cannot read tensor {key} of {path}: {str(error)[:300]}") from error
        return _TYPES.get(code, code)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read for it."""
        path = self._files[key]
        try:
            if path.suffix == ".bin":
                return tuple(self._pickled(path)[key].shape)
            return tuple(self._safetensors(path).get_slice(key).get_shape())
        except (SafetensorError, OSError, KeyError) as error:
            raise CheckpointError(f"cannot read tensor {key} of {path}: {str(error)[:300]}") from error

    def paths(self) -> list[Path]:
        """The weight files, each once."""
        return sorted(set(self._files.values()))

    def keys_of(self, path: Path) -> list[str]:
        """The keys of the tensors in one weight file."""
        return [key for key, file in self._files.items() if file == path]

    def _find(self) -> dict[str, Path]:
        for single, index in (_SAFETENSORS, _PICKLED):
            if (self.folder / index).is_file():
                files = self._indexed(self.folder / index)
                missing = {path.name for path in files.values() if not path.is_file()}
                if missing:
                    raise CheckpointError(f"{self.folder} lacks {', '.join(sorted(missing))}")
                return files
            path = self.folder / single
            if path.is_file():
                return dict.fromkeys(self._keys(path), path)
        raise CheckpointError(
            f"{self.folder} holds no weights: expected {' or '.join((*_SAFETENSORS, *_PICKLED))}"
        )

    def _indexed(self, index: Path) -> dict[str, Path]:
        require_no_pointer(index)
        try:
            names = json.loads(index.read_bytes())["weight_map"]
            return {key: self.folder / _plain_name(name) for key, name in names.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{index} is no index of weights: {str(error)[:200]}") from error

    def _keys(self, path: Path) -> list[str]:
        return list(self._pickled(path) if path.suffix == ".bin" else self._safetensors(path).keys())

    def _safetensors(self, path: Path) -> Any:
        if path not in self._open:
            require_no_pointer(path)
            try:
                self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is no safetensors file: {str(error)[:300]}") from error
        return self._open[path]

    def _pickled(self, path: Path) -> Any:
        if path not in self._open:
            require_no_pointer(path)
            try:
                self._open[path] = _tensors(torch.load(path, "cpu", mmap=True, weights_only=True))
            except Exception as error:  # torch raises many types for a damaged file
                what = " ".join(str(error).split())[:300]
                raise CheckpointError(f"{path} cannot be read as PyTorch weights: {what}") from error
        return self._open[path]


def _plain_name(name: Any) -> str:
    """The name of a file in a checkpoint's own folder: an index may not lead out of it."""
    if not isinstance(name, str) or Path(name).name != name or not name.isprintable() or len(name) > 200:
        raise ValueError(f"{str(name)[:100]!r} is no file of this folder")
    return name


def _tensors(content: Any) -> dict[str, torch.Tensor]:
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}, and not tensors by name")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise TypeError(f"it holds a {type(value).__name__} under a {type(key).__name__}")
    return content
