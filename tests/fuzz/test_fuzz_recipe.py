"""Recipes of any bytes: a recipe, or one error that names the file."""

import string
from pathlib import Path

import pytest
from fuzzing import JSON, dumped, examples, refused_or_fine, spoiled, spoiled_json
from hypothesis import example, given
from hypothesis import strategies as st

from blindtune.client.recipe.document import load_recipe, parse_recipe
from blindtune.errors import ConfigurationError

VALID = b"""\
model: {name: /models/llama, dtype: float32}
masking:
  mode: shares
  request_timeout: 300.0
operators:
- name: alpha
  workers: [alpha.example:7100]
  ca: a/ca.pem
- &beta
  name: beta
  workers: ['beta.example:7100']
adapter: {r: 8, rank_pattern: {q_proj: 4}}
data:
  task: instructions
  train: train.jsonl
  labels: ~
training:
  learning_rate: 1e-4
  num_train_epochs: 3
output:
  dir: out
"""
PLAIN = {
    "model": {"name": "/models/llama"},
    "operators": [{"name": "alpha", "workers": ["alpha.example:7100"], "ca": "ca.pem"}],
    "adapter": {"r": 8, "target_modules": ["q"], "rank_pattern": {"q": 4}},
    "data": {"task": "classification", "train": "train.jsonl", "labels": ["a", "b"]},
    "training": {"learning_rate": 1e-4, "per_device_train_batch_size": 4, "optim": "adamw_torch"},
    "masking": {"mode": "shares", "retry_seconds": 1.5},
    "output": {"dir": "out"},
}
LAUGHS = b"a: &a [x, x]\n" + b"".join(
    b"%c: &%c [*%c, *%c, *%c, *%c, *%c, *%c, *%c, *%c]\n" % (y, y, *[x] * 8)
    for x, y in zip(b"abcdefghijkl", b"bcdefghijklm", strict=True)
)
TOKENS = [
    *("a", "b", "model", "data", "<<", "*a", "&a ", "? ", ": ", "- ", "[", "]", "{", "}", ", ", "\n", "\n  "),
    *("|", ">", "!!set ", "!!omap ", "!!binary ", "!!timestamp ", "!!python/object/apply:os.system ", "!a "),
    *("!!python/name:os.system ", "!!float ", "!!int ", "!!null ", "2001-99-99", "2001-01-01T99:00:00Z"),
    *(
        "0x" + "f" * 5000,
        "1" * 5000,
        ".inf",
        ".nan",
        "1e999",
        "'",
        '"',
        "---",
        "...",
        "%YAML 1.1\n---\n",
        "#",
    ),
    *("\0", "\t", "\r", "\x85", "\u2028", "\ufeff", "\x1b[2J", "~", "0o7", "1_0", "=", "`", "@", "12:30:45"),
]


def load(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    # Long keys are shown as they are.
    with refused_or_fine(path, most=8 * min(len(content), 10_000) + 4000):
        load_recipe(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


@examples(150)
@given(content=spoiled(st.just(VALID)))
@example(content=VALID + b"# " + b"x" * 1_000_000)
@example(content=VALID.replace(b"llama", b"ll\0ama"))
@example(content=VALID.replace(b"r: 8", b"r: 0x" + b"f" * 5000))
@example(content=VALID + b"data: {}\n")
def test_a_damaged_recipe_is_read_or_refused(path: Path, content: bytes) -> None:
    load(path, content)


@examples(100)
@given(content=st.binary(max_size=200))
def test_bytes_that_are_no_recipe_are_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with refused_or_fine(path):
        load_recipe(path)
        raise AssertionError("accepted")


@examples(250)
@given(content=st.lists(st.sampled_from(TOKENS), max_size=25).map("".join))
@example(content="!!set ")
@example(content="a: !!float ''")
def test_fragments_of_yaml_are_refused(path: Path, content: str) -> None:
    load(path, content.encode())


@examples(200)
@given(content=spoiled_json(PLAIN).map(dumped))
@example(content=b'{"\\ud800\\udc00": 1}')
@example(content=b'{"model": {"name": "\\udfff"}}')
def test_any_value_in_any_place_is_read_or_refused(path: Path, content: bytes) -> None:
    load(path, content)


@examples(100)
@given(
    key=st.sampled_from(["training.optim", "data.labels", "operators.0.workers.0", "adapter.r", "model", ""])
    | st.text(alphabet=string.ascii_lowercase + ".0=", max_size=20),
    value=st.lists(st.sampled_from(TOKENS), max_size=8).map("".join) | JSON.map(lambda x: dumped(x).decode()),
)
def test_any_setting_of_the_command_line_is_taken_or_refused(key: str, value: str) -> None:
    with refused_or_fine(most=len(key) + 8 * len(value) + 4000):  # of one's own typing all is shown
        parse_recipe(VALID.decode(), "recipe.yaml", [f"{key}={value}"])


def test_aliases_that_multiply_are_refused_before_they_fill_the_memory(path: Path) -> None:
    path.write_bytes(LAUGHS)
    with pytest.raises(ConfigurationError, match="aliases"):
        load_recipe(path)


def test_a_key_that_stands_twice_is_refused(path: Path) -> None:
    path.write_bytes(VALID + b"output:\n  dir: elsewhere\n")
    with pytest.raises(ConfigurationError, match=r"recipe.yaml, line \d+.*duplicate"):
        load_recipe(path)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system", "!a"])
def test_a_tag_makes_nothing_but_plain_values(path: Path, tmp_path: Path, tag: str) -> None:
    touched = tmp_path / "touched"
    path.write_text(f"{VALID.decode()}x: {tag} ['touch {touched}']\n")
    with pytest.raises(ConfigurationError, match="recipe.yaml"):
        load_recipe(path)
    assert not touched.exists()
