"""The files with which a client shows an operator who it is, read as a whole before anything connects.

gRPC reports bad files late and vaguely, and worse: with an empty CA it trusts every public authority, and
with an empty certificate or key it ends the process.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from blindtune.errors import ConfigurationError

__all__ = ["ClientFiles", "files_state", "public_keys", "read_files", "read_token", "require_key_of"]

_DER = serialization.Encoding.DER
_LAYOUT = serialization.PublicFormat.SubjectPublicKeyInfo
# What a header can carry after "Bearer" (RFC 6750, section 2.1).
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class ClientFiles:
    """What the files held when they were read.

    Attributes:
        ca: certificates of the operator's authority, in PEM.
        certificate, key: of the client, in PEM, or neither.
        token: the client's, or None.
    """

    ca: bytes = field(repr=False)
    certificate: bytes | None = field(repr=False)
    key: bytes | None = field(repr=False)
    token: str | None = field(repr=False)


def read_files(
    operator: str, ca: StrPath, certificate: StrPath | None, key: StrPath | None, token: StrPath | None
) -> ClientFiles:
    """Reads files, and checks what was read.

    Raises:
        ConfigurationError: a file is missing or unusable, or the key is not that of the certificate.
    """
    contents = ClientFiles(
        _read(Path(ca), operator),
        _read(Path(certificate), operator) if certificate else None,
        _read(Path(key), operator) if key else None,
        read_token(Path(token), operator) if token else None,
    )
    _public_keys(contents.ca, Path(ca), operator)
    if certificate and key and contents.certificate is not None and contents.key is not None:
        _require_key_of(contents.certificate, Path(certificate), contents.key, Path(key), operator)
    return contents


def files_state(paths: Iterable[StrPath | None]) -> tuple[tuple[int, int, int, int] | None, ...]:
    """Differs once a file was changed or replaced; links are followed."""
    found: list[tuple[int, int, int, int] | None] = []
    for path in paths:
        try:
            state = os.stat(path or "")
        except OSError:
            found.append(None)
        else:
            found.append((state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns))
    return tuple(found)


def public_keys(path: Path, operator: str) -> list[bytes]:
    """The public keys of a file of certificates, in order: whoever holds one can pass for its owner.

    Raises:
        ConfigurationError: the file holds no certificate.
    """
    return _public_keys(_read(path, operator), path, operator)


def require_key_of(certificate: Path, path: Path, operator: str) -> None:
    """Checks that a private key is that of a certificate.

    Raises:
        ConfigurationError: the file holds no unencrypted private key, or another one.
    """
    _require_key_of(_read(certificate, operator), certificate, _read(path, operator), path, operator)


def read_token(path: Path, operator: str) -> str:
    """The token in a file: one line, which no message shows.

    Raises:
        ConfigurationError: the file can't be read, or holds something else.
    """
    text = _read(path, operator).decode("ascii", "replace").strip()
    if not _TOKEN.fullmatch(text):
        raise ConfigurationError(
            f"operator {operator}: token file {path} holds no token: put the line there that the operator "
            "gave you, and nothing else"
        )
    return text


def _read(path: Path, operator: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"operator {operator}: cannot read {path}: {error.strerror}") from error


def _public_keys(content: bytes, path: Path, operator: str) -> list[bytes]:
    try:
        certificates = x509.load_pem_x509_certificates(content)
        return [x.public_key().public_bytes(_DER, _LAYOUT) for x in certificates]
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise ConfigurationError(
            f"operator {operator}: {path} holds no usable certificate: {error}"
        ) from error


def _require_key_of(
    certificate: bytes, certificate_path: Path, content: bytes, path: Path, operator: str
) -> None:
    expected = _public_keys(certificate, certificate_path, operator)[0]
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        # What the library says could quote the file.
        raise ConfigurationError(
            f"operator {operator}: key file {path} holds no unencrypted private key ({type(error).__name__})"
        ) from None
    if key.public_key().public_bytes(_DER, _LAYOUT) != expected:
        raise ConfigurationError(
            f"operator {operator}: key {path} is not the key of certificate {certificate_path}"
        )
