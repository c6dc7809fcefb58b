"""The layouts of records: each is recognised, and no message about a wrong one shows what it says."""

from typing import Any, get_args

import pytest

from blindtune.client.data.reading.formats import (
    Completion,
    Conversation,
    Labelled,
    Parsed,
    parse,
    recognise,
)
from blindtune.client.data.reading.records import Record
from blindtune.client.recipe.schema import DataFormat, Task
from blindtune.errors import DataError

MARK = "PLANTED-SECRET"
WHERE = "train.jsonl, line 317"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read(fields: dict[str, Any], task: Task = "instructions") -> Parsed:
    record = Record(fields, WHERE)
    return parse(record, recognise(record, task))


EXAMPLES: dict[str, tuple[dict[str, Any], Parsed]] = {
    "messages": ({"messages": [user("a"), assistant("b")]}, Conversation([user("a"), assistant("b")], WHERE)),
    "prompt-completion": ({"prompt": "a", "completion": "b"}, Completion("a", "b", WHERE)),
    "instruction": (
        {"instruction": "a", "response": "b", "context": "c"},
        Conversation([user("a\n\nc"), assistant("b")], WHERE),
    ),
    "question": (
        {"question": "a", "answer": 7, "rationale": "b"},
        Conversation([user("a"), assistant("b\n#### 7")], WHERE, "7"),
    ),
    "text-label": ({"text": "a", "label": "b"}, Labelled("a", "b", WHERE)),
}


def test_every_format_that_a_recipe_can_name_is_tested() -> None:
    assert {*EXAMPLES, "auto"} == set(get_args(DataFormat))


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("more", [{}, {"id": 5, "source": None}])
def test_each_format_is_recognised_and_read(name: str, more: dict[str, Any]) -> None:
    fields, expected = EXAMPLES[name]
    record = Record({**more, **fields}, WHERE)
    task: Task = "classification" if name == "text-label" else "instructions"
    assert recognise(record, task) == name
    assert parse(record, recognise(record, task)) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"instruction": "a", "input": "c", "output": "b"}, [user("a\n\nc"), assistant("b")]),
        ({"instruction": "a", "input": "", "output": "b"}, [user("a"), assistant("b")]),
        ({"instruction": "a", "input": None, "output": "b"}, [user("a"), assistant("b")]),
        ({"instruction": "a", "response": None, "output": "b"}, [user("a"), assistant("b")]),
        (
            {"instruction": "a", "context": None, "input": "c", "output": "b"},
            [user("a\n\nc"), assistant("b")],
        ),
        ({"question": "a", "answer": "b"}, [user("a"), assistant("b")]),
        ({"question": "a", "answer": "b", "rationale": " "}, [user("a"), assistant("b")]),
        ({"question": "a", "answer": 2.5}, [user("a"), assistant("2.5")]),
        ({"question": "a", "context": "c", "answer": "b"}, [user("a\n\nc"), assistant("b")]),
        ({"prompt": [user("a")], "completion": [assistant("b")]}, [user("a"), assistant("b")]),
        ({"messages": None, "question": "a", "answer": "b"}, [user("a"), assistant("b")]),
        (
            {"messages": [{"role": "user", "content": "a", "name": "x"}, assistant("b")]},
            [{**user("a"), "name": "x"}, assistant("b")],
        ),
        (
            {"messages": [{**user("a"), "tool_calls": None}, {**assistant("b"), "tool_calls": []}]},
            [user("a"), assistant("b")],
        ),
    ],
)
def test_other_names_and_gaps_are_understood(fields: dict[str, Any], expected: list[dict[str, str]]) -> None:
    found = read(fields)
    assert isinstance(found, Conversation)
    assert found.messages == expected


@pytest.mark.parametrize(("label", "expected"), [("no", "no"), (3, "3"), (0, "0"), ("0", "0"), (-1, "-1")])
def test_labels_are_texts_or_whole_numbers(label: Any, expected: str) -> None:
    found = read({"text": "a", "label": label}, "classification")
    assert isinstance(found, Labelled)
    assert found.label == expected


