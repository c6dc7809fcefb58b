"""The operators that a user trusts, in a file of the user's own.

    FOLDER/operators.yaml      FOLDER being the user's own, see `blindtune.client.process.settings`

    insecure: false            written by hand, if at all; so is allow_one_machine
    trusted:                   operators that runs of this user's own recipes have used, together
      - masking: shares
        operators: [{name, workers, ca, cert, key, token, ca_sha256}, ...]
    kits: [FOLDER, ...]        client kits that they have used: who made one can have wrong answers pass

Operators are trusted as a set: those that do not collude with each other in `shares` are.
"""

import hashlib
import os
import stat
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from pydantic import Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from blindtune.client.process.disk import disk_errors_are_clear, file_written_at_once
from blindtune.client.process.settings import settings_folder
from blindtune.client.recipe.schema import FilePath, OperatorSection, Section
from blindtune.client.tls.files import public_keys
from blindtune.errors import ConfigurationError

__all__ = ["Circle", "TrustList", "are_the_same", "circle_of", "enter", "trust_file", "trust_list"]

_HEADER = """\
# Operators that runs of your own recipes have used. blindtune train adds to them, and blindtune trust does.
# eval and generate of an output folder, and train of the recipe in one, ask no others: delete what you no
# longer trust. Trials may have insecure: true or allow_one_machine: true here; nothing is private then.
"""


class TrustedOperator(OperatorSection):
    """An operator as it was used."""

    ca_sha256: str | None = None


class Circle(Section):
    """Operators that were used together, and how."""

    masking: Literal["shares", "lattice"]
    operators: list[TrustedOperator]

    @property
    def shown(self) -> str:
        """Who they are, for messages."""
        return "; ".join(f"{x.name} at {', '.join(x.workers)}" for x in self.operators)


class TrustList(Section):
    """The content of ``operators.yaml``."""

    insecure: bool = False
    allow_one_machine: bool = False
    trusted: list[Circle] = Field(default_factory=list)
    kits: list[FilePath] = Field(default_factory=list)


def trust_file() -> Path:
    """Where the trusted operators stand."""
    return settings_folder() / "operators.yaml"


def circle_of(masking: str, operators: Sequence[OperatorSection]) -> Circle:
    """Operators as they are now.

    Raises:
        ConfigurationError: a CA can't be read.
    """
    return Circle.model_validate(
        {
            "masking": masking,
            "operators": [{**x.model_dump(), "ca_sha256": _ca_digest(x)} for x in operators],
        }
    )


def enter(circle: Circle, kit: Path | None = None) -> bool:
    """Enters operators, and a kit.

    Returns:
        Whether the operators were not there yet.

    Raises:
        ConfigurationError: the list can't be read or written.
    """
    path = trust_file()
    try:
        with disk_errors_are_clear(path.parent):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(path.with_name(f".{path.name}.lock"), mode=0o600):
                return _entered(path, circle, kit)
    except OSError as error:
        raise ConfigurationError(f"cannot write your trusted operators {path}: {error.strerror}") from None


def are_the_same(one: Circle, other: Circle, digests: bool = True) -> bool:
    """Whether two sets of operators are one to the letter, but for the order.

    Args:
        digests: whether the CAs are compared as well.
    """

    def plain(circle: Circle) -> list[dict[str, Any]]:
        dumped = [x.model_dump(exclude=set() if digests else {"ca_sha256"}) for x in circle.operators]
        return sorted(({**x, "workers": sorted(x["workers"])} for x in dumped), key=lambda x: x["name"])

    return one.masking == other.masking and plain(one) == plain(other)


def _entered(path: Path, circle: Circle, kit: Path | None) -> bool:
    trusted = trust_list()
    known = any(are_the_same(circle, x) for x in trusted.trusted)
    new_kit = kit is not None and kit not in trusted.kits
    if known and not new_kit:
        return False
    round_trip = YAML(typ="rt")  # which keeps what the user wrote, comments too
    document = round_trip.load(path.read_bytes()) if path.exists() else None
    if document is None:
        document = round_trip.load(_HEADER + "trusted: []\n")
        document["trusted"] = []
    if not known:
        entry = circle.model_dump(mode="json", exclude_none=True)
        document["trusted"] = [*(document.get("trusted") or []), entry]
    if new_kit:
        document["kits"] = [*(document.get("kits") or []), str(kit)]
    text = StringIO()
    round_trip.dump(document, text)
    file_written_at_once(path, lambda file: file.write(text.getvalue().encode()))
    return not known


def _ca_digest(operator: OperatorSection) -> str | None:
    """SHA-256 over the public keys of an authority; None without one."""
    if operator.ca is None:
        return None
    keys = sorted(set(public_keys(operator.ca, operator.name)))
    return hashlib.sha256(b"".join(hashlib.sha256(x).digest() for x in keys)).hexdigest()


def trust_list() -> TrustList:
    """The user's; empty where there is none.

    Raises:
        ConfigurationError: it can't be read, or others can write to it.
    """
    path = trust_file()
    try:
        folder = os.stat(path.parent)
        with open(path, "rb") as file:
            state = os.fstat(file.fileno())
            content = file.read()
    except FileNotFoundError:
        return TrustList()
    except OSError as error:
        raise ConfigurationError(f"cannot read your trusted operators {path}: {error.strerror}") from None
    if stat.S_IMODE(folder.st_mode) & 0o022 or folder.st_uid not in (os.geteuid(), 0):
        raise ConfigurationError(
            f"{path} decides who gets your data, and others can exchange it, since they can write to "
            f"{path.parent}: look through it, and make the folder yours alone with chmod 700 and chown"
        )
    if stat.S_IMODE(state.st_mode) & 0o022 or state.st_uid not in (os.geteuid(), 0):
        raise ConfigurationError(
            f"{path} decides who gets your data, and others can write to it: look through it, and make it "
            "yours alone with chmod 600 and chown"
        )
    try:
        document = YAML(typ="safe", pure=True).load(content) or {}
        return TrustList.model_validate(document)
    except (ValidationError, YAMLError, ValueError, RecursionError) as error:
        first = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else None
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else "this is no YAML"
        raise ConfigurationError(f"{path}: {what}: correct it, or delete it and trust anew") from None
