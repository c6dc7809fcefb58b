"""The TLS files of an operator, read as a whole before anything connects.

gRPC reports bad files late and vaguely, and worse: with an empty CA it trusts every public authority, and
with an empty certificate or key it ends the process.
"""

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from blindtune.protocol.errors import ConfigurationError

__all__ = ["public_keys", "require_key_of"]

_DER = serialization.Encoding.DER
_LAYOUT = serialization.PublicFormat.SubjectPublicKeyInfo


def public_keys(path: Path, operator: str) -> list[bytes]:
    """The public keys of a file of certificates, in order: whoever holds one can pass for its owner.

    Raises:
        ConfigurationError: the file holds no certificate.
    """
    try:
        certificates = x509.load_pem_x509_certificates(path.read_bytes())
        return [x.public_key().public_bytes(_DER, _LAYOUT) for x in certificates]
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"operator {operator}: {path} holds no usable certificate: {error}"
        ) from error


def require_key_of(certificate: Path, path: Path, operator: str) -> None:
    """Checks that a private key is that of a certificate.

    Raises:
        ConfigurationError: the file holds no unencrypted private key, or another one.
    """
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        # What the library says could quote the file.
        raise ConfigurationError(
            f"operator {operator}: key file {path} holds no unencrypted private key ({type(error).__name__})"
        ) from None
    if key.public_key().public_bytes(_DER, _LAYOUT) != public_keys(certificate, operator)[0]:
        raise ConfigurationError(
            f"operator {operator}: key {path} is not the key of certificate {certificate}"
        )
