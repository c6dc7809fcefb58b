"""Whether the optimizer is there and reads what the recipe gives it: what is not read has no effect."""

from collections.abc import Iterator
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext, _parse_optim_args
from transformers.training_args import OptimizerNames

from blindtune.errors import ConfigurationError

__all__ = ["require_optimizer"]


class _Noted(dict[str, str]):
    """Arguments that know which of them were asked for."""

    def __init__(self, given: dict[str, str]) -> None:
        super().__init__(given)
        self.unread = list(given)

    def _note(self, name: str) -> None:
        if name in self.unread:
            self.unread.remove(name)

    def __iter__(self) -> Iterator[str]:
        self.unread = []  # somebody takes all of them
        return super().__iter__()

    def __getitem__(self, name: str) -> str:
        self._note(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self._note(name)
        return super().get(name, default)

    def pop(self, name: str, *default: Any) -> Any:
        self._note(name)
        return super().pop(name, *default)


class _Watched:
    """Training arguments that know which of them were asked for."""

    def __init__(self, arguments: TrainingArguments) -> None:
        self._arguments = arguments
        self.read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self._arguments, name)


def require_optimizer(arguments: TrainingArguments) -> None:
    """Checks that the optimizer is installed, and reads what only optimizers read.

    Raises:
        ConfigurationError: it is not, or something is malformed or not read.
    """
    given = arguments.optim_args or ""
    try:
        noted = _Noted(_parse_optim_args(given if isinstance(given, str) else str(given)))
    except ValueError:
        raise ConfigurationError(
            f"training.optim_args: {given!r} is not of the form name=value,name=value"
        ) from None
    name = OptimizerNames(arguments.optim).value
    watched: Any = _Watched(arguments)
    context = OptimizerContext(
        args=watched,
        model=None,
        optimizer_kwargs={"lr": arguments.learning_rate},
        adam_kwargs={},
        optim_args=noted,
    )
    try:
        _OPTIMIZER_HANDLERS[arguments.optim](context)
    except Exception as error:  # optimizers of other packages raise errors of any kind
        what = " ".join(str(error).split())
        # Some want the model, which is not here yet. They have asked for what they read by then.
        if not ("need to pass a" in what and "model" in what):
            raise ConfigurationError(f"training.optim {name}: {what}") from None
    then = "correct the name, leave it out, or take another training.optim"
    if noted.unread:
        raise ConfigurationError(
            f"training.optim_args: optimizer {name} reads no {noted.unread[0]} from there: {then}"
        )
    if arguments.optim_target_modules is not None and "optim_target_modules" not in watched.read:
        raise ConfigurationError(
            f"training.optim_target_modules: optimizer {name} does not read it: leave it out, or "
            "take another training.optim"
        )
