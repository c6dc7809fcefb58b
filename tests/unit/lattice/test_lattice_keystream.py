"""The key stream is the one of RFC 8439, for any key and counter."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from hypothesis import given, settings
from hypothesis import strategies as st

from blindtune.protocol.lattice.keystream import key_stream


def blocks(key: bytes, counter: int) -> bytes:
    """Sixteen blocks in the order of the stream."""
    out = np.full(272, 99, np.uint32)
    key_stream(np.frombuffer(key, np.uint32), np.uint32(counter), out[:256])
    assert np.all(out[256:] == 99)
    return out[:256].reshape(16, 16).T.tobytes()


def test_the_first_block_is_that_of_the_standard() -> None:
    # RFC 8439, appendix A.1, test vectors 1 and 2: key and nonce zero, counters 0 and 1.
    expected = (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )
    assert blocks(bytes(32), 0)[:128].hex() == expected


@settings(derandomize=True, deadline=None, max_examples=100)
@given(key=st.binary(min_size=32, max_size=32), counter=st.integers(0, 2**32 - 17))
def test_sixteen_blocks_are_those_of_another_implementation(key: bytes, counter: int) -> None:
    nonce = counter.to_bytes(4, "little") + bytes(12)
    expected = Cipher(ChaCha20(key, nonce), mode=None).encryptor().update(bytes(1024))
    assert blocks(key, counter) == expected


@pytest.mark.parametrize("counter", [2**31 - 8, 2**31, 2**32 - 16])
def test_counters_are_unsigned(counter: int) -> None:
    key = bytes(range(32))
    nonce = counter.to_bytes(4, "little") + bytes(12)
    assert blocks(key, counter) == Cipher(ChaCha20(key, nonce), mode=None).encryptor().update(bytes(1024))
