"""Who sends a request: the name under which it is limited and logged.

mutual TLS   the SHA-256 of the public key of the client's certificate, shortened: it survives renewal
tokens       the name of the token
plaintext    ``local``

Whoever is nobody of these may still ask for the worker's health, and is limited by address.
"""

from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from blindtune.server.refusals import Unauthenticated
from blindtune.server.tokens import Tokens

__all__ = ["LOCAL", "Identify", "by_certificate", "by_token", "or_by_address"]

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


def or_by_address(identify: Identify) -> Identify:
    """The same, but whoever it does not know is named after the address that they call from."""

    def name(context: grpc.ServicerContext) -> str:
        try:
            return identify(context)
        except Unauthenticated:
            # No name of a token has a space.
            return f"stranger {context.peer().rpartition(':')[0]}"

    return name


@lru_cache(maxsize=1024)
def _of_certificate(pem: bytes) -> str:
    key = x509.load_pem_x509_certificate(pem).public_key()
    return sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()[:_DIGITS]
