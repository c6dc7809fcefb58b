"""``blindtune init``: a commented configuration for a task."""

from importlib.resources import files
from pathlib import Path
from typing import get_args

from blindtune.client.recipe.schema import Task
from blindtune.errors import ConfigurationError

__all__ = ["starting_recipe", "write_starting_recipe"]

_MASKINGS = ("shares", "lattice")


def starting_recipe(task: str, masking: str) -> str:
    """The text of a configuration.

    Raises:
        ConfigurationError: there is no such task or masking.
    """
    for name, value, allowed in (("task", task, get_args(Task)), ("masking", masking, _MASKINGS)):
        if value not in allowed:
            raise ConfigurationError(f"{name} is one of {', '.join(allowed)}, not {value!r}")
    folder = files("blindtune.client.recipe") / "templates"
    parts = (f"{task}-model.yaml", f"{masking}.yaml", f"{task}-data.yaml", "training.yaml")
    return "\n".join((folder / part).read_text(encoding="utf-8") for part in parts)


def write_starting_recipe(task: str, masking: str, path: Path) -> None:
    """Writes it to a new file.

    Raises:
        ConfigurationError: the file exists, or can't be written.
    """
    text = starting_recipe(task, masking)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigurationError(f"{path} exists: choose another file with --output") from None
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from None
