"""Documents that are made from the code, or repeat it, say what the code says."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from ruamel.yaml import YAML

from blindtune.client.process.exit_codes import ExitCode
from blindtune.client.recipe import Recipe, load_recipe
from blindtune.client.recipe.hf_arguments import DEFAULTS, REFUSED
from blindtune.client.recipe.reference import FILES, configuration_page, json_schema, write_reference
from blindtune.client.recipe.schema import Task
from blindtune.client.recipe.starting import starting_recipe

pytestmark = pytest.mark.hf
ROOT = Path(__file__).parents[3]
EXAMPLES = sorted(ROOT.glob("examples/*/recipe.yaml"))


@pytest.mark.parametrize("name", FILES)
def test_the_reference_is_that_of_the_code(name: str) -> None:
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == FILES[name](), (
        f"docs/{name} is stale: run make docs"
    )


def test_both_files_are_written(tmp_path: Path) -> None:
    write_reference(tmp_path)
    assert {x.name for x in tmp_path.iterdir()} == FILES.keys()
    assert (tmp_path / "configuration.md").read_text(encoding="utf-8") == configuration_page()


def test_the_schema_is_stable_and_names_no_folder_of_this_machine() -> None:
    assert json_schema() == json_schema()
    for text in (json_schema(), configuration_page()):
        assert str(ROOT) not in text
        assert str(Path.home() / ".cache") not in text


def test_every_key_and_every_refused_argument_is_on_the_page() -> None:
    page = configuration_page()
    for section in Recipe.model_fields:
        assert f"## {section}\n" in page
    for _, key in keys(json.loads(json_schema())):
        assert f"`{key}`" in page, key
    for name in (*DEFAULTS, *REFUSED):
        assert f"`{name}`" in page, name


def keys(schema: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Section and key of everything below a section."""
    for section, definition in schema["$defs"].items():
        for key in definition["properties"]:
            yield section, key


def unknown(value: Any, node: Mapping[str, Any], schema: Mapping[str, Any]) -> list[str]:
    """Keys of a document that its schema does not have, and those that it wants in vain."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    if isinstance(value, list) and "items" in node:
        return [x for entry in value for x in unknown(entry, node["items"], schema)]
    if not isinstance(value, Mapping) or "properties" not in node:
        return []
    wrong = [key for key in value if key not in node["properties"]]
    wrong += [key for key in node.get("required", ()) if key not in value]
    known = node["properties"]
    return wrong + [x for key in value if key in known for x in unknown(value[key], known[key], schema)]


@pytest.mark.parametrize("masking", ["shares", "lattice"])
@pytest.mark.parametrize("task", get_args(Task))
def test_the_schema_has_every_key_of_a_starting_file(task: str, masking: str) -> None:
    schema = json.loads(json_schema())
    document = YAML(typ="safe", pure=True).load(starting_recipe(task, masking))
    assert not unknown(document, schema, schema)
    document["operators"][0]["wokers"] = []
    document.pop("output")
    assert unknown(document, schema, schema) == ["output", "wokers"]


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_an_example_is_a_recipe_that_the_schema_knows(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.masking.allow_one_machine, "both operators of an example are on one machine"
    schema = json.loads(json_schema())
    assert not unknown(YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")), schema, schema)


def test_the_exit_codes_of_the_document_are_those_of_the_command() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", text, re.MULTILINE)
    assert [(int(number), meaning) for number, meaning in rows] == [(int(x), x.meaning) for x in ExitCode]
