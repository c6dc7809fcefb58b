"""A checkpoint names the digest of every file in it, so that no change of one goes unnoticed.

What a library reads from a damaged file is often a number like any other, and training would go on from it.
Nothing here imports the libraries that train, so that who only verifies does not wait for them.
"""

import hashlib
import json
from pathlib import Path

from blindtune.client.process.disk import file_written_at_once
from blindtune.client.record.adapter import DIGESTS, step_of
from blindtune.errors import CheckpointError

__all__ = ["differences", "require_whole", "write_digests"]

_REMEDY = (
    "restore it from a copy; or delete it and the checkpoints after it, and the run goes on from the one "
    "before, or from its start"
)
_SHOWN = 3


def write_digests(checkpoint: Path) -> None:
    """Writes down of what a checkpoint consists, when all else of it is written.

    Args:
        checkpoint: its folder, with the name that it will have.
    """
    content = {"step": step_of(checkpoint), "files": _digests(checkpoint)}
    text = json.dumps(content, indent=1) + "\n"
    file_written_at_once(checkpoint / DIGESTS, lambda file: file.write(text.encode()))


def require_whole(checkpoint: Path) -> None:
    """Checks that a checkpoint consists of the files that were written, all of them and no others.

    Raises:
        CheckpointError: one was changed, is missing or was added, or the checkpoint is that of another step.
    """
    wrong = differences(checkpoint)
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise CheckpointError(f"{checkpoint} is damaged: {', '.join(wrong[:_SHOWN])}{more}: {_REMEDY}")


def differences(checkpoint: Path) -> list[str]:
    """In what a checkpoint is not what was written, in words; empty where it is whole."""
    if not (checkpoint / DIGESTS).exists():
        return [f"{DIGESTS} is missing (or an earlier version of blindtune wrote it)"]
    try:
        said = json.loads((checkpoint / DIGESTS).read_text(encoding="utf-8"))
        step, files = said["step"], {**said["files"]}
        found = _digests(checkpoint)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        name = Path(str(getattr(error, "filename", None) or DIGESTS)).name
        return [f"{name} cannot be read ({type(error).__name__})"]
    wrong = [] if step == step_of(checkpoint) else ["it is the checkpoint of another step"]
    for name in sorted(files.keys() | found.keys()):
        if name not in found:
            wrong.append(f"{name} is missing")
        elif name not in files:
            wrong.append(f"{name} was added")
        elif files[name] != found[name]:
            wrong.append(f"{name} was changed")
    return wrong


def _digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every file but that of the digests, by its path in the checkpoint."""
    digests = {}
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        if path.is_dir() or name == DIGESTS:
            continue
        with open(path, "rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
