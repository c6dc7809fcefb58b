"""From a YAML file to a `Recipe`, with errors that name the line."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from blindtune.client.process.disk import file_written_at_once
from blindtune.client.recipe.hf_arguments import refused
from blindtune.client.recipe.schema import MaskingSection, OperatorSection, Recipe
from blindtune.errors import ConfigurationError

__all__ = ["load_operators", "load_recipe", "parse_recipe", "write_recipe"]

_MOST_ERRORS = 8
# Aliases of aliases make exponentially many of a few lines.
_MOST_VALUES = 100_000
# Stand for the sections that a file of operators need not have.
_OTHERS = {"model": {"name": "-"}, "data": {"task": "instructions", "train": "-"}, "output": {"dir": "-"}}


def load_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        path: of the YAML file.
        settings: changes from the command line, ``section.key=value`` each, with values in YAML.

    Raises:
        ConfigurationError: the file can't be read, or what it says doesn't make a recipe; the message names
            the file, the line, the key and what would be right.
    """
    return parse_recipe(_text(path), str(path), settings)


def load_operators(path: Path) -> tuple[list[OperatorSection], MaskingSection]:
    """Reads operators from a recipe, or from a file with its section ``operators`` alone.

    Args:
        path: of the YAML file; a section ``masking`` may say how they are reached.

    Raises:
        ConfigurationError: it can't be read, or names none.
    """
    recipe = parse_recipe(_text(path), str(path), otherwise=_OTHERS)
    if not recipe.operators:
        raise ConfigurationError(f"{path} names no operators: it needs a section operators, as in a recipe")
    return recipe.operators, recipe.masking


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"cannot read the configuration {path} ({error}): make one with blindtune init"
        ) from None


def parse_recipe(
    text: str, name: str, settings: Sequence[str] = (), otherwise: Mapping[str, Any] = MappingProxyType({})
) -> Recipe:
    """The recipe that a text describes.

    Args:
        text: YAML.
        name: what messages call it.
        settings: see `load_recipe`.
        otherwise: sections for where it has none.
    """
    # Round-trip mode is YAML 1.2, in which 1e-4 is a number and "no" is a text, and it keeps line numbers.
    # It builds plain values and collections only, whatever tags a file holds.
    try:
        document = YAML(typ="rt").load(text)
        plain = _plain(document)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}, line {mark.line + 1}" if mark else name
        # Of a key that occurs twice, the values would be quoted as well.
        problem = str(error.problem or error.context).split(" with value ")[0]
        raise ConfigurationError(f"{where}: this is no YAML: {problem}") from None
    except RecursionError:
        raise ConfigurationError(f"{name}: this is nested too deeply") from None
    except (YAMLError, ValueError) as error:
        raise ConfigurationError(f"{name}: this is no YAML: {' '.join(str(error).split())}") from None
    except (AttributeError, IndexError, KeyError, TypeError):  # of a tag at a value of another kind
        raise ConfigurationError(f"{name}: this is no YAML: a tag does not fit its value") from None
    if not isinstance(document, CommentedMap):
        raise ConfigurationError(
            f"{name}: expected the sections {', '.join(Recipe.model_fields)}: blindtune init writes an "
            "example"
        )
    # A section of which everything is commented out is one that is not there.
    plain = {key: x for key, x in plain.items() if x is not None or key not in Recipe.model_fields}
    plain = {**otherwise, **plain}
    changed = [_apply(plain, setting) for setting in settings]
    try:
        return Recipe.model_validate(plain)
    except ValidationError as error:
        details = error.errors(include_url=False)
        lines = [_explain(x, plain, document, name, changed) for x in details[:_MOST_ERRORS]]
        if len(details) > len(lines):
            lines.append(f"and {len(details) - len(lines)} more")
        raise ConfigurationError("\n".join(lines)) from None


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Writes a recipe with everything that it resolved to; `load_recipe` reads it back as the same."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    content = recipe.model_dump(mode="json")
    # The one character that would be written as it is, and read back as a space.
    yaml.allow_unicode = "\x85" not in json.dumps(content, ensure_ascii=False)
    text = StringIO()
    yaml.dump(content, text)
    file_written_at_once(path, lambda file: file.write(text.getvalue().encode()))


