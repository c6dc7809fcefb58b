"""From a YAML file to a recipe: what is wrong is named by its line, its key, and what would be right."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blindtune.client.recipe import Recipe, load_recipe, write_recipe
from blindtune.client.recipe.document import parse_recipe
from blindtune.client.recipe.starting import starting_recipe, write_starting_recipe
from blindtune.errors import ConfigurationError

NAME = "run.yaml"
BASE = """model:
  name: someone/model
data:
  task: instructions
  train: train.jsonl
output:
  dir: out
"""
CLASSES = BASE.replace("task: instructions", "task: classification\n  labels: {}")


def problem(text: str, *settings: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        parse_recipe(text, NAME, settings)
    return str(caught.value)


def test_the_shortest_recipe_gets_the_documented_defaults() -> None:
    recipe = parse_recipe(BASE, NAME)
    assert recipe.model.name == "someone/model"
    assert (recipe.masking.mode, recipe.adapter.r, recipe.data.max_length) == ("shares", 8, 512)
    assert recipe.training.learning_rate == 2e-4
    assert recipe.operators == []


def test_an_unknown_key_is_named_with_its_line_and_the_one_that_was_meant() -> None:
    said = problem(BASE.replace("  train:", "  max_lenght: 5\n  train:"))
    assert said.startswith(f"{NAME}, line 5: there is no key data.max_lenght; did you mean max_length?")
    assert "the keys here are task, train, validation," in said


def test_an_unknown_section_is_named_with_its_line() -> None:
    said = problem(BASE + "trainig:\n  seed: 1\n")
    assert said.startswith(f"{NAME}, line 8: there is no key trainig; did you mean training?")
    assert "the keys here are model, quantization, masking, operators," in said


def test_an_unknown_section_without_content_is_no_empty_section() -> None:
    assert "line 8: there is no key trainig" in problem(BASE + "trainig:\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BASE + "training:\n  seed: much\n", "line 9: training.seed: should be a valid integer"),
        (
            BASE + "training:\n  num_train_epochs: [1]\n",
            "line 9: training.num_train_epochs: should be a valid",
        ),
        (BASE + "adapter:\n  r: 0\n", "line 9: adapter.r: should be greater than or equal to 1, not 0"),
        (BASE + "adapter: much\n", "line 8: adapter: should be a section with r, lora_alpha"),
        (BASE + "operators:\n  name: alpha\n", "line 8: operators: should be a valid list"),
        (
            BASE.replace("someone/model", "5"),
            "line 2: model.name: should be a valid string, not 5: put it in quotes",
        ),
        (BASE.replace("train.jsonl", "''"), "line 5: data.train: expected the path of a file"),
        (BASE.replace("train.jsonl", "|\n    a\n    b"), "line 5: data.train: expected the path of a file"),
        (BASE.replace("train.jsonl", "~no_such_user_/x"), "line 5: data.train: there is no such user's home"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_line(text: str, said: str) -> None:
    assert said in problem(text)


def test_a_wrong_choice_is_answered_with_the_right_ones() -> None:
    said = problem(BASE + "masking:\n  mode: lattise\n")
    assert (
        said == f"{NAME}, line 9: masking.mode: should be 'shares', 'lattice' or 'reference', not 'lattise'"
    )


def test_what_an_operator_lacks_is_named_at_its_own_line() -> None:
    text = BASE + "operators:\n  - name: alpha\n    workers: ['a:1']\n  - workers: ['b:1']\n    nam: beta\n"
    lines = problem(text).splitlines()
    assert f"{NAME}, line 11: operators.1.name is missing: What messages call it." in lines
    assert any(
        x.startswith(f"{NAME}, line 12: there is no key operators.1.nam; did you mean name?") for x in lines
    )


def test_a_missing_section_is_named_with_its_keys() -> None:
    lines = problem("model:\n  name: m\n").splitlines()
    assert lines[0].startswith(f"{NAME}, line 1: data is missing: a section with task, train")
    assert lines[1] == f"{NAME}, line 1: output is missing: a section with dir"


def test_a_missing_key_is_named_with_what_it_means() -> None:
    assert problem(BASE.replace("  train: train.jsonl\n", "")) == (
        f"{NAME}, line 3: data.train is missing: What to train on."
    )


def test_a_section_of_comments_alone_has_the_defaults() -> None:
    recipe = parse_recipe(BASE + "training:\n  # seed: 1\nmasking:\noperators:\n", NAME)
    assert recipe == parse_recipe(BASE, NAME)


def test_a_section_that_is_needed_and_empty_is_missing() -> None:
    assert (
        problem(BASE.replace("  dir: out\n", "")) == f"{NAME}, line 6: output is missing: a section with dir"
    )


def test_all_errors_are_told_at_once_up_to_a_limit() -> None:
    said = problem(BASE + "training:\n" + "".join(f"  wrong_{i}: 1\n" for i in range(12))).splitlines()
    assert [f"line {9 + i}: there is no key training.wrong_{i}" in x for i, x in enumerate(said[:-1])] == [
        True
    ] * 8
    assert said[-1] == "and 4 more"


def test_a_key_that_occurs_twice_is_an_error_that_quotes_no_values() -> None:
    assert problem(BASE + "output:\n  dir: elsewhere\n") == (
        f'{NAME}, line 8: this is no YAML: found duplicate key "output"'
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model:\n\tname: m\n", 2),
        ("model: [\n", 2),
        (BASE + "---\n" + BASE, 8),
        (BASE + "adapter: *nothing\n", 8),
        (BASE + "adapter: 'a\n", 9),
    ],
)
def test_broken_yaml_is_named_by_its_line(text: str, line: int) -> None:
    assert f"{NAME}, line {line}: this is no YAML: " in problem(text)


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n", "words\n", "5\n", "null\n"])
def test_a_file_that_is_no_mapping_is_answered_with_the_sections(text: str) -> None:
    assert problem(text).startswith(f"{NAME}: expected the sections model, ")


@pytest.mark.parametrize("text", [BASE + "x: \0\n", "a: " + "[" * 3000, "a: &a\n  b: *a\n" * 1])
def test_hostile_files_are_errors_of_ours(text: str) -> None:
    assert NAME in problem(text)


@pytest.mark.parametrize(
    "tag", ["python/object/apply:os.system", "python/name:os.system", "python/module:os", "x"]
)
@pytest.mark.parametrize("value", ["['touch {}']", "'touch {}'", "{{a: 'touch {}'}}"])
def test_tags_build_nothing(tag: str, value: str, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    said = problem(BASE.replace("someone/model", f"!!{tag} {value.format(proof)}"))
    assert f"{NAME}, line 2: model.name: should be a valid string" in said
    assert not proof.exists()


def test_anchors_stand_for_their_values() -> None:
    recipe = parse_recipe(BASE.replace("train: train.jsonl", "train: &x a.jsonl\n  validation: *x"), NAME)
    assert recipe.data.validation == recipe.data.train == Path("a.jsonl").absolute()


def test_an_unknown_key_that_was_merged_in_is_an_error_of_ours() -> None:
    text = BASE + "adapter: &x\n  r: 4\nquantization:\n  <<: *x\n"
    assert "line 10: there is no key quantization.r" in problem(text)


def test_an_exponent_without_a_point_is_a_number() -> None:
    assert parse_recipe(BASE + "training:\n  learning_rate: 1e-4\n", NAME).training.learning_rate == 1e-4


def test_no_stays_a_label() -> None:
    assert parse_recipe(CLASSES.format("[no, yes, off]"), NAME).data.labels == ["no", "yes", "off"]


def test_a_label_that_is_a_number_asks_for_quotes() -> None:
    said = problem(CLASSES.format("[1, 2]")).splitlines()
    assert said[0] == f"{NAME}, line 5: data.labels.0: should be a valid string, not 1: put it in quotes"


@pytest.mark.parametrize("labels", ["[]", "[a]", "[a, b, a]"])
def test_labels_that_no_classifier_can_have_are_refused(labels: str) -> None:
    assert "line 3: data.labels needs two or more names, all different" in problem(CLASSES.format(labels))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("task: instructions", "task: instructions\n  labels: [a, b]", "data.labels belongs to data.task"),
        ("task: instructions", "task: classification\n  system: x", "data.system belongs to data.task"),
        ("task: instructions", "task: instructions\n  format: text-label", "data.format: text-label belongs"),
        (
            "task: instructions",
            "task: classification\n  format: question",
            "takes format text-label, not question",
        ),
    ],
)
def test_keys_of_the_other_task_are_refused_at_the_section(old: str, new: str, said: str) -> None:
    found = problem(BASE.replace(old, new))
    assert found.startswith(f"{NAME}, line 3: ")
    assert said in found


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("output_dir", "write output.dir instead"),
        ("fp16", "use bf16"),
        ("report_to", "nothing is sent to anyone but the workers"),
        ("hub_token", "nothing is sent to anyone but the workers"),
        ("deepspeed", "runs on one device"),
    ],
)
def test_a_refused_training_argument_says_why(name: str, reason: str) -> None:
    said = problem(BASE + f"training:\n  {name}: x\n")
    assert said.startswith(f"{NAME}, line 9: training.{name} can't be set: ")
    assert reason in said


def test_a_misspelt_training_argument_is_found_without_listing_all_of_them() -> None:
    said = problem(BASE + "training:\n  learning_rat: 1\n")
    assert said == f"{NAME}, line 9: there is no key training.learning_rat; did you mean learning_rate?"


@pytest.mark.parametrize(
    "setting",
    [
        "learning_rate: .nan",
        "learning_rate: -1",
        "num_train_epochs: .inf",
        "num_train_epochs: 0",
        "per_device_train_batch_size: 0",
        "gradient_accumulation_steps: 0",
        "seed: -1",
        "seed: 4294967296",
    ],
)
def test_numbers_with_which_no_run_can_work_are_refused_beforehand(setting: str) -> None:
    assert f"{NAME}, line 9: training.{setting.split(':')[0]}: should be " in problem(
        BASE + f"training:\n  {setting}\n"
    )


class TestSet:
    def test_a_nested_key_is_changed(self) -> None:
        assert parse_recipe(BASE, NAME, ["model.name=b", "data.max_length=7"]).data.max_length == 7

    def test_a_section_that_is_not_there_is_made(self) -> None:
        assert parse_recipe(BASE, NAME, ["training.learning_rate=1e-3"]).training.learning_rate == 1e-3

    def test_a_section_of_comments_alone_is_filled(self) -> None:
        assert parse_recipe(BASE + "training:\n", NAME, ["training.seed=5"]).training.seed == 5

    def test_the_last_one_counts(self) -> None:
        assert parse_recipe(BASE, NAME, ["adapter.r=2", "adapter.r=3"]).adapter.r == 3

    def test_a_value_may_be_a_list(self) -> None:
        recipe = parse_recipe(BASE, NAME, ["adapter.target_modules=[q_proj, 'no']"])
        assert recipe.adapter.target_modules == ["q_proj", "no"]

    def test_an_entry_of_a_list_is_changed(self) -> None:
        text = BASE + "operators:\n  - name: a\n    workers: ['h:1']\n  - name: b\n    workers: ['i:1']\n"
        recipe = parse_recipe(text, NAME, ["operators.1.workers=['j:2']", "operators.0.name=c"])
        assert [(x.name, x.workers) for x in recipe.operators] == [("c", ["h:1"]), ("b", ["j:2"])]

    def test_nothing_takes_a_value_away(self) -> None:
        text = BASE.replace("train:", "validation: v\n  train:")
        assert parse_recipe(text, NAME, ["data.validation="]).data.validation is None

    def test_an_equals_sign_in_a_value_belongs_to_it(self) -> None:
        assert parse_recipe(BASE, NAME, ["data.system=a=b"]).data.system == "a=b"

    @pytest.mark.parametrize("setting", ["seed", "=1", "a..b=1", ".a=1", "training.=1", ""])
    def test_another_form_is_refused(self, setting: str) -> None:
        assert problem(BASE, setting) == (
            f"--set {setting}: expected section.key=value, as in training.learning_rate=1e-4"
        )

    @pytest.mark.parametrize("index", ["2", "-1", "x", "²"])
    def test_an_entry_that_is_not_there_is_refused(self, index: str) -> None:
        text = BASE + "operators:\n  - name: a\n    workers: ['h:1']\n  - name: b\n    workers: ['i:1']\n"
        for key in (f"operators.{index}.name", f"operators.{index}"):
            assert problem(text, f"{key}=c") == f"--set {key}=c: there are 2 entries, counted from 0"

    def test_a_value_holds_no_keys(self) -> None:
        assert problem(BASE, "model.name.x=1") == "--set model.name.x=1: name is a value, and holds no keys"

    def test_a_value_that_is_no_yaml_is_refused(self) -> None:
        assert problem(BASE, "model.name=[a").startswith("--set model.name=[a: the value is no YAML")

    @pytest.mark.parametrize(
        ("setting", "said"),
        [
            ("training.seed=x", "--set training.seed: training.seed: should be a valid integer"),
            ("training.sed=1", "--set training.sed: there is no key training.sed; did you mean seed?"),
            ("trainin.seed=1", "--set trainin.seed: there is no key trainin; did you mean training?"),
            ("model=m", "--set model: model: should be a section with name"),
            ("adapter.r=0", "--set adapter.r: adapter.r: should be greater"),
            ("data.labels=[a, b]", "--set data.labels: data.labels belongs to data.task: classification"),
            ("training.fp16=true", "--set training.fp16: training.fp16 can't be set: fp16 scales losses"),
            ("operators=[{name: a}]", "--set operators: operators.0.workers is missing"),
        ],
    )
    def test_errors_name_the_option_and_not_a_line(self, setting: str, said: str) -> None:
        found = problem(BASE, "model.revision=main", setting)
        assert found.startswith(said)
        assert NAME not in found

    def test_errors_of_the_file_keep_their_lines(self) -> None:
        assert problem(BASE + "adapter:\n  r: 0\n", "adapter.lora_alpha=2").startswith(
            f"{NAME}, line 9: adapter.r"
        )


def test_relative_paths_are_those_of_the_folder_in_which_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models/m").mkdir(parents=True)
    text = BASE.replace("someone/model", "models/m")
    recipe = parse_recipe(
        text
        + "operators:\n  - {name: a, workers: ['h:1'], ca: c/ca.pem, cert: c/cert.pem, key: c/key.pem}\n",
        NAME,
    )
    assert recipe.model.name == str(tmp_path / "models/m")
    assert recipe.data.train == tmp_path / "train.jsonl"
    assert recipe.output.dir == tmp_path / "out"
    assert recipe.operators[0].key == tmp_path / "c/key.pem"


def test_the_home_folder_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_recipe(BASE.replace("train.jsonl", "~/t.jsonl"), NAME).data.train == tmp_path / "t.jsonl"


def test_a_written_recipe_names_key_files_and_holds_nothing_of_them(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_text("-----BEGIN PRIVATE KEY-----\nplanted\n")
    text = BASE + f"operators:\n  - {{name: a, workers: ['h:1'], ca: {key}, cert: {key}, key: {key}}}\n"
    write_recipe(parse_recipe(text, NAME), tmp_path / NAME)
    written = (tmp_path / NAME).read_text()
    assert str(key) in written
    assert "planted" not in written and "PRIVATE" not in written


def test_what_is_no_path_but_the_content_of_a_key_is_refused_without_showing_it() -> None:
    pem = "|\n      -----BEGIN PRIVATE KEY-----\n      planted\n"
    said = problem(BASE + f"operators:\n  - name: a\n    workers: ['h:1']\n    key: {pem}")
    assert "line 11: operators.0.key: expected the path of a file" in said
    assert "planted" not in said


@pytest.mark.parametrize("task", ["instructions", "classification"])
@pytest.mark.parametrize("masking", ["shares", "lattice"])
def test_what_init_writes_is_a_recipe(task: str, masking: str, tmp_path: Path) -> None:
    path = tmp_path / NAME
    write_starting_recipe(task, masking, path)
    recipe = load_recipe(path)
    assert (recipe.data.task, recipe.masking.mode) == (task, masking)
    assert len(recipe.operators) == {"shares": 2, "lattice": 1}[masking]
    assert not recipe.masking.insecure and not recipe.masking.allow_one_machine
    with pytest.raises(ConfigurationError, match="exists: choose another file"):
        write_starting_recipe(task, masking, path)


def test_keys_that_init_leaves_commented_out_are_keys() -> None:
    for task in ("instructions", "classification"):
        text = starting_recipe(task, "shares")
        for line in text.splitlines():
            start, mark, rest = line.partition("# ")
            if not start.strip() and mark and rest.split(":")[0].isidentifier() and line.startswith("  "):
                text = text.replace(line, f"{start}{rest}")
        recipe = parse_recipe(text, NAME)
        assert recipe.model.revision == "main"
        assert recipe.data.train_examples == 1000


@pytest.mark.parametrize(("task", "masking"), [("chat", "shares"), ("instructions", "reference")])
def test_init_refuses_what_there_is_no_template_for(task: str, masking: str) -> None:
    with pytest.raises(ConfigurationError, match="is one of"):
        starting_recipe(task, masking)


def test_init_into_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be written: No such file"):
        write_starting_recipe("instructions", "shares", tmp_path / "none" / NAME)


@pytest.mark.parametrize("content", [b"model: \xff\xfe\n", None])
def test_a_file_that_cannot_be_read_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / NAME
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"cannot read the configuration {path}"):
        load_recipe(path)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    [
        "no",
        "1e-4",
        "null",
        "~",
        "",
        " a ",
        "a: b",
        "- a",
        "0x1f",
        "2024-01-01",
        "a\nb\n",
        "#",
        "\x85",
        "\ufeff",
    ]
)


@settings(deadline=None, max_examples=40)
@given(
    system=TEXTS,
    name=TEXTS.filter(bool),
    rate=st.floats(0, 1e300, allow_nan=False),
    modules=st.lists(TEXTS.filter(str.strip), min_size=1, max_size=3),
)
def test_a_written_recipe_is_read_back_as_the_same(
    system: str, name: str, rate: float, modules: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    sections: dict[str, Any] = {
        "model": {"name": "m"},
        "operators": [{"name": name, "workers": ["h:1"]}],
        "adapter": {"target_modules": modules, "rank_pattern": {"a.b": 3}},
        "data": {"task": "instructions", "train": "t", "system": system},
        "training": {"learning_rate": rate, "lr_scheduler_kwargs": {"a": [1, 2.5, None]}},
        "output": {"dir": "out"},
    }
    recipe = Recipe.model_validate(sections)
    path = tmp_path_factory.getbasetemp() / NAME
    write_recipe(recipe, path)
    assert load_recipe(path) == recipe
