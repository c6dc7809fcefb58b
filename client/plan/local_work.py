"""What the client computes itself in a training step: attention, norms, LoRA matrices, the loss.

It is counted, not looked up: every operation of a step on the model without weights passes by a
`TorchDispatchMode`, so that any architecture is counted as it computes. An operation is

    its floating-point operations, if it is a matrix product (twice the multiply-adds)
    the bytes that it reads and writes, which for few rows are most of a product too; none for a view
    one call

Attention is counted as one fused operation, as processors compute it, and not as the products that it
consists of where there is no processor. Its backward pass takes a time for each query besides, which in
bfloat16 is most of it.

What the operations give is held in memory until nothing refers to it any more, and so it is followed.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["LocalWork", "counted"]

# These read as much of their input as they write, and not all of it.
_GATHERING = {"embedding", "index", "index_select", "gather"}
# The backward pass of fused attention computes the scores again: five products instead of two.
_ATTENTION_BACKWARD = 2.5


@dataclass
class LocalWork:
    """Work of a training step at the client.

    Attributes:
        flops: of matrix products in float32.
        half_flops: of those in bfloat16.
        moved: bytes that operations read and write.
        calls: operations.
        attended: queries, each of one head, in the backward pass of attention in float32.
        half_attended: those in bfloat16.
        saved: bytes of activations that are kept for the backward pass.
        held: bytes of activations, gradients and intermediate results that are there at once, at most.
        trained: parameters that are trained.
    """

    flops: float = 0.0
    half_flops: float = 0.0
    moved: float = 0.0
    calls: int = 0
    attended: int = 0
    half_attended: int = 0
    saved: int = 0
    held: int = 0
    trained: int = 0

    def add_product(self, flops: float, dtype: torch.dtype) -> None:
        """Counts a matrix product in this type."""
        if dtype.itemsize < torch.float32.itemsize:
            self.half_flops += flops
        else:
            self.flops += flops

    def add_attended(self, queries: int, dtype: torch.dtype) -> None:
        """Counts queries of a backward pass in this type."""
        if dtype.itemsize < torch.float32.itemsize:
            self.half_attended += queries
        else:
            self.attended += queries


class _Attention(torch.autograd.Function):
    """Fused attention, of shapes alone where there is no data."""

    @staticmethod
    def forward(ctx: Any, work: LocalWork, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # q @ k^T and its product with v, for each head of q.
        ctx.work = work
        ctx.flops = 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        work.add_product(ctx.flops, q.dtype)
        out = q.new_ones((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.work.add_product(_ATTENTION_BACKWARD * ctx.flops, gradients[0].dtype)
        ctx.work.add_attended(gradients[0].shape[:-1].numel(), gradients[0].dtype)
        return None, *(torch.ones_like(x) for x in ctx.saved_tensors[:3])


class _FusedAttention(TorchFunctionMode):
    def __init__(self, work: LocalWork) -> None:
        super().__init__()
        self._work = work

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            return _Attention.apply(self._work, given["query"], given["key"], given["value"])
        return func(*args, **(kwargs or {}))


class _Counting(TorchDispatchMode):
    def __init__(self, work: LocalWork, held: "_Held") -> None:
        super().__init__()
        self._work = work
        self._held = held

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self._work.calls += 1
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self._work.add_product(count(*args, **(kwargs or {}), out_val=out), out.dtype)
        if not _is_view(func):
            written = sum(_bytes(x) for x in tree_leaves(out))
            gathers = func._overloadpacket.__name__ in _GATHERING
            read = written if gathers else sum(_bytes(x) for x in tree_leaves((args, kwargs)))
            self._work.moved += read + written
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    self._held.hold(x)
        return out


def _is_view(func: Any) -> bool:
    """Whether an operation returns a part of its input, and writes nothing."""
    aliases = [x.alias_info for x in func._schema.returns]
    return any(x is not None and not x.is_write for x in aliases)


def _bytes(x: Any) -> int:
    return x.numel() * x.element_size() if isinstance(x, torch.Tensor) else 0


class _Held:
    """Follows which storages are there, parameters left out."""

    def __init__(self, work: LocalWork, model: nn.Module) -> None:
        self._work = work
        self._here = _storages(model)
        self._bytes = 0

    def hold(self, x: torch.Tensor) -> None:
        """Counts a tensor's storage, until it is freed."""
        storage = x.untyped_storage()
        if storage._cdata in self._here:
            return
        self._here.add(storage._cdata)
        self._bytes += storage.nbytes()
        self._work.held = max(self._work.held, self._bytes)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, number: int, nbytes: int) -> None:
        self._here.discard(number)
        self._bytes -= nbytes


class _Saved:
    """Adds up the storages that are kept for the backward pass, each once, parameters left out."""

    def __init__(self, work: LocalWork, model: nn.Module) -> None:
        self._work = work
        self._seen = _storages(model)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._work.saved += storage.nbytes()
        return x


def _storages(model: nn.Module) -> set[int]:
    return {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}


@contextmanager
def counted(work: LocalWork, model: nn.Module) -> Iterator[None]:
    """Counts the operations of the block, and the parameters that are trained.

    Args:
        work: gets the figures.
        model: with its adapter.
    """
    work.trained = sum(x.numel() for x in model.parameters() if x.requires_grad)
    saved = _Saved(work, model)
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x)
    with hooks, _FusedAttention(work), _Counting(work, _Held(work, model)):
        yield
