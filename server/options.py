"""Options of ``blindtune-worker``: every one has a twin in the environment, and every limit is one."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from functools import wraps
from typing import Annotated, Any, TypeVar, get_args

import typer

from blindtune.server.admission.limits import Limits

__all__ = ["GivenLimits", "with_twins"]

_PREFIX = "BLINDTUNE_WORKER_"
_Command = TypeVar("_Command", bound=Callable[..., None])

GivenLimits = Mapping[str, Any]
"""Stands in a command's signature for an option of each limit; the command gets their values by name."""


def with_twins(prefix: str = "", **named: str) -> Callable[[_Command], _Command]:
    """Names the twin of each option of a command: ``BLINDTUNE_WORKER_``, the prefix, and the option's name.

    Parameters of the type `GivenLimits` become options, too.

    Args:
        prefix: of this command's variables.
        named: for an option whose variable is called otherwise, what follows ``BLINDTUNE_WORKER_`` in it.
    """

    def decorated(command: _Command) -> _Command:
        signature = inspect.signature(command, eval_str=True)
        limits = [name for name, x in signature.parameters.items() if x.annotation == GivenLimits]
        names = [limit.name for limit in Limits.known()]

        @wraps(command)
        def called(**given: Any) -> None:
            for parameter in limits:
                given[parameter] = {name: given.pop(name) for name in names}
            command(**given)

        options = [
            _with_twin(option, _PREFIX + named.get(option.name, prefix + option.name.upper()))
            for parameter in signature.parameters.values()
            for option in (_limit_options() if parameter.name in limits else [parameter])
        ]
        called.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
        return called  # type: ignore[return-value]

    return decorated


def _limit_options() -> Iterator[inspect.Parameter]:
    for limit in Limits.known():
        option = Annotated[limit.kind, typer.Option(help=limit.meaning)]  # type: ignore[name-defined]
        yield inspect.Parameter(
            limit.name, inspect.Parameter.KEYWORD_ONLY, default=limit.default, annotation=option
        )


def _with_twin(parameter: inspect.Parameter, variable: str) -> inspect.Parameter:
    kind, option = get_args(parameter.annotation)
    named = copy(option)
    named.envvar = variable
    # By name, as typer calls it: an option that must be given may then follow one with a default.
    return parameter.replace(annotation=Annotated[kind, named], kind=inspect.Parameter.KEYWORD_ONLY)
