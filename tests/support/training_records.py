"""Records for tests: a key, and chains of entries without a run."""

from pathlib import Path
from typing import Any

from blindtune.client.record.commitment import Salt
from blindtune.client.record.keys import RecordKey
from blindtune.client.record.log import RecordLog

RECORD = "ab" * 16
DIGESTS = [bytes([i]) * 32 for i in range(7)]
FILES = {"adapter_config.json": "1" * 64, "adapter_model.safetensors": "2" * 64}
FINISH = {"adapter": FILES, "steps": 4, "verified_responses": 12, "lies": 0}
END = {"exit_code": 130, "error": "InterruptedRunError", "step": 3}


def start(salt: Salt, digests: list[bytes] = DIGESTS) -> dict[str, Any]:
    """The body of a first entry, of as little as is needed."""
    return {
        "model": {"fingerprint": "f" * 64},
        "configuration": {"commitment": "0" * 64},
        "data": {"train": vars(salt.split("train", digests)), "validation": None},
        "salt_sha256": salt.digest,
        "tag_key_sha256": salt.tag_key_digest,
    }


def checkpoint(step: int) -> dict[str, Any]:
    """The body of an entry about a checkpoint."""
    return {"step": step, "files": FILES}


def written(folder: Path, key: RecordKey, salt: Salt, *, record: str = RECORD, finished: bool = True) -> Path:
    """A record of four checkpoints."""
    log = RecordLog(folder / f"{record}.jsonl", key, record, None)
    log.append("start", start(salt))
    for step in range(1, 5):
        log.append("checkpoint", checkpoint(step))
    if finished:
        log.append("finish", FINISH)
    return log.path
