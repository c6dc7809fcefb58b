"""Secret words u for each output of a layer, and V = M u mod 2^32 and mod 2^64.

They are expanded from the kit's secret as verification vectors are: forward for each layer, since outputs of
a group stand side by side, backward one set for all layers, since input gradients of a group add up. V is
then cut and added up as v is. Words mod 2^64 are independent of those mod 2^32: they decode where those
noticed.
"""

from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from blindtune.protocol.expansion import derive_key
from blindtune.protocol.kernels.compiled import kernel
from blindtune.protocol.kernels.low_sums import Words
from blindtune.protocol.products import Direction

__all__ = ["CertificateWords", "LongWords", "images", "secret_words"]

LongWords = NDArray[np.uint64]


def secret_words(secret: bytes, layer: str, direction: Direction, features: int) -> tuple[Words, LongWords]:
    """u for the outputs of a layer: uint32 [features] and uint64 [features], uniform and independent."""
    label = ("forward", layer) if direction is Direction.FORWARD else ("backward",)
    return (
        np.frombuffer(_stream(derive_key(secret, "certificate", "words", *label), 4 * features), "<u4"),
        np.frombuffer(_stream(derive_key(secret, "certificate", "long words", *label), 8 * features), "<u8"),
    )


def _stream(key: bytes, count: int) -> bytes:
    # A key that serves nothing else needs no nonce of its own.
    return Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(count))


def images(
    integers: torch.Tensor, words: tuple[Words, LongWords], direction: Direction
) -> tuple[Words, LongWords]:
    """V = M u for one layer.

    Args:
        integers: int8 [out, in].
        words: of `secret_words`, [out] forward, [in] backward.

    Returns:
        uint32 and uint64, [in] forward, [out] backward.
    """
    weights = integers.numpy()
    outputs = weights.shape[0 if direction is Direction.FORWARD else 1]
    if any(u.shape != (outputs,) for u in words):
        raise ValueError(f"words for {len(words[0])} outputs do not fit a layer of shape {weights.shape}")
    u = np.stack([words[0].astype(np.uint64), words[1]])
    if direction is Direction.FORWARD:
        out = np.zeros((2, weights.shape[1]), np.uint64)
        _accumulate(weights, u, out)
    else:
        out = np.empty((2, weights.shape[0]), np.uint64)
        _apply(weights, u, out)
    return out[0].astype(np.uint32), out[1]


# As in `verification`, but modulo 2^64, where a sum of any length is exact.


@kernel
def _accumulate(rows, u, out):  # type: ignore[no-untyped-def]
    for j in range(rows.shape[0]):
        for k in range(u.shape[0]):
            factor = u[k, j]
            for i in range(rows.shape[1]):
                out[k, i] += factor * np.uint64(np.int64(rows[j, i]))


@kernel
def _apply(rows, u, out):  # type: ignore[no-untyped-def]
    for j in range(rows.shape[0]):
        for k in range(u.shape[0]):
            total = np.uint64(0)
            for i in range(rows.shape[1]):
                total += u[k, i] * np.uint64(np.int64(rows[j, i]))
            out[k, j] = total


@dataclass(frozen=True, eq=False)
class CertificateWords:
    """The secret words of one product. An integrity secret: it has no ``repr``, and no pickle.

    Attributes:
        u: uint32 [outputs].
        image: V = M u mod 2^32, uint32 [contraction].
        long_u: uint64 [outputs].
        long_image: M long_u mod 2^64, uint64 [contraction].
        column_squares: sum of squares of each column of M, int64 [outputs].
    """

    u: Words = field(repr=False)
    image: Words = field(repr=False)
    long_u: LongWords = field(repr=False)
    long_image: LongWords = field(repr=False)
    column_squares: NDArray[np.int64] = field(repr=False)

    def __post_init__(self) -> None:
        outputs, contraction = len(self.u), len(self.image)
        expected = {"u": "u4", "image": "u4", "long_u": "u8", "long_image": "u8", "column_squares": "i8"}
        for name, dtype in expected.items():
            array = getattr(self, name)
            length = contraction if name.endswith("image") else outputs
            if array.shape != (length,) or array.dtype != np.dtype(dtype) or not array.flags.c_contiguous:
                raise ValueError(f"{name} of a certificate is no {dtype} vector of {length}")

    def __reduce__(self) -> NoReturn:
        raise TypeError("the words of a certificate cannot be pickled: they are a secret")
