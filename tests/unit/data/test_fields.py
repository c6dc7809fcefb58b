"""Fields beside those of a format: what changes a record's meaning is read or refused, the rest counted."""

from typing import Any

import pytest

from blindtune.client.data.reading.fields import EmptyRecordError, unused_fields
from blindtune.client.data.reading.formats import Conversation, Labelled, Parsed, parse, recognise
from blindtune.client.data.reading.records import Record
from blindtune.client.recipe.schema import Task
from blindtune.errors import DataError

MARK = "PLANTED-SECRET"
WHERE = "train.jsonl, line 317"
CALL = {"name": "end", "arguments": {"contract": 12}}


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def read(fields: dict[str, Any], task: Task = "instructions", in_table: bool = False) -> Parsed:
    record = Record(fields, WHERE, in_table)
    return parse(record, recognise(record, task))


def conversation(fields: dict[str, Any], in_table: bool = False) -> Conversation:
    found = read(fields, in_table=in_table)
    assert isinstance(found, Conversation)
    return found


FORMATS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [user(MARK), assistant(MARK)]},
    "prompt-completion": {"prompt": MARK, "completion": MARK},
    "instruction": {"instruction": MARK, "output": MARK},
    "question": {"question": MARK, "answer": MARK},
    "text-label": {"text": MARK, "label": MARK},
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "field",
    [
        {"rejected": MARK},
        {"labels": [MARK]},
        {"functions": [{"name": MARK}]},
        {"reasoning_content": MARK},
        {"images": [MARK]},
        {"sentence2": MARK},
        {"Loss-Mask": [0, 1]},
        {"weight": 0},
        {"train": False},
        {"weight": 0.5},
        {"label": False},
    ],
    ids=lambda x: "".join(x),
)
def test_a_field_that_changes_what_a_record_means_is_refused_by_name(
    name: str, field: dict[str, Any]
) -> None:
    if set(field) & set(FORMATS[name]):
        return
    with pytest.raises(DataError, match=f"{WHERE}: format {name} does not read the field") as caught:
        read({**FORMATS[name], **field}, "classification" if name == "text-label" else "instructions")
    assert MARK not in str(caught.value)
    assert repr(next(iter(field)).casefold().replace("-", "_")) in str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
def test_fields_that_say_nothing_or_what_holds_anyway_are_no_reason_to_refuse(name: str) -> None:
    idle = {
        "images": [],
        "tools": None,
        "text_pair": "",
        "history": [],
        "weight": 1,
        "train": True,
        "mask": {},
    }
    task: Task = "classification" if name == "text-label" else "instructions"
    if name == "text-label":
        idle.pop("text_pair")
    assert read({**FORMATS[name], **idle}, task) == read(FORMATS[name], task)


def test_other_fields_are_named_for_whoever_asks() -> None:
    record = Record({**FORMATS["question"], "id": 3, "contract": "c", "gap": None}, WHERE)
    assert unused_fields(record, "question") == ["id", "contract"]
    assert unused_fields(Record({"text": "a", "label": 1, "answer": 2}, WHERE), "text-label") == ["answer"]


def test_system_and_history_are_part_of_the_conversation() -> None:
    found = conversation(
        {
            "system": "s",
            "history": [["q1", "a1"], ["q2", "a2"]],
            "instruction": "q",
            "input": "",
            "output": "a",
        }
    )
    assert [x["content"] for x in found.messages] == ["s", "q1", "a1", "q2", "a2", "q", "a"]
    assert [x["role"] for x in found.messages] == ["system", *["user", "assistant"] * 3]
    assert not found.unlearned
    asked = conversation({"question": "q", "answer": "a", "history": [["q1", "a1"]], "system": " "})
    assert [x["content"] for x in asked.messages] == ["q1", "a1", "q", "a"]


def test_a_record_s_system_message_is_its_own_one() -> None:
    own = {"role": "system", "content": "s"}
    for messages in ([user("q"), assistant("a")], [own, user("q"), assistant("a")]):
        assert conversation({"messages": messages, "system": "s"}).messages == [
            own,
            user("q"),
            assistant("a"),
        ]


