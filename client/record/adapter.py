"""The files of an adapter and of a run's folder, as a record names them."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from blindtune.errors import RecordError

__all__ = ["ADAPTER_FILES", "CHECKPOINT_FILES", "DIGESTS", "digests_of", "step_of"]

DIGESTS = "digests.json"
"""File of a checkpoint with the digests of all others; see `blindtune.client.record.digests`."""

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
CHECKPOINT_FILES = (*ADAPTER_FILES, DIGESTS)


def digests_of(folder: Path, names: Iterable[str] = ADAPTER_FILES) -> dict[str, str]:
    """SHA-256 of some files, those of an adapter by default, by their names.

    Raises:
        RecordError: one is not there, or can't be read.
    """
    digests = {}
    for name in names:
        try:
            with open(folder / name, "rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise RecordError(f"cannot read {folder / name}: {error.strerror}") from None
    return digests


def step_of(checkpoint: Path) -> int | None:
    """The step in the name of a checkpoint's folder; None where it is not such a name."""
    found = re.fullmatch(r"checkpoint-(0|[1-9][0-9]*)", checkpoint.name)
    return int(found[1]) if found else None
