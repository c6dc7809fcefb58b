"""Integer weights: int8 with one float32 scale for each output feature, and their fingerprints.

    W[j, :] ~ scale[j] * integers[j, :],   scale[j] = max |W[j, :]| / 127   (1 where that is zero)
    integers = round-half-even(W / scale), clipped to +-127

All of it in float32, and in this order: ``W * (127 / max)`` gives other bits. The largest magnitude in
a row is symmetric (``absmax`` quantization), and there are no outlier columns, because which columns
are outliers depends on the data and would tell the workers about it.

W are the checkpoint's numbers, or, under the schemes of QLoRA, what four bits leave of them; see `nf4`.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from blindtune.errors import ConfigurationError
from blindtune.protocol.nf4 import BLOCK, DOUBLE_BLOCK, FourBitWeight, quantize_nf4

__all__ = [
    "INT8",
    "NF4",
    "SCHEMES",
    "IntegerLayer",
    "Scheme",
    "kept_bytes",
    "model_fingerprint",
    "quantize_int8",
    "scheme_named",
]

_INTEGERS = "int8-absmax-v1"
"""Identifier of the integers, part of every fingerprint, whatever they are made of."""

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class IntegerLayer:
    """A frozen linear layer as the protocol sees it.

    Attributes:
        integers: int8 [out_features, in_features].
        scales: float32 [out_features], each positive and finite.
        four_bit: what the integers were made of, where that is four-bit codes.
    """

    integers: torch.Tensor
    scales: NDArray[np.float32]
    four_bit: FourBitWeight | None = None

    @property
    def out_features(self) -> int:
        return self.integers.shape[0]

    @property
    def in_features(self) -> int:
        return self.integers.shape[1]

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, over scheme, shape, integers and scales."""
        digest = hashlib.sha256(f"{_INTEGERS} {self.out_features} {self.in_features}\n".encode())
        digest.update(self.integers.contiguous().numpy().data)
        digest.update(np.ascontiguousarray(self.scales, "<f4").data)
        return digest.hexdigest()


def quantize_int8(weight: torch.Tensor) -> IntegerLayer:
    """Quantizes a weight matrix.

    Args:
        weight: [out_features, in_features], of any floating-point type.

    Raises:
        ValueError: a value is not finite, or the matrix has no elements.
    """
    weight = weight.detach()
    return _integers(weight.shape, lambda start, stop: weight[start:stop])


def _integers(shape: Sequence[int], rows_of: Callable[[int, int], torch.Tensor]) -> IntegerLayer:
    """`quantize_int8` of a matrix that is made some rows at a time."""
    out_features, in_features = shape
    if not out_features * in_features:
        raise ValueError("the weight matrix is empty")
    integers = torch.empty((out_features, in_features), dtype=torch.int8, device="cpu")
    scales = torch.empty(out_features, dtype=torch.float32, device="cpu")
    for start in range(0, out_features, _ROWS_AT_ONCE):
        # On the processor, since GPUs divide by multiplying with a reciprocal, which gives other bits.
        rows = rows_of(start, min(start + _ROWS_AT_ONCE, out_features)).to("cpu", torch.float32)
        largest = rows.abs().amax(dim=1)
        if not torch.isfinite(largest).all():
            raise ValueError("the weight matrix holds a value that is not finite")
        scale = largest / 127
        # A row of denormals can have a scale that underflows to zero: it is as good as zero.
        scale[scale == 0] = 1
        scales[start : start + _ROWS_AT_ONCE] = scale
        integers[start : start + _ROWS_AT_ONCE] = (
            torch.round(rows / scale[:, None]).clamp_(-127, 127).to(torch.int8)
        )
    return IntegerLayer(integers, scales.numpy())


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint's numbers become integers, the same on both sides.

    Attributes:
        name: what a recipe and a worker's option call it.
        identifier: what a kit and a manifest call it: it changes with every bit that may change.
        quantize: of a weight matrix [out_features, in_features].
        description: in words.
    """

    name: str
    identifier: str
    quantize: Callable[[torch.Tensor], IntegerLayer]
    description: str


def _of_nf4(double: bool) -> Callable[[torch.Tensor], IntegerLayer]:
    def quantize(weight: torch.Tensor) -> IntegerLayer:
        four_bit = quantize_nf4(weight, double=double)
        return replace(_integers(four_bit.shape, four_bit.rows), four_bit=four_bit)

    return quantize


INT8 = Scheme("int8", _INTEGERS, quantize_int8, "one byte for each weight, one scale for each output")
NF4 = Scheme(
    "nf4",
    "nf4-64-" + _INTEGERS,
    _of_nf4(False),
    "the integers of what NF4 in blocks of 64 leaves, as QLoRA's",
)
NF4_DOUBLE = Scheme(
    "nf4-double",
    "nf4-64-double-256-" + _INTEGERS,
    _of_nf4(True),
    "likewise, with double quantization: scales of four bits' blocks in eight bits",
)

SCHEMES = {x.name: x for x in (INT8, NF4, NF4_DOUBLE)}
"""Every scheme by name."""


def kept_bytes(out_features: int, in_features: int, scheme: Scheme) -> int:
    """Bytes of a layer as a worker keeps it, but for what puts its rows apart in memory."""
    elements = out_features * in_features
    if scheme is INT8:
        return elements
    blocks = -(-elements // BLOCK)
    scales = 4 * blocks if scheme is NF4 else blocks + 4 * -(-blocks // DOUBLE_BLOCK)
    return -(-elements // 2) + scales + 4 * out_features


def scheme_named(name: str, asked: str) -> Scheme:
    """A scheme that somebody asked for.

    Args:
        asked: where, for the error.

    Raises:
        ConfigurationError: there is no such scheme.
    """
    if name not in SCHEMES:
        raise ConfigurationError(f"{asked} is one of {', '.join(SCHEMES)}, not {name!r}")
    return SCHEMES[name]


def model_fingerprint(layers: Mapping[str, str]) -> str:
    """SHA-256, in hexadecimal, over the fingerprints of all layers in the order of their names."""
    digest = hashlib.sha256(f"{_INTEGERS}\n".encode())
    for name in sorted(layers):
        digest.update(f"{len(name)} {name} {layers[name]}\n".encode())
    return digest.hexdigest()
