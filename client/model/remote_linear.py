"""`RemoteLinear`: a linear layer whose weight is elsewhere.

It is an ``nn.Linear`` to PEFT and transformers. Its ``weight`` is an `AbsentWeight`, since much code asks a
weight for its shape, type and device. It is neither parameter nor buffer: nothing saves, counts, broadcasts
or initializes it.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Self

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from blindtune.client.model.absent_weight import AbsentWeight
from blindtune.client.model.layer_group import LayerGroup
from blindtune.errors import UnsupportedError

__all__ = ["RemoteGroup", "RemoteLinear"]


class _GroupProduct(torch.autograd.Function):
    """All outputs of a group at once; backward, one product for the sum of their input gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: LayerGroup, dtype: torch.dtype, counted: bool
    ) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        ctx.set_materialize_grads(False)
        # Gradients lie in memory as x does, as those of any linear layer: where the two differ, torch is
        # known to err (batch norm in eval mode, torch 2.13).
        ctx.like = torch.empty_like(x, device="meta")
        outputs = group.forward(_rows(x), counted)
        return tuple(_tensor(y, (*x.shape[:-1], y.shape[1])).to(x.device, dtype) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None, None]:
        given = [g for g in gradients if g is not None]
        if not ctx.needs_input_grad[0] or not given:
            return None, None, None, None
        gradient = ctx.group.backward([None if g is None else _rows(g) for g in gradients])
        found = _tensor(gradient, ctx.like.shape).to(given[0].device, ctx.like.dtype)
        if found.stride() != ctx.like.stride():
            found = torch.empty_like(ctx.like, device=found.device).copy_(found)
        return found, None, None, None


def _rows(x: torch.Tensor) -> Any:
    """float32 [rows, features] in ordinary memory."""
    return x.detach().reshape(-1, x.shape[-1]).to("cpu", torch.float32).contiguous().numpy()


def _tensor(rows: Any, shape: Sequence[int]) -> torch.Tensor:
    """The numbers of an array as a tensor of its own: autograd lets no view be changed in place.

    Members of a group are columns of one array; none reaches into another.
    """
    return torch.from_numpy(rows.reshape(shape))


class _Waiting:
    """Outputs of a group's other members, computed when the first member was called with ``x``."""

    def __init__(self, x: torch.Tensor, dtype: torch.dtype, outputs: dict[int, torch.Tensor]) -> None:
        self.outputs = outputs
        self._x = x
        self._settings = self._describe(x, dtype)
        # Tensors made in inference mode don't count their changes, so their content is compared.
        self._content = x.clone() if x.is_inference() else None

    def belong_to(self, x: torch.Tensor, dtype: torch.dtype) -> bool:
        """Whether ``x`` is the very same tensor, unchanged, under the same settings."""
        if x is not self._x or self._describe(x, dtype) != self._settings:
            return False
        return self._content is None or torch.equal(self._content, x)

    @staticmethod
    def _describe(x: torch.Tensor, dtype: torch.dtype) -> tuple[object, ...]:
        version = None if x.is_inference() else x._version
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return version, dtype, x.requires_grad, *modes


class RemoteGroup:
    """Answers the members of a group, one after the other, out of one product.

    The first member that sees a tensor asks for all; the others find their output waiting, if they
    are called with the very same tensor, unchanged, under the same settings. Any other call is a product
    by itself, so that a model that departs from its trace gets right results.
    """

    def __init__(self, group: LayerGroup, singles: Sequence[LayerGroup]) -> None:
        self._group = group
        self._singles = singles
        self._waiting = threading.local()

    @torch.compiler.disable  # what happens here is no computation that a compiler could see through
    def __call__(self, member: int, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if len(self._singles) == 1 or x.numel() == 0:
            return self._single(member, x, dtype)
        waiting: _Waiting | None = getattr(self._waiting, "outputs", None)
        if waiting is not None and member in waiting.outputs and waiting.belong_to(x, dtype):
            output = waiting.outputs.pop(member)
            if not waiting.outputs:
                self._waiting.outputs = None
            return output
        if member != 0:
            return self._single(member, x, dtype)
        # Within apply, gradients are always off.
        first, *others = _GroupProduct.apply(x, self._group, dtype, torch.is_grad_enabled())
        self._waiting.outputs = _Waiting(x, dtype, dict(enumerate(others, 1)))
        return first

    def _single(self, member: int, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if x.numel() == 0:
            # Nothing to ask for, and still connected to x for the backward pass.
            return x[..., :1].to(dtype) * x.new_zeros(self._singles[member].out_features[0], dtype=dtype)
        return _GroupProduct.apply(x, self._singles[member], dtype, torch.is_grad_enabled())[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copied model has a group of its own, and asks the same workers."""
        return type(self)(self._group, self._singles)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model with remote layers cannot be pickled: save its adapter instead")


class RemoteLinear(nn.Linear):
    """x W^T + bias, with W held by workers.

    Args:
        in_features, out_features: shape of the weight.
        bias: whether the layer has one. It is a parameter as in any linear layer, and stays here.
        group: answers for the layer's group.
        member: the layer's place in it.
        device, dtype: of the bias, and of what stands for the weight.
        name: of the module in its model, for errors.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]
    weight: AbsentWeight

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        group: RemoteGroup,
        member: int,
        device: torch.device,
        dtype: torch.dtype,
        name: str,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.weight = AbsentWeight((out_features, in_features), dtype, device, f"{name}.weight")
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self._name = name
        self._group = group
        self._member = member

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and not isinstance(value, AbsentWeight):
            raise self._replaced()
        super().__setattr__(name, value)

    def _replaced(self) -> UnsupportedError:
        name = f"{self._name}.weight"
        return UnsupportedError(f"{name} cannot be replaced: the workers multiply by theirs all the same")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Moves and casts the layer; of the weight, what it tells of itself."""
        super()._apply(fn, recurse)
        self.weight = self.weight.like(fn(self.weight.placeholder()))
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T + bias.

        Args:
            x: [..., in_features], float32 or bfloat16.

        Returns:
            [..., out_features], of x's type, or of autocast's where that is on.

        Raises:
            UnsupportedError: x is fp16, or not finite, or the weight was swapped for another.
            ProtocolError: the workers cannot answer.
        """
        if not isinstance(self.weight, AbsentWeight):  # torch.utils.swap_tensors assigns nothing
            raise self._replaced()
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        if torch.float16 in (dtype, x.dtype):
            raise UnsupportedError(
                "fp16 is not supported, because its loss scaling needs infinities to pass through: "
                "use bf16=True, or full fp32"
            )
        if x.shape[-1] != self.in_features:
            raise ValueError(f"the input has {x.shape[-1]} features, the layer {self.in_features}")
        output = self._group(self._member, x, dtype)
        return output if self.bias is None else output + self.bias.to(dtype)

    def reset_parameters(self) -> None:
        """There is nothing to initialize: the bias comes from the checkpoint."""

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise UnsupportedError(
            "torch.nn.DataParallel copies the model to several GPUs of this machine, which remote layers "
            "do not support: set CUDA_VISIBLE_DEVICES to one GPU"
        )
