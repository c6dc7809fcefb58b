"""A recipe's data as a model takes it: nothing is lost, changed or shown without being said."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from support.assets import minilm
from support.recipes import CHAT, GENERATION, character_tokenizer, write_lines
from transformers import AutoTokenizer

from blindtune.client.data.chat import IGNORED
from blindtune.client.data.prepared import PreparedData, prepare_data, read_questions
from blindtune.client.recipe.schema import DataSection
from blindtune.errors import DataError

pytestmark = pytest.mark.hf
MARK = "PLANTED-SECRET"
LABELLED = [{"text": f"text {i}", "label": ("b", "a", "c")[i % 3]} for i in range(9)]
QUESTIONS = [{"question": "q" * i, "answer": "a" * i} for i in range(1, 10)]


@pytest.fixture
def files(tmp_path: Path) -> Any:
    def write(train: list[Any], validation: list[Any] | None = None, **options: Any) -> DataSection:
        task = "classification" if "label" in train[0] else "instructions"
        paths = {"train": write_lines(tmp_path / "train.jsonl", train)}
        if validation is not None:
            paths["validation"] = write_lines(tmp_path / "validation.jsonl", validation)
        return DataSection.model_validate({"task": task, **paths, **options})

    return write


def prepare(section: DataSection, seed: int = 1, **options: Any) -> PreparedData:
    return prepare_data(section, character_tokenizer(options.pop("template", GENERATION), **options), seed)


def problem(section: DataSection, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        prepare(section, **options)
    assert MARK not in str(caught.value)
    return str(caught.value)


def test_labels_are_numbered_in_their_order_and_the_same_in_both_files(files: Any) -> None:
    data = prepare(files(LABELLED, LABELLED[:1]))
    assert data.labels == ["a", "b", "c"]
    assert [x["labels"] for x in data.train.rows] == [1, 0, 2] * 3
    assert data.validation is not None
    assert [x["labels"] for x in data.validation.rows] == [1]


def test_labels_of_the_recipe_keep_their_order_and_need_not_occur(files: Any) -> None:
    data = prepare(files(LABELLED, LABELLED, labels=["d", "c", "b", "a"]))
    assert data.labels == ["d", "c", "b", "a"]
    assert [x["labels"] for x in data.train.rows[:3]] == [2, 3, 1]


def test_labels_may_be_numbers(files: Any) -> None:
    data = prepare(files([{"text": "x", "label": 1}, {"text": "y", "label": 0}]))
    assert data.labels == ["0", "1"]
    assert [x["labels"] for x in data.train.rows] == [1, 0]
    same = files([{"text": "x", "label": 1}, {"text": "y", "label": 0}], labels=["1", "0"])
    assert [x["labels"] for x in prepare(same).train.rows] == [0, 1]


@pytest.mark.parametrize("kind", [int, str])
def test_whole_numbers_are_classes_in_their_order(files: Any, kind: Any) -> None:
    data = prepare(files([{"text": "x", "label": kind(x)} for x in (11, 2, 0, 10, -1, 1)]))
    assert data.labels == ["-1", "0", "1", "2", "10", "11"]
    assert [x["labels"] for x in data.train.rows] == [5, 3, 1, 4, 0, 2]
    assert not data.train.warnings


@pytest.mark.parametrize(
    ("labels", "order"), [(("10", "9", "x"), None), (("10", "09"), ["09", "10"]), (("1", "1.5"), None)]
)
def test_labels_that_are_not_all_whole_numbers_are_sorted_as_texts(
    files: Any, labels: Any, order: Any
) -> None:
    assert prepare(files([{"text": "x", "label": x} for x in labels])).labels == (order or sorted(labels))


def test_labels_that_differ_in_case_or_spaces_are_counted_and_kept(files: Any) -> None:
    labels = ("spam", "Spam ", "SPAM", "ham", "New  York", "new york")
    train = prepare(files([{"text": "x", "label": x} for x in labels])).train
    assert len(set(train.labels)) == len(labels)
    (warning,) = train.warnings
    assert "5 of 6 labels differ from another one in case or spaces alone" in warning
    assert "pam" not in warning


def test_a_pair_of_texts_is_encoded_as_a_pair(files: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    records = [{"text": "a b", "text_pair": x, "label": x} for x in ("c", "d e f")]
    rows = prepare_data(files(records, max_length=6), tokenizer, 1).train.rows
    stock = tokenizer("a b", "c")
    assert rows[0] == {
        "input_ids": stock["input_ids"],
        "token_type_ids": stock["token_type_ids"],
        "labels": 0,
    }
    assert set(rows[0]["token_type_ids"]) == {0, 1}
    assert len(rows[1]["input_ids"]) == len(rows[1]["token_type_ids"]) == 6
    assert "token_type_ids" not in prepare_data(files(LABELLED), tokenizer, 1).train.rows[0]


def test_pairs_and_single_texts_are_not_mixed(files: Any) -> None:
    pairs = [{**x, "text_pair": MARK} for x in LABELLED]
    assert "line 9: field 'text_pair' is missing" in problem(files([*pairs[:8], LABELLED[8]]))
    assert "only one has pairs of texts" in problem(files(pairs, LABELLED))


def test_records_that_say_nothing_are_left_out_and_counted_with_their_lines(
    files: Any, tmp_path: Path
) -> None:
    empty = {"question": "q", "answer": " "}
    data = prepare(files([*QUESTIONS, empty, QUESTIONS[0], *[empty] * 6]))
    assert len(data.train.rows) == len(QUESTIONS) + 1
    (warning,) = data.train.warnings
    assert warning.startswith(f"{tmp_path / 'train.jsonl'}: 7 of its records are left out")
    assert warning.endswith("line 10, line 12, line 13, line 14, line 15 and 2 more")
    assert len(data.train.digests) == len(QUESTIONS) + 8, "the whole file is what was trained on"


def test_a_file_in_which_no_record_says_anything_is_refused(files: Any) -> None:
    said = problem(files([{"question": MARK, "answer": " "}] * 3))
    assert "line 1: field 'answer' is empty; no other record of " in said
    assert "line 1: field 'answer' is empty" in problem(files([{"question": MARK, "answer": " "}]))


def test_questions_without_an_answer_are_left_out_with_a_warning(files: Any, caplog: Any) -> None:
    section = files([*QUESTIONS, {"question": MARK, "answer": ""}])
    assert len(read_questions(section, section.train, None, seed=1)) == len(QUESTIONS)
    assert "line 10" in caplog.text
    assert MARK not in caplog.text


def test_fields_that_are_not_used_are_counted(files: Any) -> None:
    records = [{**x, "id": i, **({"source": "s"} if i else {})} for i, x in enumerate(QUESTIONS)]
    assert dict(prepare(files(records)).train.unused) == {"id": 9, "source": 8}
    assert not prepare(files(QUESTIONS)).train.unused


def test_answers_that_do_not_end_are_warned_of(files: Any) -> None:
    template = GENERATION.replace("m['content'] + eos_token", "m['content']", 1)
    (warning,) = prepare(files(QUESTIONS), template=template).train.warnings
    assert "answers of 9 of 9 examples end with no token of their own" in warning
    train = prepare(files(QUESTIONS)).train
    assert train.stops == {character_tokenizer().eos_token_id}
    assert not train.warnings


def test_the_same_time_gives_the_same_tokens(files: Any) -> None:
    section = files(QUESTIONS, QUESTIONS)
    tokenizer = character_tokenizer("{{ strftime_now('%d.%m.%Y') }}" + GENERATION)
    first, again, other = (prepare_data(section, tokenizer, 1, datetime(2020, 1, day)) for day in (1, 1, 2))
    assert first.train.rows == again.train.rows != other.train.rows
    assert first.validation is not None
    assert first.validation.rows == first.train.rows


def test_a_label_that_only_validation_has_is_named_by_its_line(files: Any, tmp_path: Path) -> None:
    said = problem(files(LABELLED, [*LABELLED[:2], {"text": MARK, "label": MARK}]))
    assert said.startswith(f"{tmp_path / 'validation.jsonl'}, line 3: the label is none of the 3")


def test_a_label_that_the_recipe_lacks_is_named_by_its_line(files: Any, tmp_path: Path) -> None:
    said = problem(files([*LABELLED, {"text": MARK, "label": MARK}], labels=["a", "b", "c"]))
    assert said.startswith(f"{tmp_path / 'train.jsonl'}, line 10: the label is none of the 3")


def test_a_single_label_teaches_nothing(files: Any) -> None:
    assert "all examples have the same label" in problem(files([{"text": MARK, "label": MARK}] * 3))


def test_a_sample_has_the_classes_of_the_whole_file(files: Any) -> None:
    rare = [*LABELLED, {"text": "z", "label": "rare"}]
    for seed in range(5):
        data = prepare(files(rare, rare, train_examples=1), seed)
        assert data.labels == ["a", "b", "c", "rare"]
        assert len(data.train.rows) == len(data.train.parsed) == 1
        assert data.validation is not None
        assert len(data.validation.rows) == 10


def test_a_broken_line_shows_even_where_the_sample_leaves_it_out(files: Any) -> None:
    broken = [*QUESTIONS, {"question": MARK, "answer": [MARK]}]
    for seed in range(5):
        assert "line 10: field 'answer' should be a text" in problem(
            files(broken, train_examples=1), seed=seed
        )


def test_the_same_seed_gives_the_same_sample(files: Any) -> None:
    section = files(QUESTIONS, QUESTIONS, train_examples=4, validation_examples=3)
    one, other = prepare(section, 5), prepare(section, 5)
    assert one == other
    assert [x.where for x in one.train.parsed] != [x.where for x in prepare(section, 6).train.parsed]
    assert (len(one.train.rows), len(one.validation.rows if one.validation else [])) == (4, 3)


def test_examples_keep_their_order_without_a_sample(files: Any) -> None:
    rows = prepare(files(QUESTIONS)).train.rows
    assert [len(x["input_ids"]) for x in rows] == sorted(len(x["input_ids"]) for x in rows)


def test_what_is_too_long_is_counted_and_what_teaches_nothing_is_dropped(files: Any) -> None:
    records = [{"prompt": "p" * n, "completion": "c" * 3} for n in (1, 4, 5, 7, 8, 9)]
    data = prepare(files(records, max_length=8), template=None)
    # With its end a completion has four tokens: the second example just fits, the third is cut.
    assert [len(x["input_ids"]) for x in data.train.rows] == [5, 8, 8, 8]
    assert (data.train.cut, data.train.dropped) == (4, 2)
    assert [x.where.rsplit(" ", 1)[1] for x in data.train.parsed] == ["1", "2", "3", "4"]
    assert data.train.lengths == [5, 8, 8, 8]
    assert [sum(y != IGNORED for y in x["labels"]) for x in data.train.rows] == [4, 4, 3, 1]
    assert all(IGNORED in x["labels"] for x in data.train.rows)


@pytest.mark.parametrize("template", [GENERATION, CHAT])
def test_a_run_in_which_every_answer_is_cut_off_is_refused(files: Any, template: str, tmp_path: Path) -> None:
    records = [{"question": MARK * 3, "answer": MARK}] * 4
    said = problem(files(records, max_length=20), template=template)
    assert said == (
        f"{tmp_path / 'train.jsonl'}: every token of all 4 examples is masked, so nothing would be learned: "
        "the answers begin after 20 tokens; raise data.max_length"
    )


def test_validation_data_that_measures_nothing_is_refused(files: Any, tmp_path: Path) -> None:
    said = problem(files(QUESTIONS, [{"question": MARK * 3, "answer": MARK}], max_length=50))
    assert said.startswith(f"{tmp_path / 'validation.jsonl'}: every token of all 1 examples is masked")


def test_a_template_that_marks_nothing_is_refused(files: Any) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% generation %}{% endgeneration %}"
    said = problem(files([{"question": MARK, "answer": MARK}]), template=template)
    assert "the model's chat template marks no token as the assistant's" in said


def test_the_system_message_comes_first_unless_there_is_one(files: Any) -> None:
    own = [
        {"role": "system", "content": "own"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    data = prepare(files([{"messages": own[1:]}, {"messages": own}], system="given"))
    tokenizer = character_tokenizer(GENERATION)
    texts = [tokenizer.decode(x["input_ids"]) for x in data.train.rows]
    assert texts[0].startswith("<s>|system:given</s>\n|user:q")
    assert texts[1].startswith("<s>|system:own</s>\n|user:q")
    assert [x.messages[0]["content"] for x in data.train.parsed] == ["given", "own"]


def test_a_system_message_for_plain_texts_is_refused(files: Any) -> None:
    section = files([{"prompt": MARK, "completion": MARK}], system="given")
    assert "line 1: data.system needs conversations" in problem(section)


def test_a_format_that_the_recipe_names_is_not_guessed(files: Any) -> None:
    both = [{"question": "q", "answer": "a", "prompt": "p", "completion": "c"}]
    assert prepare(files(both)).train.layout == "prompt-completion"
    assert prepare(files(both, format="question")).train.layout == "question"
    assert "field 'messages' is missing or null (format messages)" in problem(files(both, format="messages"))


def test_the_first_record_decides_on_the_format_for_all(files: Any) -> None:
    said = problem(files([*QUESTIONS, {"prompt": MARK, "completion": MARK}]))
    assert "line 10: field 'question' is missing or null (format question)" in said


def test_records_of_the_other_task_are_refused(files: Any) -> None:
    section = files(LABELLED).model_copy(update={"task": "instructions"})
    assert "no format for data.task: instructions has just these fields: text, label" in problem(section)


def test_a_text_of_which_no_token_is_left_is_named(tmp_path: Path) -> None:
    from tokenizers import normalizers

    tokenizer = character_tokenizer(None)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("z", "")
    train = write_lines(tmp_path / "train.jsonl", [*LABELLED, {"text": "zz", "label": "a"}])
    section = DataSection(task="classification", train=train)
    with pytest.raises(DataError, match="line 10: the model's tokenizer makes no token of this text"):
        prepare_data(section, tokenizer, 1)


def test_an_encoder_s_texts_keep_their_marks_when_they_are_cut(files: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    records = [{"text": "word " * n, "label": "ab"[n % 2]} for n in (1, 6, 7, 50)]
    data = prepare_data(files(records, max_length=8), tokenizer, 1)
    assert data.train.lengths == [3, 8, 8, 8]
    assert (data.train.cut, data.train.dropped) == (2, 0)
    for row in data.train.rows:
        assert row["input_ids"][0] == tokenizer.cls_token_id
        assert row["input_ids"][-1] == tokenizer.sep_token_id
        assert row["input_ids"].count(tokenizer.cls_token_id) == 1


def test_half_a_character_is_an_error_before_a_tokenizer_sees_it(files: Any, tmp_path: Path) -> None:
    section = files(QUESTIONS)
    with open(section.train, "a") as file:
        file.write(json.dumps({"question": f"{MARK} \ud800", "answer": MARK}) + "\n")
    assert "line 10: a text has a \\u escape that is half of a character" in problem(section)


def test_a_question_too_long_to_learn_from_is_still_asked(files: Any) -> None:
    section = files([{"question": "q" * 50, "answer": "a"}, *QUESTIONS], max_length=30)
    asked = read_questions(section, section.train, None, seed=1)
    assert len(asked) == len(QUESTIONS) + 1
    assert asked[0].messages[0]["content"] == "q" * 50
    assert len(read_questions(section, section.train, 3, seed=1)) == 3
