"""The key stream is the one of RFC 8439 in both orders, for any key, nonce, counter and length."""

from collections.abc import Callable

import numpy as np
import pytest
from chacha20_reference import COUNTING_KEY, PUBLISHED, chacha20_block, library_stream
from hypothesis import given, settings
from hypothesis import strategies as st

from blindtune.protocol.kernels import chacha20
from blindtune.protocol.kernels.chacha20 import batch, initial_state, key_stream

WITH_IDS = pytest.mark.parametrize(
    ("key", "counter", "nonce", "keystream"), [v[1:] for v in PUBLISHED], ids=[v[0] for v in PUBLISHED]
)
COUNTERS = st.one_of(st.integers(0, 2**32 - 1), st.integers(2**32 - 100, 2**32 - 1), st.just(2**31 - 8))


def state_at(key: bytes, counter: int, nonce: bytes) -> np.ndarray:
    state = initial_state(key)
    state[12] = counter
    state[13:] = np.frombuffer(nonce, "<u4")
    return state


def in_order(key: bytes, counter: int, nonce: bytes, words: int) -> np.ndarray:
    out = np.full(words + 2, 12345, np.uint32)
    key_stream(state_at(key, counter, nonce), out[1:-1])
    assert out[0] == out[-1] == 12345, "words beside the array were written"
    return out[1:-1]


def by_word(key: bytes, counter: int, nonce: bytes, words: int) -> np.ndarray:
    """The same from batches, one after the other."""
    batches = -(-words // 256)
    out, state = np.full(256 * batches + 2, 12345, np.uint32), state_at(key, counter, nonce)
    for i in range(batches):
        batch(state, out, 1 + 256 * i)
    assert out[0] == out[-1] == 12345, "words beside the array were written"
    return out[1:-1].reshape(batches, 16, 16).transpose(0, 2, 1).reshape(-1)[:words]


IN_BOTH_ORDERS = pytest.mark.parametrize("stream", [in_order, by_word])


@WITH_IDS
def test_the_definition_in_integers_gives_the_keystream_of_rfc_8439(
    key: bytes, counter: int, nonce: str, keystream: str
) -> None:
    stream = bytes.fromhex(keystream)
    for block in range(len(stream) // 64):
        words = chacha20_block(key, counter + block, bytes.fromhex(nonce))
        assert b"".join(w.to_bytes(4, "little") for w in words) == stream[64 * block : 64 * block + 64]


@IN_BOTH_ORDERS
@WITH_IDS
def test_the_key_stream_is_that_of_rfc_8439(
    key: bytes, counter: int, nonce: str, keystream: str, stream: Callable[..., np.ndarray]
) -> None:
    words = stream(key, counter, bytes.fromhex(nonce), len(keystream) // 8)
    assert words.tobytes().hex() == keystream


@IN_BOTH_ORDERS
@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    key=st.binary(min_size=32, max_size=32),
    nonce=st.binary(min_size=12, max_size=12),
    counter=COUNTERS,
    words=st.one_of(st.integers(0, 1200), st.sampled_from([15, 16, 17, 255, 256, 257, 511, 512, 513])),
)
def test_the_key_stream_is_the_librarys_for_any_key_nonce_counter_and_length(
    stream: Callable[..., np.ndarray], key: bytes, nonce: bytes, counter: int, words: int
) -> None:
    assert np.array_equal(stream(key, counter, nonce, words), library_stream(key, counter, nonce, words))


@IN_BOTH_ORDERS
def test_the_counter_wraps_around_and_leaves_the_nonce_alone(stream: Callable[..., np.ndarray]) -> None:
    words = stream(COUNTING_KEY, 2**32 - 1, b"nonce nonce ", 32).tolist()
    assert words[:16] == chacha20_block(COUNTING_KEY, 2**32 - 1, b"nonce nonce ")
    assert words[16:] == chacha20_block(COUNTING_KEY, 0, b"nonce nonce ")


def test_no_state_is_made_where_key_streams_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_bit_off(name: str) -> Callable[..., None]:
        right = getattr(chacha20, name)

        def wrong(state: np.ndarray, out: np.ndarray, *at: int) -> None:
            right(state, out, *at)
            out[-1] ^= 1

        return wrong

    for name in ("batch", "key_stream"):
        with monkeypatch.context() as patch:
            patch.setattr(chacha20, name, one_bit_off(name))
            chacha20._require_right_streams.cache_clear()
            with pytest.raises(RuntimeError, match="no mask can be drawn"):
                initial_state(COUNTING_KEY)
            with pytest.raises(RuntimeError, match="no mask can be drawn"):
                initial_state(COUNTING_KEY)
    initial_state(COUNTING_KEY)
