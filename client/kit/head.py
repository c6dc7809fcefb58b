"""Where the output head of a language model is computed."""

from typing import Literal, cast, get_args

from blindtune.checkpoint import FrozenLayer
from blindtune.errors import ConfigurationError

__all__ = ["Head", "checked_head", "head_is_remote"]

Head = Literal["auto", "local", "remote"]


def checked_head(value: str) -> Head:
    """A choice for the head.

    Raises:
        ConfigurationError: there is no such choice.
    """
    if value not in get_args(Head):
        raise ConfigurationError(f"head is one of {', '.join(get_args(Head))}, not {value!r}")
    return cast(Head, value)


def head_is_remote(layer: FrozenLayer, head: Head) -> bool:
    """Whether workers compute the output head: ``auto`` keeps it here when it is the embedding anyway."""
    return not layer.tied if head == "auto" else head == "remote"
