"""A weight that is not here tells what it is, and nothing computes with it."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import get_overridable_functions, resolve_name

from blindtune.client.model.absent_weight import AbsentWeight
from blindtune.errors import UnsupportedError

# Of all that torch can do with a tensor. Each of these answers without a number of the weight, or with the
# weight again, which is as absent as before.
ALLOWED = {
    *("__dir__", "__hash__", "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous"),
    *("is_floating_point", "is_inference", "nelement", "ndimension", "numel", "size", "stride"),
    *("_version", "device", "dtype", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_mps"),
    *("is_nested", "is_quantized", "is_sparse", "is_xla", "is_xpu", "itemsize", "layout", "nbytes", "ndim"),
    *("requires_grad", "retains_grad", "shape"),
    *("bfloat16", "clone", "contiguous", "cpu", "cuda", "data", "detach", "double", "float", "half", "to"),
    *("type", "type_as", "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"),
    *("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like"),
}
WEIGHT = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture
def weight() -> AbsentWeight:
    return AbsentWeight((48, 32), torch.float32, torch.device("cpu"), WEIGHT)


def test_it_tells_what_it_is(weight: AbsentWeight) -> None:
    assert weight.shape == (48, 32) and weight.size(1) == 32 and weight.ndim == 2 and len(weight) == 48
    assert weight.numel() == 48 * 32 and weight.nbytes == 4 * 48 * 32
    assert weight.device == torch.device("cpu") and weight.is_floating_point() and not weight.requires_grad
    assert WEIGHT in repr(weight) and "(48, 32)" in f"{weight}"


def test_it_takes_no_memory() -> None:
    assert AbsentWeight((10**8, 10**8), torch.bfloat16, torch.device("cpu"), WEIGHT).numel() == 10**16


def test_nothing_that_torch_can_do_is_allowed_but_what_is_listed(weight: AbsentWeight) -> None:
    allowed, refused = set(), 0
    for functions in get_overridable_functions().values():
        for function in functions:
            name = resolve_name(function) or function.__name__
            short = name.removesuffix(".__get__").rpartition(".")[2]
            try:
                AbsentWeight.__torch_function__(function, (AbsentWeight,), (weight,))
            except UnsupportedError as error:
                assert str(error).startswith(f"{WEIGHT} stays with the workers")
                refused += 1
            except (TypeError, RuntimeError, AssertionError):
                # Allowed, and called without an argument that it needs, or where there is no such device.
                allowed.add(short)
            else:
                allowed.add(short)
    assert allowed <= ALLOWED
    assert {"shape", "numel", "to", "data"} <= allowed
    assert refused > 1000


class _Product(torch.autograd.Function):
    """Reaches a weight past ``__torch_function__`` of its own arguments."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return x @ w.t()


def _keep(w: torch.Tensor) -> torch.Tensor:
    return torch.zeros(48, 32).copy_(w)


USES: dict[str, tuple[str, Callable[[torch.Tensor], object]]] = {
    "a product": (r"torch\.mm\)", lambda w: torch.mm(torch.zeros(2, 48), w)),
    "a linear layer": ("linear", lambda w: torch.nn.functional.linear(torch.zeros(2, 32), w)),
    "a slice": ("__getitem__", lambda w: w[:3]),
    "a slice of a cast": ("__getitem__", lambda w: w.to(torch.bfloat16)[:3]),
    "a transpose": (r"Tensor\.T", lambda w: w.data.T),
    "a change in place": ("add_", lambda w: w.data.add_(1)),
    "other data": (r"data\.__set__", lambda w: setattr(w, "data", torch.zeros(48, 32))),
    "a copy": ("copy_", _keep),
    "a place for results": (r"torch\.add\)", lambda w: torch.add(torch.zeros(48, 32), 1, out=w)),
    "numbers in a list": ("cat", lambda w: torch.cat([torch.zeros(1, 32), w])),
    "svd": ("svd", lambda w: torch.linalg.svd(w.float())),
    "a norm": ("norm", lambda w: w.norm(p=2, dim=1)),
    "NumPy": ("__array__", np.asarray),
    "its memory": ("data_ptr", lambda w: w.data_ptr()),
    "its storage": ("untyped_storage", lambda w: w.untyped_storage()),
    "a number": ("tolist", lambda w: w.tolist()),
    "a truth": ("__bool__", bool),
    "a comparison": ("__eq__", lambda w: w == 0),
    "a parameter": ("requires_grad_", torch.nn.Parameter),
    "its gradient": ("requires_grad_", lambda w: w.requires_grad_()),
    "below Python": (r"aten\.", lambda w: _Product.apply(torch.zeros(2, 32), w)),
    "an ordinary tensor": (r"aten\.", lambda w: w.as_subclass(torch.Tensor)),
    "numbers of another": ("new_tensor", lambda w: w.new_tensor(w)),
    "a sum in another's type": ("sum", lambda w: w.type_as(torch.zeros(1, dtype=torch.bfloat16)).sum()),
    "vmap": (r"aten\.sum", lambda w: torch.func.vmap(torch.sum)(w)),
}


@pytest.mark.parametrize(("operation", "use"), USES.values(), ids=USES)
def test_whatever_needs_its_numbers_says_which_weight_who_and_what(
    weight: AbsentWeight, operation: str, use: Callable[[torch.Tensor], object]
) -> None:
    with pytest.raises(UnsupportedError, match=rf"^{WEIGHT} stays with the workers, and .+ \(.*{operation}"):
        use(weight)


def test_the_error_names_the_function_that_asked(weight: AbsentWeight) -> None:
    with pytest.raises(
        UnsupportedError, match=rf"{__name__}\._keep needs its numbers \(torch.Tensor.copy_\)"
    ):
        _keep(weight)


@pytest.mark.parametrize(
    "again",
    [
        copy.copy,
        copy.deepcopy,
        torch.clone,
        lambda w: w.data,
        lambda w: w.detach().contiguous(),
        lambda w: w.type_as(w),
    ],
)
def test_what_keeps_the_weight_gives_an_absent_one(
    weight: AbsentWeight, again: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    found = again(weight)
    assert isinstance(found, AbsentWeight) and found.shape == weight.shape and found.dtype == weight.dtype
    with pytest.raises(UnsupportedError, match=WEIGHT):
        found.sum()


def test_its_memory_is_not_exported(weight: AbsentWeight) -> None:
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        torch.utils.dlpack.to_dlpack(weight)


def test_what_it_lends_its_shape_or_type_to_is_an_ordinary_tensor(weight: AbsentWeight) -> None:
    for like in (torch.zeros_like(weight), weight.new_zeros(48, 32), torch.full_like(weight, 0)):
        assert type(like) is torch.Tensor and torch.equal(like, torch.zeros(48, 32))
    other = weight.to(torch.bfloat16)
    assert torch.ones(2).to(other).dtype == torch.ones(2).type_as(other).dtype == torch.bfloat16
