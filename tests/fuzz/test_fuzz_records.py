"""Data files of any bytes: records that say what the file says, or one error with the line."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from fuzzing import JSON, dumped, examples, refused_or_fine, spoiled, spoiled_json
from hypothesis import example, given
from hypothesis import strategies as st
from support.recipes import character_tokenizer

from blindtune.client.data.chat import encode
from blindtune.client.data.reading.formats import Conversation, Parsed, parse, recognise
from blindtune.client.data.reading.messages import texts_of
from blindtune.client.data.reading.records import read_records
from blindtune.client.data.templates.template import ChatTemplate
from blindtune.errors import DataError

RECORDS = [
    {"messages": [{"role": "user", "content": "Hé?"}, {"role": "assistant", "content": "Yes \u2028."}]},
    {"messages": [{"role": "system", "content": ""}, {"role": "assistant", "content": "No."}]},
]
LAYOUTS = [
    {"prompt": "a", "completion": "b"},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    {"instruction": "a", "response": "b", "context": "c"},
    {"question": "a", "answer": "b", "rationale": "c"},
    {"text": "a", "label": 1, "text_pair": "b"},
    {"instruction": "a", "output": "b", "system": "c", "history": [["d", "e"]]},
    RECORDS[0],
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "c", "arguments": "{}"}}],
            },
            {"role": "tool", "content": "d", "tool_call_id": "e"},
            {"role": "assistant", "content": "f", "weight": 1, "reasoning_content": "g"},
        ],
        "tools": [{"function": {"name": "c", "description": "h", "parameters": {"i": [1, True, None]}}}],
    },
]
# It shows all of these, in ways of its own.
TEMPLATE = (
    "{{ tools | tojson }}{% for m in messages %}{{ m.role }}:{{ m.reasoning_content }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
    "{% endfor %}"
)
CALL = (
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": '
    b'[{"function": {"name": "c", "arguments": {"d": null}}}]}]}'
)
VALID = b"".join(json.dumps(x, ensure_ascii=False).encode() + b"\n" for x in RECORDS)


@cache
def tokenizer() -> Any:
    return character_tokenizer(TEMPLATE)


def written(parsed: Parsed, path: Path) -> None:
    """What becomes of a record: its texts, all of them, or one clear error."""
    if isinstance(parsed, Conversation):
        with refused_or_fine(path):
            text = "".join(ChatTemplate(tokenizer()).write(parsed).text.split())
            for message in parsed.messages:
                for said in texts_of(message):
                    assert "".join(said.split()) in text
            encode(parsed, tokenizer(), 1000)


def read(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with refused_or_fine(path):
        for record in read_records(path):
            assert isinstance(record.fields, dict)
            json.dumps(record.fields, ensure_ascii=False).encode()  # texts that a tokenizer takes
            for task in ("instructions", "classification"):
                with refused_or_fine(path):
                    written(parse(record, recognise(record, task)), path)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "train.jsonl"


@examples(250)
@given(content=spoiled(st.just(VALID)))
@example(content=b'{"a":' * 100_000)
@example(content=b"[" * 100_000 + b"\n" + VALID)
@example(content=b'{"text": "\xff"}')
@example(content=b'{"text": "\\uD800", "label": 1}')
@example(content=b'{"text": 1e999, "label": NaN}')
@example(content=b'{"text": ' + b"1" * 5000 + b"}")
@example(content=b'{"text": "\x00", "label": "\\u0000"}')
@example(content=b"\xff\xfe{\0}\0")
@example(content=CALL.replace(b"null", b'{"a":' * 450 + b"1" + b"}" * 450))
@example(content=CALL.replace(b"null", b"[" * 450 + b"]" * 450))
def test_a_damaged_file_is_read_or_refused(path: Path, content: bytes) -> None:
    read(path, content)


@examples(150)
@given(content=st.binary(max_size=100))
def test_bytes_that_are_no_records_are_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with refused_or_fine(path):
        read_records(path)


@examples(250)
@given(content=st.sampled_from(LAYOUTS).flatmap(spoiled_json) | JSON)
def test_any_value_in_any_field_is_taken_or_refused(path: Path, content: object) -> None:
    read(path, dumped(content))


@examples(150)
@given(
    records=st.lists(
        st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
            st.text(st.characters(exclude_categories=["Cs"])) | st.integers() | st.none(),
            max_size=3,
        ),
        min_size=1,
        max_size=4,
    ),
    escaped=st.booleans(),
)
def test_what_is_accepted_is_what_was_written(
    path: Path, records: list[dict[str, object]], escaped: bool
) -> None:
    path.write_bytes(b"".join(json.dumps(x, ensure_ascii=escaped).encode() + b"\r\n" for x in records))
    assert [dict(x.fields) for x in read_records(path)] == records


def test_a_field_that_stands_twice_is_refused_without_being_named(path: Path) -> None:
    path.write_bytes(VALID + b'{"secret": "a", "secret": "b"}\n')
    with pytest.raises(DataError, match="line 3.*twice") as caught:
        read_records(path)
    assert "secret" not in str(caught.value)


def test_a_line_of_a_hundred_megabytes_is_read(path: Path) -> None:
    text = "x" * 100_000_000
    path.write_text(json.dumps({"prompt": "a", "completion": text}))
    (record,) = read_records(path)
    assert record.fields["completion"] == text


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "data"
    Dataset.from_list([{"text": "é" * 20, "label": i} for i in range(5)]).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
def test_a_saved_dataset_whose_description_is_spoiled_is_read_or_refused(
    saved: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(saved, folder)
    valid = json.loads((saved / name).read_text())

    @examples(40)
    @given(content=spoiled_json(valid).map(dumped) | spoiled(st.just(dumped(valid))))
    def check(content: bytes) -> None:
        (folder / name).write_bytes(content)
        with refused_or_fine(folder):
            read_records(folder)

    check()
