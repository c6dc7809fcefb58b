"""What the bodies of entries must say, so that a record can be checked against other things.

A body may say more. Its form is checked when a record is read: a signature shows who wrote an entry, and not
that it makes sense.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = ["KINDS", "HexDigest", "malformed"]

HexDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Files = dict[str, HexDigest]


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class _Split(_Body):
    records: int = Field(ge=0)
    root: HexDigest
    sorted_root: HexDigest


class _Data(_Body):
    train: _Split
    validation: _Split | None


class _Model(_Body):
    fingerprint: str


class _Configuration(_Body):
    commitment: HexDigest


class _Start(_Body):
    model: _Model
    configuration: _Configuration
    data: _Data
    salt_sha256: HexDigest
    tag_key_sha256: HexDigest


class _Checkpoint(_Body):
    step: int = Field(ge=0)
    files: _Files


class _Torn(_Body):
    size: int
    sha256: HexDigest


class _Resume(_Body):
    fingerprint: str
    checkpoint: _Checkpoint | None
    configuration: HexDigest | None
    data: _Data | None
    torn: _Torn | None


class _Worker(_Body):
    operator: str
    worker: str
    event: str


class _Finish(_Body):
    adapter: _Files
    steps: int = Field(ge=0)
    verified_responses: int = Field(ge=0)
    lies: int = Field(ge=0)


class _End(_Body):
    exit_code: int
    error: str
    step: int = Field(ge=0)


_BODIES: dict[str, type[_Body]] = {
    "start": _Start,
    "resume": _Resume,
    "checkpoint": _Checkpoint,
    "worker": _Worker,
    "finish": _Finish,
    "interrupted": _End,
    "failed": _End,
}
KINDS = tuple(_BODIES)


def malformed(kind: str, body: Mapping[str, Any]) -> str | None:
    """The first field of a body that is missing or of the wrong form; None where all are right."""
    try:
        _BODIES[kind].model_validate(body)
    except ValidationError as error:
        return ".".join(map(str, error.errors()[0]["loc"]))
    return None
