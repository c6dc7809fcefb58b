"""Tokens of clients. The file has one line ``NAME sha256:HEX`` for each, and no token: only hashes.

A token is 32 random bytes, so a plain hash of it can't be reversed or guessed.
"""

import fcntl
import hashlib
import hmac
import os
import re
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path

from blindtune.common.reload import Reloaded
from blindtune.errors import ConfigurationError
from blindtune.server.admission.refusals import Unauthenticated

__all__ = ["Tokens", "add_token"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LINE = re.compile(rf"({_NAME.pattern})[ \t]+sha256:([0-9a-fA-F]{{64}})")
_TOKEN_BYTES = 32
_SCHEME = "bearer"

Metadata = Sequence[tuple[str, str | bytes]]


class Tokens:
    """The tokens of a file, as it is now.

    Raises:
        ConfigurationError: the file can't be read, or a line of it can't be used.
    """

    def __init__(self, path: Path) -> None:
        self._entries = Reloaded("tokens", [path], lambda: _parse(_read(path), path))

    def __len__(self) -> int:
        return len(self._entries.get())

    def name_of(self, metadata: Metadata | None) -> str:
        """Whose token a request carries, as ``authorization: Bearer TOKEN``.

        Raises:
            Unauthenticated: there is none, or nobody's.
        """
        given = [value for key, value in metadata or () if key == "authorization"]
        if len(given) != 1 or not isinstance(given[0], str):
            raise Unauthenticated("this worker asks for a token: use the one that its operator gave you")
        scheme, _, token = given[0].partition(" ")
        digest = _digest(token.strip())
        name = None
        # All are compared, in a time that does not depend on how much of one agrees.
        for known, expected in self._entries.get():
            if hmac.compare_digest(digest, expected):
                name = known
        if name is None or scheme.lower() != _SCHEME or not token.strip():
            raise Unauthenticated("this worker does not know the token: it was revoked, or is another's")
        return name


def add_token(path: Path, name: str) -> str:
    """Draws a token, adds its hash to a file, and returns the token, which is stored nowhere.

    The file is replaced as a whole, readable by its owner alone. A name may have several tokens, so that one
    can be exchanged for another without a pause.

    Raises:
        ConfigurationError: the name is unusable, or the file can't be read or written.
    """
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{name!r} is no name for a token: use up to 64 letters, digits, dots, dashes and underscores"
        )
    token = secrets.token_urlsafe(_TOKEN_BYTES)
    target = path.resolve()
    try:
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # Another process that adds one at the same time waits, and neither's is lost.
            fcntl.flock(folder, fcntl.LOCK_EX)
            before = _read(target) if target.exists() else ""
            _parse(before, path)
            if before and not before.endswith("\n"):
                before += "\n"
            _replace(target, f"{before}{name} sha256:{_digest(token).hex()}\n")
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror}") from error
    return token


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except OSError as error:
        raise ConfigurationError(f"cannot read the tokens {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigurationError(f"the tokens {path} are no plain text: expected ASCII") from None


def _parse(text: str, path: Path) -> tuple[tuple[str, bytes], ...]:
    entries: dict[bytes, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        match = _LINE.fullmatch(stripped)
        if match is None:
            # The line is not shown: somebody may have written a token there.
            raise ConfigurationError(
                f"{path}, line {number}: expected NAME sha256: and 64 hexadecimal digits"
            )
        name, digest = match[1], bytes.fromhex(match[2])
        if digest in entries:
            raise ConfigurationError(f"{path}, line {number}: this token stands further up already")
        entries[digest] = name
    return tuple((name, digest) for digest, name in entries.items())


def _replace(target: Path, content: str) -> None:
    """Writes a file beside the target and renames it: the target is the old one or the new one, whole."""
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)  # with mode 0600
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
