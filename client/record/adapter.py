"""The files of an adapter and of a run's folder, as a record names them."""

import hashlib
import re
from pathlib import Path

from blindtune.protocol.errors import RecordError

__all__ = ["ADAPTER_FILES", "adapter_digests", "step_of"]

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def adapter_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of an adapter, by their names.

    Raises:
        RecordError: one is not there, or can't be read.
    """
    digests = {}
    for name in ADAPTER_FILES:
        try:
            with open(folder / name, "rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise RecordError(f"cannot read {folder / name}: {error.strerror}") from None
    return digests


def step_of(checkpoint: Path) -> int | None:
    """The step in the name of a checkpoint's folder; None where it is not such a name."""
    found = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(found[1]) if found else None
