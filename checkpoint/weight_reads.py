"""What one may ask a weight without reading a number of it.

Both sides go by this list: a layer whose weight the model's own code reads stays on the client, and a weight
that is not here refuses whatever is not on the list.
"""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["DESCRIBES", "FOLLOWS_SHAPE", "FOLLOWS_TYPE", "KEEPS"]

Operations = frozenset[Callable[..., Any]]
_Tensor = torch.Tensor


def _getters(*names: str) -> set[Any]:
    return {getattr(_Tensor, name).__get__ for name in names}


DESCRIBES: Operations = frozenset(
    {
        _Tensor.__dir__,
        _Tensor.__hash__,
        _Tensor.__len__,
        _Tensor.dim,
        _Tensor.element_size,
        _Tensor.get_device,
        _Tensor.is_complex,
        _Tensor.is_contiguous,
        _Tensor.is_floating_point,
        _Tensor.is_inference,
        _Tensor.nelement,
        _Tensor.ndimension,
        _Tensor.numel,
        _Tensor.size,
        _Tensor.stride,
        torch.is_complex,
        torch.is_floating_point,
        torch.numel,
        *_getters("device", "dtype", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_mps"),
        *_getters("is_nested", "is_quantized", "is_sparse", "is_xla", "is_xpu", "itemsize", "layout"),
        *_getters("nbytes", "ndim", "requires_grad", "retains_grad", "shape", "_version"),
    }
)
"""What tells of the weight itself."""

KEEPS: Operations = frozenset(
    {
        _Tensor.bfloat16,
        _Tensor.clone,
        _Tensor.contiguous,
        _Tensor.cpu,
        _Tensor.cuda,
        _Tensor.detach,
        _Tensor.double,
        _Tensor.float,
        _Tensor.half,
        _Tensor.to,
        _Tensor.type,
        _Tensor.type_as,
        torch.clone,
        torch.detach,
        *_getters("data"),
    }
)
"""What gives the same weight again, perhaps of another type or on another device."""

FOLLOWS_SHAPE: Operations = frozenset(
    {
        torch.empty_like,
        torch.full_like,
        torch.ones_like,
        torch.rand_like,
        torch.randn_like,
        torch.zeros_like,
    }
)
"""What makes another tensor of its shape."""

FOLLOWS_TYPE: Operations = frozenset(
    {
        _Tensor.new_empty,
        _Tensor.new_full,
        _Tensor.new_ones,
        _Tensor.new_tensor,
        _Tensor.new_zeros,
        _Tensor.to,
        _Tensor.type_as,
    }
)
"""What makes another tensor of its type, or gives a tensor its type."""