def test_messages_that_are_not_to_be_learned_are_marked() -> None:
    turns = [
        user("q"),
        assistant("a", weight=0),
        user("q"),
        assistant("b", weight=1),
        assistant("c", train=False),
    ]
    found = conversation({"messages": turns})
    assert found.unlearned == {1, 4}
    assert all(set(x) == {"role", "content"} for x in found.messages)
    with pytest.raises(DataError, match="message 2 of 'messages' says that it is learned"):
        read({"messages": [user("q"), assistant("a", weight=0, train=True)]})


def test_answers_of_a_prompt_are_not_learned_with_a_system_message_before_them_either() -> None:
    prompt = [user("q"), assistant("OLD"), user("r")]
    fields = {"prompt": prompt, "completion": [assistant("NEW"), user("s"), assistant("OFF", weight=0)]}
    assert conversation(fields).unlearned == {1, 5}
    assert conversation({**fields, "system": "s"}).unlearned == {2, 6}


def test_calls_keep_their_arguments_as_objects_whatever_their_notation() -> None:
    calls = [
        {"type": "function", "id": "x", "function": CALL},
        {"function": {"name": "end", "arguments": '{"contract": 12}'}},
        CALL,
        {"name": "now", "arguments": ""},
    ]
    (_, said, _, _) = conversation(
        {
            "messages": [
                user("q"),
                assistant(None, tool_calls=calls),
                {"role": "tool", "content": "2027", "tool_call_id": "x", "name": "end"},
                assistant("2027"),
            ],
            "tools": '[{"type": "function", "function": {"name": "end"}}]',
        }
    ).messages
    assert said["content"] == ""
    assert [x.get("function", x)["arguments"] for x in said["tool_calls"]] == [*[{"contract": 12}] * 3, {}]


def test_a_call_is_something_to_learn_and_tools_are_kept() -> None:
    tools = [{"type": "function", "function": {"name": "end"}}]
    found = conversation({"messages": [user("q"), assistant(None, tool_calls=[CALL])], "tools": tools})
    assert list(found.tools) == tools


def test_gaps_of_a_table_are_no_values_and_nulls_of_json_are() -> None:
    call = {"name": "end", "arguments": {"contract": 12, "city": None}}
    fields = {"messages": [user("q", tool_calls=None), assistant("", tool_calls=[call])]}
    kept, filled = (conversation(fields, x).messages[1]["tool_calls"][0]["arguments"] for x in (False, True))
    assert kept == {"contract": 12, "city": None}
    assert filled == {"contract": 12}


def test_parts_of_text_are_texts() -> None:
    parts = [{"type": "text", "text": "a"}, "b"]
    found = conversation({"messages": [user(parts[:1]), assistant(parts)]})  # type: ignore[arg-type]
    assert found.messages[0]["content"] == "a"
    assert found.messages[1]["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for part in (
        {"type": "image_url", "image_url": {"url": MARK}},
        {"type": "text", "text": MARK, "weight": 0},
    ):
        with pytest.raises(DataError, match="message 1 of 'messages' has a part") as caught:
            read({"messages": [user([part]), assistant("a")]})  # type: ignore[arg-type]
        assert MARK not in str(caught.value)


def test_a_second_text_makes_a_pair() -> None:
    found = read({"text": "a", "text_pair": "b", "label": 1}, "classification")
    assert found == Labelled("a", "1", WHERE, "b")


@pytest.mark.parametrize(
    "fields",
    [
        {"question": "q", "answer": " "},
        {"instruction": "", "output": "a"},
        {"prompt": "q", "completion": "\n"},
        {"messages": [user("q"), assistant(" ")]},
        {"messages": [user("q"), assistant("WRONG", weight=0)]},
        {"prompt": [user("q")], "completion": [user("q"), assistant("", name="x")]},
        {"text": "\t", "label": "a"},
        {"text": "t", "label": " "},
        {"text": "t", "label": "a", "text_pair": " "},
    ],
)
def test_a_record_that_says_nothing_can_be_told_from_one_that_is_wrong(fields: dict[str, Any]) -> None:
    with pytest.raises(EmptyRecordError, match=WHERE):
        read(fields, "classification" if "text" in fields else "instructions")
