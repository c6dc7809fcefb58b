"""Who sends a request: the name under which it is limited and logged.

mutual TLS   the SHA-256 of the public key of the client's certificate, shortened: it survives renewal
tokens       the name of the token
plaintext    ``local``

Whoever is nobody of these may still ask for the worker's health: see `blindtune.server.admission.strangers`.
"""

from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from blindtune.server.admission.tokens import Tokens

__all__ = ["LOCAL", "Identify", "by_certificate", "by_token"]

Identify = Callable[[grpc.ServicerContext], str]
"""Names the client of a request; raises Unauthenticated where there is nobody to name."""

LOCAL = "local"
_DIGITS = 16


def by_certificate(context: grpc.ServicerContext) -> str:
    """The client by its certificate, which TLS has verified; ``local`` without TLS."""
    certificates = context.auth_context().get("x509_pem_cert")
    return _of_certificate(bytes(next(iter(certificates)))) if certificates else LOCAL


def by_token(tokens: Tokens) -> Identify:
    """The client by its token."""
    return lambda context: tokens.name_of(context.invocation_metadata())


@lru_cache(maxsize=1024)
def _of_certificate(pem: bytes) -> str:
    key = x509.load_pem_x509_certificate(pem).public_key()
    return sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()[:_DIGITS]