def _plain(node: Any, left: Iterator[int] | None = None) -> Any:
    """The values of a document, without what remembers their layout.

    Raises:
        ValueError: they are too many, a number has more than 64 bits, or a text can't be encoded.
    """
    left = iter(range(_MOST_VALUES)) if left is None else left
    if next(left, None) is None:
        raise ValueError(f"with its aliases it has more than {_MOST_VALUES} values")
    if isinstance(node, int) and node.bit_length() > 64:
        raise ValueError("a number has more than 64 bits")
    if isinstance(node, str):
        node.encode()  # a \u escape may be half of a character
    if isinstance(node, CommentedMap):
        return {_plain(str(key), left): _plain(value, left) for key, value in node.items()}
    if isinstance(node, CommentedSeq):
        return [_plain(value, left) for value in node]
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
    except (YAMLError, ValueError, RecursionError, AttributeError, IndexError, KeyError, TypeError):
        raise ConfigurationError(f"--set {setting}: the value is no YAML: write it in quotes") from None
    target: Any = plain
    for step in path[:-1]:
        if isinstance(target, list):
            if not step.isdecimal() or int(step) >= len(target):
                raise ConfigurationError(f"--set {setting}: there are {len(target)} entries, counted from 0")
            target = target[int(step)]
        else:
            if target.get(step) is None:
                target[step] = {}
            target = target[step]
        if not isinstance(target, dict | list):
            raise ConfigurationError(f"--set {setting}: {step} is a value, and holds no keys")
    if isinstance(target, list):
        if not path[-1].isdecimal() or int(path[-1]) >= len(target):
            raise ConfigurationError(f"--set {setting}: there are {len(target)} entries, counted from 0")
        target[int(path[-1])] = value
    else:
        target[path[-1]] = value
    return path


def _explain(
    error: ErrorDetails,
    plain: dict[str, Any],
    document: CommentedMap,
    name: str,
    changed: Sequence[tuple[str, ...]],
) -> str:
    """One line about one finding."""
    location = tuple(str(x) for x in error["loc"])
    path = _existing(plain, location)
    key, dotted = path[-1] if path else "", ".".join(path)
    # What a section says about several of its keys is found where the section is.
    several = error["type"] == "value_error" and len(location) == 1
    whole = several or location[0] not in {str(x) for x in document}
    by_option = next((x for x in changed if location[: len(x)] == x or (whole and x[:1] == location)), None)
    where = f"--set {'.'.join(by_option)}" if by_option else f"{name}, line {_line(document, location)}"
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
        reason = error["msg"].removeprefix("Value error, ")
        return f"{where}: {reason}" if several else f"{where}: {dotted}: {reason}"
    given = error.get("input")
    shown = f", not {given!r}" if isinstance(given, str | int | float | bool | None) else ""
    shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
    if error["type"] == "model_type":
        return f"{where}: {dotted}: should be a section with {', '.join(_allowed(path))}{shown}"
    if error["type"] == "string_type" and isinstance(given, int | float):
        shown += ": put it in quotes"
    return f"{where}: {dotted}: {error['msg'].replace('Input should be', 'should be')}{shown}"


def _existing(plain: Any, location: tuple[str, ...]) -> tuple[str, ...]:
    """The part of an error's location that is there or lacks.

    Pydantic's locations go on below a key into the members of a union, which are no keys.
    """
    path: list[str] = []
    for step in location:
        if isinstance(plain, dict):
            path.append(step)
            if step not in plain:
                break
            plain = plain[step]
        elif isinstance(plain, list) and step.isdecimal() and int(step) < len(plain):
            path.append(step)
            plain = plain[int(step)]
        else:
            break
    return tuple(path)


def _line(document: CommentedMap, location: tuple[str, ...]) -> int:
    """The line of a location, or of the last step towards it that the document has; from 1."""
    node: Any = document
    line = 1
    for step in location:
        if isinstance(node, CommentedMap):
            key = next((x for x in node if str(x) == step), None)
            if key is None:
                break
            if key in (node.lc.data or {}):  # keys that << merged have no line here
                line = node.lc.key(key)[0] + 1
            node = node[key]
        elif isinstance(node, CommentedSeq) and step.isdecimal() and int(step) < len(node):
            line = node.lc.item(int(step))[0] + 1
            node = node[int(step)]
        else:
            break
    return line


def _section(path: Sequence[str]) -> type[BaseModel] | None:
    """The model that a path leads to."""
    current: Any = Recipe
    for step in path:
        if step.isdecimal():
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
