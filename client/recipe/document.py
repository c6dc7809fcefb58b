"""From a YAML file to a `Recipe`, with errors that name the line."""

import difflib
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from blindtune.client.disk import file_written_at_once
from blindtune.client.recipe.hf_arguments import refused
from blindtune.client.recipe.schema import Recipe
from blindtune.protocol.errors import ConfigurationError

__all__ = ["load_recipe", "parse_recipe", "write_recipe"]

_MOST_ERRORS = 8


def load_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        path: of the YAML file.
        settings: changes from the command line, ``section.key=value`` each, with values in YAML.

    Raises:
        ConfigurationError: the file can't be read, or what it says doesn't make a recipe; the message names
            the file, the line, the key and what would be right.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"cannot read the configuration {path} ({error}): make one with blindtune init"
        ) from None
    return parse_recipe(text, str(path), settings)


def parse_recipe(text: str, name: str, settings: Sequence[str] = ()) -> Recipe:
    """The recipe that a text describes; ``name`` is what messages call it."""
    # Round-trip mode is YAML 1.2, in which 1e-4 is a number and "no" is a text, and it keeps line numbers.
    # It builds plain values and collections only, whatever tags a file holds.
    try:
        document = YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}, line {mark.line + 1}" if mark else name
        raise ConfigurationError(f"{where}: this is no YAML: {error.problem or error.context}") from None
    except (YAMLError, ValueError) as error:
        raise ConfigurationError(f"{name}: this is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, CommentedMap):
        raise ConfigurationError(
            f"{name}: expected the sections {', '.join(Recipe.model_fields)}: blindtune init writes an example"
        )
    plain = _plain(document)
    changed = [_apply(plain, setting) for setting in settings]
    try:
        return Recipe.model_validate(plain)
    except ValidationError as error:
        details = error.errors(include_url=False)
        lines = [_explain(x, document, name, changed) for x in details[:_MOST_ERRORS]]
        if len(details) > len(lines):
            lines.append(f"and {len(details) - len(lines)} more")
        raise ConfigurationError("\n".join(lines)) from None


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Writes a recipe with everything that it resolved to; `load_recipe` reads it back as the same."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = StringIO()
    yaml.dump(recipe.model_dump(mode="json"), text)
    file_written_at_once(path, lambda file: file.write(text.getvalue().encode()))


def _plain(node: Any) -> Any:
    """The values of a document, without what remembers their layout."""
    if isinstance(node, CommentedMap):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, CommentedSeq):
        return [_plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _apply(plain: dict[str, Any], setting: str) -> tuple[str, ...]:
    """Makes one change; returns the path of what it changed."""
    key, separator, text = setting.partition("=")
    path = tuple(key.strip().split("."))
    if not separator or not all(path):
        raise ConfigurationError(
            f"--set {setting}: expected section.key=value, as in training.learning_rate=1e-4"
        )
    try:
        value = _plain(YAML(typ="rt").load(text))
    except (YAMLError, ValueError):
        raise ConfigurationError(f"--set {setting}: the value is no YAML") from None
    target: Any = plain
    for step in path[:-1]:
        if isinstance(target, list):
            if not step.isdigit() or int(step) >= len(target):
                raise ConfigurationError(f"--set {setting}: there are {len(target)} entries, counted from 0")
            target = target[int(step)]
        else:
            if target.get(step) is None:
                target[step] = {}
            target = target[step]
        if not isinstance(target, dict | list):
            raise ConfigurationError(f"--set {setting}: {step} is a value, and holds no keys")
    if isinstance(target, list):
        if not path[-1].isdigit() or int(path[-1]) >= len(target):
            raise ConfigurationError(f"--set {setting}: there are {len(target)} entries, counted from 0")
        target[int(path[-1])] = value
    else:
        target[path[-1]] = value
    return path


def _explain(
    error: ErrorDetails, document: CommentedMap, name: str, changed: Sequence[tuple[str, ...]]
) -> str:
    """One line about one finding."""
    location = tuple(str(x) for x in error["loc"])
    path, key, line = _locate(document, location)
    by_option = any(location[: len(x)] == x[: len(location)] and location for x in changed)
    where = f"--set {'.'.join(path)}" if by_option else f"{name}, line {line}"
    dotted = ".".join(path)
    if error["type"] == "extra_forbidden":
        why = refused(key) if path[:-1] == ("training",) else None
        if why:
            return f"{where}: {dotted} can't be set: {why}"
        allowed = _allowed(path[:-1])
        close = difflib.get_close_matches(key, allowed, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        listed = "" if len(allowed) > 30 else f"; the keys here are {', '.join(allowed)}"
        return f"{where}: there is no key {dotted}{hint}{listed}"
    if error["type"] == "missing":
        return f"{where}: {'.'.join(location)} is missing: {_description(location)}"
    if error["type"] == "value_error":
        return f"{where}: {error['msg'].removeprefix('Value error, ')}"
    given = error.get("input")
    shown = f", not {given!r}" if isinstance(given, str | int | float | bool | None) else ""
    return f"{where}: {dotted}: {error['msg'].replace('Input should be', 'should be')}{shown}"


def _locate(document: CommentedMap, location: tuple[str, ...]) -> tuple[tuple[str, ...], str, int]:
    """The part of an error's location that the document has or lacks, and the nearest line, from 1.

    Pydantic's locations go on below a key into the members of a union, which are no keys.
    """
    node: Any = document
    line = 1
    path: list[str] = []
    for step in location:
        if isinstance(node, CommentedMap):
            path.append(step)
            if step not in node:
                break
            line = node.lc.key(step)[0] + 1
            node = node[step]
        elif isinstance(node, CommentedSeq) and step.isdigit() and int(step) < len(node):
            path.append(step)
            line = node.lc.item(int(step))[0] + 1
            node = node[int(step)]
        else:
            break
    return tuple(path), path[-1] if path else "", line


def _section(path: Sequence[str]) -> type[BaseModel] | None:
    """The model that a path leads to."""
    current: Any = Recipe
    for step in path:
        if step.isdigit():
            continue
        field = current.model_fields.get(step)
        if field is None:
            return None
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        current = next((x for x in kinds if isinstance(x, type) and issubclass(x, BaseModel)), None)
        if current is None:
            return None
    return current


def _allowed(path: Sequence[str]) -> list[str]:
    section = _section(path)
    return list(section.model_fields) if section else []


def _description(location: Sequence[str]) -> str:
    section = _section(location[:-1])
    field = section.model_fields.get(location[-1]) if section else None
    inner = _section(location)
    if inner is not None:
        return f"a section with {', '.join(inner.model_fields)}"
    return (field.description if field else None) or "it has no default"
