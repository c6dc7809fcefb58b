"""What the client computes itself in a training step: attention, norms, LoRA matrices, the loss.

It is counted, not looked up: every operation of a step on the model without weights passes by a
`TorchDispatchMode`, so that any architecture is counted as it computes. An operation is

    its floating-point operations, if it is a matrix product (twice the multiply-adds)
    the bytes that it reads and writes, which for few rows are most of a product too; none for a view
    the bytes of large arrays that it makes, whose memory the system provides anew each time
    one call, and if it is large enough for several threads, their being woken up and waited for

Attention is counted as one fused operation, as processors compute it, and not as the products that it
consists of where there is no processor. Its backward pass takes a time for each block of queries besides,
which in bfloat16 is most of it.

What the operations give is held in memory until nothing refers to it any more, and so it is followed.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["LARGE_BYTES", "LocalWork", "counted"]

# These read as much of their input as they write, and not all of it.
_GATHERING = {"embedding", "index", "index_select", "gather"}
# The backward pass of fused attention computes the scores again: five products instead of two.
_ATTENTION_BACKWARD = 2.5
# Queries of one head that it takes at once, where there are fewer than 192; with more, it takes 64 or 256.
_BLOCK_QUERIES = 32
# torch divides the elements of an operation among threads in parts no smaller than this.
_SHARED_ELEMENTS = 32768

LARGE_BYTES = 32 << 20
"""From here on, memory of arrays is not kept for others, see `blindtune.protocol.kernels.allocator`."""


@dataclass
class LocalWork:
    """Work of a training step at the client.

    Attributes:
        flops: of matrix products in float32.
        half_flops: of those in bfloat16.
        moved: bytes that operations read and write, but for bfloat16.
        half_moved: those of bfloat16, with which processors compute by way of float32.
        calls: operations.
        shared: of them, those that several threads share.
        fresh: bytes of arrays that are too large for memory to be kept for the next ones.
        attended: blocks of queries of one head in the backward pass of attention in float32.
        half_attended: those in bfloat16.
        saved: bytes of activations that are kept for the backward pass.
        saved_large: of them, those of arrays that are counted in ``fresh``.
        held: bytes of activations, gradients and intermediate results that are there at once, at most.
        held_large: those of arrays that are counted in ``fresh``, at most.
        held_small: those of all others, at most.
        trained: parameters that are trained.
    """

    flops: float = 0.0
    half_flops: float = 0.0
    moved: float = 0.0
    half_moved: float = 0.0
    calls: int = 0
    shared: int = 0
    fresh: int = 0
    attended: int = 0
    half_attended: int = 0
    saved: int = 0
    saved_large: int = 0
    held: int = 0
    held_large: int = 0
    held_small: int = 0
    trained: int = 0

    def add_product(self, flops: float, dtype: torch.dtype) -> None:
        """Counts a matrix product in this type."""
        if dtype.itemsize < torch.float32.itemsize:
            self.half_flops += flops
        else:
            self.flops += flops

    def add_moved(self, x: torch.Tensor) -> None:
        """Counts an array that is read or written."""
        if x.dtype.itemsize == torch.bfloat16.itemsize:
            self.half_moved += x.nbytes
        else:
            self.moved += x.nbytes

    def add_attended(self, shape: torch.Size, dtype: torch.dtype) -> None:
        """Counts the blocks of queries, [..., queries, features], of a backward pass in this type."""
        blocks = shape[:-2].numel() * ceil(shape[-2] / _BLOCK_QUERIES)
        if dtype.itemsize < torch.float32.itemsize:
            self.half_attended += blocks
        else:
            self.attended += blocks


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
        ctx.work.add_attended(gradients[0].shape, gradients[0].dtype)
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
            made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            read = made if func._overloadpacket.__name__ in _GATHERING else given
            for x in (*read, *made):
                self._work.add_moved(x)
            self._work.shared += any(x.numel() > _SHARED_ELEMENTS for x in (*read, *made))
            for x in made:
                self._held.hold(x)
        return out


def _is_view(func: Any) -> bool:
    """Whether an operation returns a part of its input, and writes nothing."""
    aliases = [x.alias_info for x in func._schema.returns]
    return any(x is not None and not x.is_write for x in aliases)


class _Held:
    """Follows which storages are there, parameters left out."""

    def __init__(self, work: LocalWork, model: nn.Module) -> None:
        self._work = work
        self._here = _storages(model)
        self._small = self._large = 0

    def hold(self, x: torch.Tensor) -> None:
        """Counts a tensor's storage, until it is freed."""
        storage = x.untyped_storage()
        if storage._cdata in self._here:
            return
        self._here.add(storage._cdata)
        self._work.fresh += storage.nbytes() if storage.nbytes() >= LARGE_BYTES else 0
        self._add(storage.nbytes(), 1)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, number: int, nbytes: int) -> None:
        self._here.discard(number)
        self._add(nbytes, -1)

    def _add(self, nbytes: int, sign: int) -> None:
        if nbytes >= LARGE_BYTES:
            self._large += sign * nbytes
        else:
            self._small += sign * nbytes
        work = self._work
        work.held_small, work.held_large = (
            max(work.held_small, self._small),
            max(work.held_large, self._large),
        )
        work.held = max(work.held, self._small + self._large)


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
            self._work.saved_large += storage.nbytes() if storage.nbytes() >= LARGE_BYTES else 0
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