def test_an_empty_prompt_is_a_text_to_go_on_with() -> None:
    assert read({"prompt": "", "completion": "b"}) == Completion("", "b", WHERE)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing known": ({"messages ": MARK}, "just these fields: 1 of other names"),
    "private names": ({MARK: 1, "text": MARK}, "just these fields: text, 1 of other names"),
    "no fields": ({}, "just these fields: none at all"),
    "labels": ({"text": MARK, "label": MARK}, "just these fields: text, label. Rename"),
    "no answer": ({"question": MARK}, "just these fields: question. Rename"),
    "null answer": ({"question": MARK, "answer": None}, "just these fields: question, 1 of other names"),
    "answer of spaces": ({"question": MARK, "answer": " \n"}, "field 'answer' is empty"),
    "answer that is a list": (
        {"question": MARK, "answer": [MARK]},
        "field 'answer' should be a text, not list",
    ),
    "answer that is a truth": (
        {"question": MARK, "answer": True},
        "field 'answer' should be a text, not bool",
    ),
    "answer that is none": ({"question": MARK, "answer": float("nan")}, "field 'answer' is no number (NaN)"),
    "question of spaces": ({"question": "\u3000", "answer": MARK}, "field 'question' is empty"),
    "rationale": (
        {"question": MARK, "answer": MARK, "rationale": {}},
        "field 'rationale' should be a text, not dict",
    ),
    "response": ({"instruction": MARK, "response": ""}, "field 'response' is empty"),
    "output": ({"instruction": MARK, "output": {MARK: 1}}, "field 'output' should be a text, not dict"),
    "input": (
        {"instruction": MARK, "output": MARK, "input": [MARK]},
        "field 'input' should be a text, not list",
    ),
    "messages are a text": ({"messages": MARK}, "field 'messages' should be a list of messages"),
    "no messages": ({"messages": []}, "field 'messages' should be a list of messages"),
    "message is a text": ({"messages": [MARK]}, "message 1 of 'messages' should have a role and a content"),
    "no content": (
        {"messages": [{"role": "user"}]},
        "message 1 of 'messages' should have a role and a content",
    ),
    "an image in a content": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": MARK}, {"type": "image"}]}]},
        "message 1 of 'messages' has a part that is no text",
    ),
    "unknown role": (
        {"messages": [user(MARK), {"role": MARK, "content": MARK}]},
        "the role of message 2 of 'messages' should be one of system, user, assistant, tool",
    ),
    "no role": ({"messages": [{"content": MARK}]}, "the role of message 1 of 'messages' should be one of"),
    "role is a list": ({"messages": [{"role": [MARK], "content": MARK}]}, "the role of message 1"),
    "nobody answers": ({"messages": [user(MARK)]}, "no message of role assistant says anything"),
    "answer of spaces in messages": (
        {"messages": [user(MARK), assistant("\n ")]},
        "no message of role assistant",
    ),
    "a call of nothing": (
        {"messages": [user(MARK), {**assistant(MARK), "tool_calls": [{"id": MARK}]}]},
        "message 2 of 'messages' has a call in tool_calls without the name of a function",
    ),
    "arguments that are a list": (
        {"messages": [user(MARK), {**assistant(MARK), "tool_calls": [{"name": MARK, "arguments": [MARK]}]}]},
        "message 2 of 'messages' has a call in tool_calls whose arguments are no object",
    ),
    "tools that are one": (
        {"messages": [user(MARK), assistant(MARK)], "tools": {MARK: 1}},
        "field 'tools' should",
    ),
    "a weight of a half": (
        {"messages": [user(MARK), {**assistant(MARK), "weight": 0.5}]},
        "field 'weight' of message 2 of 'messages' should be 0 or 1",
    ),
    "a question to be learned": (
        {"messages": [{**user(MARK), "train": True}, assistant(MARK)]},
        "message 1 of 'messages' says that it is learned, and only answers can be",
    ),
    "a prompt to be learned": (
        {
            "prompt": [user(MARK), {**assistant(MARK), "weight": 1}, user(MARK)],
            "completion": [assistant(MARK)],
        },
        "a message of 'prompt' says that it is learned",
    ),
    "two answers": (
        {"instruction": MARK, "response": MARK, "output": "b"},
        "'response' and 'output' mean the same",
    ),
    "history of texts": (
        {"instruction": MARK, "response": MARK, "history": [MARK]},
        "field 'history' should be a list of pairs",
    ),
    "history with gaps": (
        {"instruction": MARK, "response": MARK, "history": [[MARK, ""]]},
        "field 'history' should be a list of pairs",
    ),
    "two system messages": (
        {"messages": [{"role": "system", "content": MARK}, user(MARK), assistant(MARK)], "system": "b"},
        "field 'system' and the first message are two system messages",
    ),
    "system for two texts": (
        {"prompt": MARK, "completion": MARK, "system": MARK},
        "'system' needs a conversation",
    ),
    "prompt and completion differ": (
        {"prompt": MARK, "completion": [assistant(MARK)]},
        "should both be texts",
    ),
    "completion of spaces": ({"prompt": MARK, "completion": " "}, "field 'completion' is empty"),
    "nobody completes": (
        {"prompt": [user(MARK)], "completion": [user(MARK)]},
        "no message of role assistant says anything",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_record_is_named_and_not_shown(case: str) -> None:
    fields, said = WRONG[case]
    with pytest.raises(DataError) as caught:
        read(fields)
    found = str(caught.value)
    assert found.startswith(f"{WHERE}: ")
    assert said in found
    assert MARK not in found


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"text": MARK, "label": " "}, "field 'label' is empty"),
        ({"text": MARK, "label": 1.5}, "field 'label' should be a text or a whole number"),
        ({"text": MARK, "label": True}, "field 'label' should be a text or a whole number"),
        ({"text": MARK, "label": [MARK]}, "field 'label' should be a text or a whole number"),
        ({"text": "", "label": MARK}, "field 'text' is empty"),
        ({"text": MARK, "label": None}, "no format for data.task: classification"),
        ({"question": MARK, "answer": MARK}, "just these fields: question, answer. Rename"),
    ],
)
def test_a_wrong_label_is_named_and_not_shown(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        read(fields, "classification")
    assert said in str(caught.value)
    assert MARK not in str(caught.value)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_field_that_later_records_lack_is_named(name: Any) -> None:
    fields, _ = EXAMPLES[name]
    needed = list(fields)[1 if len(fields) > 1 else 0]
    for gap in ({x: y for x, y in fields.items() if x != needed}, {**fields, needed: None}):
        with pytest.raises(DataError, match=f"{WHERE}: field '{needed}' is missing or null .format {name}."):
            parse(Record(gap, WHERE), name)
