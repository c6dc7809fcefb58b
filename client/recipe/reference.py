"""The configuration reference and the JSON schema for editors, both made from the models of a recipe.

    python -m blindtune.client.recipe.reference docs

writes ``configuration.md`` and ``blindtune.schema.json`` to a folder.
"""

import dataclasses
import enum
import json
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from blindtune.client.recipe.hf_arguments import DEFAULTS, REFUSED_VALUES, refused
from blindtune.client.recipe.schema import Recipe

__all__ = ["FILES", "configuration_page", "json_schema", "write_reference"]

_ARGUMENTS_PAGE = (
    "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"
)
_MOST_CHOICES = 12
_TYPES = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "object": "mapping",
    "null": "nothing",
}
_LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}

_HEAD = """\
# Configuration

One YAML file says everything about a run. `blindtune init instructions` or `blindtune init classification`
writes one to start from; [quickstart.md](quickstart.md) goes on from there, and [tasks.md](tasks.md) tells
what the keys of `data` do.

- Paths are relative to the folder in which you run the command.
- The file is YAML 1.2: `1e-4` is a number, and `no` is a text.
- An unknown key is an error, and so is a value of the wrong type. The message names the line.
- A default of "none" is written `null` in YAML.
- `--set section.key=value` changes a value from the command line. Operators are counted from 0:
  `--set operators.0.workers='["10.0.0.7:7100"]'`.
- A run writes the file with everything that it resolved to as `recipe.yaml` to its output folder.

An editor that knows the YAML language server completes and checks the file when its first line is

```yaml
# yaml-language-server: $schema=blindtune.schema.json
```

with the path or the address of [blindtune.schema.json](blindtune.schema.json). `blindtune schema` prints the
same schema for the installed version.

This page is made from the code by `make docs`.
"""


def json_schema() -> str:
    """The schema as text, with keys in the order of the models."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Recipe.model_json_schema(),
    }
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def configuration_page() -> str:
    """The reference as Markdown."""
    schema = Recipe.model_json_schema()
    parts = [_HEAD]
    for name, reference in schema["properties"].items():
        section = _resolved(reference, schema)
        needed = "Must be there." if name in schema.get("required", ()) else "May be left out."
        if reference.get("type") == "array":
            section = _resolved(reference["items"], schema)
            needed = (
                "A list, with these keys in each entry. May be left out with `masking.mode: reference` only."
            )
        about = textwrap.fill(f"{_markdown(section['description'])} {needed}", 108)
        parts.append(f"## {name}\n\n{about}\n")
        parts.append(_training(section) if name == "training" else _section(section))
    return "\n".join(parts)


FILES = {"configuration.md": configuration_page, "blindtune.schema.json": json_schema}
"""What is written, and by which function."""


def write_reference(folder: Path) -> None:
    """Writes both files."""
    for name, content in FILES.items():
        (folder / name).write_text(content(), encoding="utf-8")


def _resolved(node: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """A node, with what it refers to."""
    if "$ref" in node:
        return dict(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]])
    return dict(node)


def _section(section: Mapping[str, Any]) -> str:
    required = section.get("required", ())
    return _table(
        ("key", "type", "default", "meaning"),
        (
            (
                f"`{key}`",
                _type(node),
                "must be given" if key in required else _default(node),
                node["description"],
            )
            for key, node in section["properties"].items()
        ),
    )


def _training(section: Mapping[str, Any]) -> str:
    """Hugging Face's own arguments, and what is done differently with them here."""
    fields = {x.name: x for x in dataclasses.fields(TrainingArguments)}
    changed = (
        (f"`{name}`", _value(value), _value(_stock_default(fields[name]))) for name, value in DEFAULTS.items()
    )
    reasons = defaultdict(list)
    for name in sorted(fields):
        why = refused(name)
        if why is not None and fields[name].init:
            reasons[why].append(name)
    for name, (value, why) in REFUSED_VALUES.items():
        reasons[why].append(f"{name}: {json.dumps(value)}")
    left_out = ((", ".join(f"`{x}`" for x in names), why) for why, names in reasons.items())
    others = (
        (f"`{key}`", _type(node), _default(node))
        for key, node in section["properties"].items()
        if key not in DEFAULTS
    )
    return "\n".join(
        (
            f"What each does stands on [Hugging Face's page]({_ARGUMENTS_PAGE}).\n",
            "Defaults that differ from Hugging Face's:\n",
            _table(("argument", "default here", "Hugging Face's"), changed),
            "Arguments that can't be set:\n",
            _table(("argument", "why"), left_out),
            "All others, with Hugging Face's default:\n",
            _table(("argument", "type", "default"), others),
        )
    )


def _stock_default(field: Any) -> Any:
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    return value.value if isinstance(value, enum.Enum) else value


def _type(node: Mapping[str, Any]) -> str:
    """What a value may be, in words."""
    if "anyOf" in node:
        # Nothing is what an optional value is by default, and the default has a column.
        return " or ".join(dict.fromkeys(_type(x) for x in node["anyOf"] if x.get("type") != "null"))
    choices = node.get("enum", [node["const"]] if "const" in node else None)
    if choices is not None:
        if len(choices) > _MOST_CHOICES:
            return f"one of {len(choices)} names, listed in the schema"
        return " or ".join(_value(x) for x in choices)
    if node.get("type") == "array":
        return f"list of {_plural(_type(node.get('items', {})))}"
    if node.get("type") == "object" and isinstance(node.get("additionalProperties"), dict):
        return f"mapping of names to {_plural(_type(node['additionalProperties']))}"
    if node.get("format") == "path":
        return "path"
    limits = [f"{words} {node[key]:g}" for key, words in _LIMITS.items() if key in node]
    return ", ".join((_TYPES[node["type"]], *limits))


def _markdown(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


def _plural(words: str) -> str:
    return f"{words}s"


def _default(node: Mapping[str, Any]) -> str:
    if "default" not in node:
        return "empty"
    return "none" if node["default"] is None else _value(node["default"])


def _value(value: Any) -> str:
    """A value as it stands in YAML."""
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = tuple(head)
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Writes both files to the folder that the command line names."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m blindtune.client.recipe.reference FOLDER")
    write_reference(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
