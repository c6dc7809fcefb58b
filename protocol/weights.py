"""Integer weights: int8 with one float32 scale for each output feature, and their fingerprints.

    W[j, :] ~ scale[j] * integers[j, :],   scale[j] = max |W[j, :]| / 127   (1 where that is zero)
    integers = round-half-even(W / scale), clipped to +-127

All of it in float32, and in this order: ``W * (127 / max)`` gives other bits. The largest magnitude in
a row is symmetric (``absmax`` quantization), and there are no outlier columns, because which columns
are outliers depends on the data and would tell the workers about it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["SCHEME", "IntegerLayer", "model_fingerprint", "quantize_int8"]

SCHEME = "int8-absmax-v1"
"""Identifier of this quantization, part of every fingerprint and manifest."""

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class IntegerLayer:
    """A frozen linear layer as the protocol sees it.

    Attributes:
        integers: int8 [out_features, in_features].
        scales: float32 [out_features], each positive and finite.
    """

    integers: torch.Tensor
    scales: NDArray[np.float32]

    @property
    def out_features(self) -> int:
        return self.integers.shape[0]

    @property
    def in_features(self) -> int:
        return self.integers.shape[1]

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, over scheme, shape, integers and scales."""
        digest = hashlib.sha256(f"{SCHEME} {self.out_features} {self.in_features}\n".encode())
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
    out_features, in_features = weight.shape
    if not weight.numel():
        raise ValueError("the weight matrix is empty")
    weight = weight.detach()
    integers = torch.empty((out_features, in_features), dtype=torch.int8, device="cpu")
    scales = torch.empty(out_features, dtype=torch.float32, device="cpu")
    for start in range(0, out_features, _ROWS_AT_ONCE):
        # On the processor, since GPUs divide by multiplying with a reciprocal, which gives other bits.
        rows = weight[start : start + _ROWS_AT_ONCE].to("cpu", torch.float32)
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


def model_fingerprint(layers: Mapping[str, str]) -> str:
    """SHA-256, in hexadecimal, over the fingerprints of all layers in the order of their names."""
    digest = hashlib.sha256(f"{SCHEME}\n".encode())
    for name in sorted(layers):
        digest.update(f"{len(name)} {name} {layers[name]}\n".encode())
    return digest.hexdigest()
