"""The Ed25519 key that signs records, and the secrets that lie beside it.

    FOLDER/record.key            the private key, PKCS#8 PEM, readable by its owner only
    FOLDER/record.pub            the public key, SubjectPublicKeyInfo PEM: hand this to auditors
    FOLDER/salts/RECORD.salt     the salt of one record; see `blindtune.client.record.commitment`

FOLDER is the user's configuration folder unless a recipe names another key. It is not the output folder: one
key signs all records of a user, and an output folder may be given away as a whole.
"""

import hashlib
import os
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from blindtune.client.process.disk import disk_errors_are_clear, file_written_at_once, make_folder
from blindtune.client.process.settings import settings_folder
from blindtune.errors import ConfigurationError

__all__ = ["RecordKey", "VerificationKey", "default_key"]


def default_key() -> Path:
    """Where the key is unless a recipe names another."""
    return settings_folder() / "record.key"


@dataclass(frozen=True)
class VerificationKey:
    """The public half."""

    public: Ed25519PublicKey

    @classmethod
    def read(cls, path: Path) -> "VerificationKey":
        """The public key of a PEM file.

        Raises:
            ConfigurationError: it holds no Ed25519 public key.
        """
        try:
            key = serialization.load_pem_public_key(path.read_bytes())
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            # What the library says could quote the file, which may be a private key by mistake.
            raise ConfigurationError(
                f"{path} holds no public key ({type(error).__name__}): name the client's record.pub"
            ) from None
        if not isinstance(key, Ed25519PublicKey):
            raise ConfigurationError(f"{path} holds a public key that is not Ed25519: name a record.pub")
        return cls(key)

    @cached_property
    def pem(self) -> bytes:
        """The key as a file."""
        return self.public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    @cached_property
    def raw(self) -> bytes:
        """The key's 32 bytes."""
        return self.public.public_bytes_raw()

    @cached_property
    def id(self) -> str:
        """SHA-256 of the key's DER form, in hex."""
        der = self.public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return hashlib.sha256(der).hexdigest()

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether a signature is this key's."""
        try:
            self.public.verify(signature, message)
        except InvalidSignature:
            return False
        return True


class RecordKey:
    """The private key. It is read once, and nothing shows it.

    Args:
        path: of the private key.
        private: the key.
    """

    def __init__(self, path: Path, private: Ed25519PrivateKey) -> None:
        self.path = path
        self._private = private
        self.verification = VerificationKey(private.public_key())

    @classmethod
    def obtained(cls, path: Path) -> "RecordKey":
        """The key of a file, which is made at first use.

        Raises:
            ConfigurationError: the file holds no unencrypted Ed25519 key, others can read it, or it can't
                be made.
        """
        if not path.exists():
            _make(path)
        try:
            with open(path, "rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                content = file.read()
        except OSError as error:
            raise ConfigurationError(f"the record's key {path} cannot be read: {error.strerror}") from None
        if stat.S_IMODE(mode) & 0o077:
            raise ConfigurationError(
                f"the record's key {path} can be read by others: make it yours alone with chmod 600, or, if "
                "someone may have copied it, move it away and have a new one made"
            )
        try:
            key = serialization.load_pem_private_key(content, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ConfigurationError(
                f"{path} holds no unencrypted private key ({type(error).__name__}): name an Ed25519 key in "
                "record.key, or a file that does not exist, and one is made there"
            ) from None
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigurationError(f"{path} holds a key that is not Ed25519: name another in record.key")
        return cls(path, key)

    def sign(self, message: bytes) -> bytes:
        """A signature, 64 bytes."""
        return self._private.sign(message)

    @property
    def salts(self) -> Path:
        """Where the salts of this key's records lie."""
        return self.path.parent / "salts"


def _make(path: Path) -> None:
    """Makes a key where there is none; of two processes that do, the first one's stays."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def write_public(key: Any) -> None:
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        file_written_at_once(path.with_suffix(".pub"), lambda file: file.write(public))

    try:
        with disk_errors_are_clear(path.parent):
            make_folder(path.parent)
            write_public(key)  # first, for it is made together with the key or never
            file_written_at_once(path, lambda file: file.write(private), replace=False)
            write_public(serialization.load_pem_private_key(path.read_bytes(), password=None))
    except OSError as error:
        raise ConfigurationError(
            f"the record's key cannot be made at {path} ({error.strerror}): name another file in record.key, "
            "or leave the record out with record.enabled: false"
        ) from None
