"""`AbsentWeight`: what stands for a weight that workers hold.

It tells the weight's shape, type and device, and takes no memory. Whatever else it is asked is refused unless
it is on a list: code that computes with a weight which is not here must fail, and not compute with nothing.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

import torch
from torch.overrides import resolve_name

from blindtune.checkpoint.weight_reads import DESCRIBES, FOLLOWS_SHAPE, FOLLOWS_TYPE, KEEPS
from blindtune.errors import UnsupportedError

__all__ = ["AbsentWeight"]


class AbsentWeight(torch.Tensor):
    """Stands for a weight that workers hold.

    Args:
        shape: of the weight.
        dtype, device: of the module's parameters.
        name: of the weight in its model, for errors.
    """

    # Transformers initializes whatever is not marked.
    _is_hf_initialized = True
    weight_name: str

    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, name: str
    ) -> "AbsentWeight":
        self = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        # What exports memory, such as DLPack, asks nobody: it would hand on a null pointer.
        torch._C._set_throw_on_mutable_data_ptr(self)
        self.weight_name = name
        return self

    def like(self, example: torch.Tensor) -> "AbsentWeight":
        """The same weight with the type and device of ``example``."""
        return AbsentWeight(self.shape, example.dtype, example.device, self.weight_name)

    def placeholder(self) -> torch.Tensor:
        """An ordinary tensor without elements, of this type and on this device."""
        return torch.empty(0, dtype=self.dtype, device=self.device)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in DESCRIBES:
            return super().__torch_function__(func, types, args, kwargs)
        first = args[0] if args else None
        if func in KEEPS and isinstance(first, AbsentWeight):
            moved = func(first.placeholder(), *args[1:], **kwargs)
            return first.like(moved) if isinstance(moved, torch.Tensor) else moved
        if func in FOLLOWS_SHAPE and isinstance(first, AbsentWeight):
            shaped = torch.empty(first.shape, dtype=first.dtype, device="meta")
            return func(shaped, *args[1:], **{"device": first.device, **kwargs})
        if func in FOLLOWS_TYPE:
            # It stands in one place for its type. In any other it would be asked for its numbers.
            place = 1 if func in KEEPS else 0
            example = args[place] if len(args) > place else None
            others = [*args[:place], *args[place + 1 :]]
            if isinstance(example, AbsentWeight) and _first_absent((others, kwargs)) is None:
                return func(*args[:place], example.placeholder(), *args[place + 1 :], **kwargs)
        if func in _SETS_GRADIENT and [*args[1:], *kwargs.values()] == [False]:
            return first
        _refuse(_name_of(func), (args, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> NoReturn:
        """Reached by operations that start below Python; nothing on the list above does."""
        _refuse(str(func), (args, kwargs))

    def __copy__(self) -> "AbsentWeight":
        return self.like(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "AbsentWeight":
        return self.like(self)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a model with remote layers cannot be pickled: save its adapter instead")

    def __format__(self, specification: str) -> str:
        return format(repr(self), specification)

    def __repr__(self) -> str:  # type: ignore[override]
        return (
            f"AbsentWeight({self.weight_name}, shape={tuple(self.shape)}, dtype={self.dtype}, with workers)"
        )


_SETS_GRADIENT = {torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__}  # type: ignore[attr-defined]


def _refuse(operation: str, arguments: object) -> NoReturn:
    weight = _first_absent(arguments)
    name = "a base weight" if weight is None else weight.weight_name
    raise UnsupportedError(
        f"{name} stays with the workers, and {_reader()} needs its numbers ({operation}). Whatever reads "
        "base weights (DoRA, PiSSA and other adapters or initializations of their kind, merging, fused "
        "output heads) cannot run on a remote model: use adapters that only add to what a layer computes, "
        "as plain LoRA does, merge the saved adapter where the base model is, and keep an output head that a "
        "loss reads here with head='local'"
    )


def _name_of(func: Callable[..., Any]) -> str:
    """Of an operation, as one writes it; some have several."""
    found = resolve_name(func) or ""
    name = getattr(func, "__name__", str(func))
    return found if name.startswith("__") or found.endswith(f".{name}") else f"torch.{name}"


def _first_absent(value: object) -> AbsentWeight | None:
    if isinstance(value, AbsentWeight):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((found for part in parts if (found := _first_absent(part)) is not None), None)


def _reader() -> str:
    """The function outside torch that asked, by its module and name."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module != __name__ and module.partition(".")[0] != "torch":
            return f"{module}.{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "something"
