"""Chat templates are programs: what one leaves out is refused, and what it writes is the same on any day."""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import trl
from support.assets import asset
from support.recipes import CHAT, GENERATION, character_tokenizer
from transformers import AutoTokenizer

from blindtune.client.data.chat import IGNORED, encode, prompt_text
from blindtune.client.data.reading.formats import Conversation, parse
from blindtune.client.data.reading.records import Record
from blindtune.client.data.templates.template import ChatTemplate
from blindtune.errors import DataError

pytestmark = pytest.mark.hf
MARK = "PLANTED-SECRET"
WHERE = "train.jsonl, line 317"
LONG = 100_000

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "end_date",
            "description": "When a contract ends",
            "parameters": {
                "type": "object",
                "properties": {"contract": {"type": "integer", "description": "Its number"}},
            },
        },
    }
]
CALL = {"type": "function", "function": {"name": "end_date", "arguments": {"contract": 12, "kind": "lease"}}}


def user(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def example(*messages: dict[str, Any], **fields: Any) -> Conversation:
    found = parse(Record({"messages": list(messages), **fields}, WHERE), "messages")
    assert isinstance(found, Conversation)
    return found


def written(template: str, conversation: Conversation, now: datetime | None = None) -> str:
    tokenizer = character_tokenizer(template)
    return ChatTemplate(tokenizer, now).write(conversation).text


def problem(template: str, conversation: Conversation) -> str:
    with pytest.raises(DataError) as caught:
        written(template, conversation)
    said = str(caught.value)
    assert said.startswith(f"{WHERE}: ")
    assert MARK not in said
    return said


def _only(role: str) -> str:
    shown = "|{{ m.role }}:{{ m.content }}"
    return f"{{% for m in messages %}}{{% if m.role in {role!r} %}}{shown}{{% endif %}}{{% endfor %}}"


NO_SYSTEM = _only("user assistant")
PARTS = (
    "{% for m in messages %}|{{ m.role }}:"
    "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
)
THOUGHTS = (
    "{% for m in messages %}|{{ m.role }}:"
    "{% if loop.last %}{{ m.reasoning_content }}{{ m.content }}{% else %}"
    "{{ m.content.split('</think>')[-1] }}{% endif %}{% endfor %}"
)
LEFT_OUT = {
    "a system message": (
        NO_SYSTEM,
        example(system(MARK), user("q"), assistant("a")),
        "words of message 1 (system)",
    ),
    "a word that is there by chance": (
        NO_SYSTEM,
        example(system("use"), user("q"), assistant("a")),
        "words of message 1 (system)",
    ),
    "what a tool said": (
        NO_SYSTEM,
        example(user("q"), {"role": "tool", "content": MARK}, assistant("a")),
        "words of message 2 (tool)",
    ),
    "the answers": (_only("user"), example(user("q"), assistant(MARK)), "words of message 2 (assistant)"),
    "the end of a long text": (
        CHAT.replace("m['content'] + eos", "m['content'][:100] + eos"),
        example(user("word " * 30), assistant("a")),
        "words of message 1 (user)",
    ),
    "one of two equal messages": (
        "{% for m in messages[1:] %}{{ m.content }}{% endfor %}",
        example(user("same"), assistant("a"), user("same"), assistant("a")),
        "words of message 1 (user)",
    ),
    "thoughts of earlier answers in a field": (
        THOUGHTS,
        example(
            user("q"),
            assistant("a", reasoning_content=MARK),
            user("r"),
            assistant("b", reasoning_content="c"),
        ),
        "'reasoning_content' of message 2",
    ),
    "thoughts of earlier answers in the text": (
        THOUGHTS,
        example(user("q"), assistant(f"<think>{MARK}</think>a"), user("r"), assistant("b")),
        "words of message 2 (assistant): remove it, make an example of each answer",
    ),
    "calls": (
        CHAT,
        example(user("q"), assistant("", tool_calls=[CALL]), assistant("a")),
        "'tool_calls' of message 2",
    ),
    "values of calls": (
        "{% for m in messages %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
        "{% endfor %}",
        example(user("q"), assistant("", tool_calls=[CALL]), assistant("a")),
        "'tool_calls' of message 2",
    ),
    "calls in a notation of Python": (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ {'a': c} }}"
        "{% endfor %}{% endfor %}",
        example(user("q"), assistant("", tool_calls=[CALL]), assistant("a")),
        "'tool_calls' of message 2",
    ),
    "tools": (CHAT, example(user("q"), assistant("a"), tools=TOOLS), "something of the tools"),
    "what tools are for": (
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + CHAT,
        example(user("q"), assistant("a"), tools=TOOLS),
        "something of the tools",
    ),
    "who speaks": (CHAT, example(user("q", name=MARK), assistant("a")), "'name' of message 1 (user)"),
    "a field that nobody knows": (
        CHAT,
        example(user("q", **{MARK: "x"}), assistant("a")),
        "a field of message 1",
    ),
    "a field without words": (CHAT, example(user("q"), assistant("a", prefix=True)), "'prefix' of message 2"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_a_template_leaves_out_is_refused_with_the_message(case: str) -> None:
    template, conversation, said = LEFT_OUT[case]
    assert f"leaves out {said}" in problem(template, conversation)


def test_the_system_message_of_the_recipe_is_one_too() -> None:
    added = Conversation([system(MARK), user("q"), assistant("a")], WHERE, system_added=True)
    said = problem(NO_SYSTEM, added)
    assert "leaves out words of the system message" in said
    assert "data.system" in said
    with pytest.raises(
        DataError, match="the prompt: the model's chat template leaves out words of message 1"
    ):
        prompt_text(added.messages[:-1], character_tokenizer(NO_SYSTEM))


SHOWN = {
    "all": (CHAT, example(system("s"), user("q"), assistant("a"))),
    "marked": (GENERATION, example(system("s"), user("q"), assistant("a"))),
    "without spaces at the ends": (
        CHAT.replace("['content'] +", "['content'] | trim +"),
        example(user(" q\n"), assistant("a ")),
    ),
    "as JSON": (
        "{% for m in messages %}|{{ m.role }}:{{ m.content | tojson }}{% endfor %}",
        example(user('He said "no".\n\tWhy?'), assistant("a\\b")),
    ),
    "in another order": (
        "{{ messages[1].content }}{{ messages[0].content }}{{ messages[2].content }}",
        example(system("s"), user("q"), assistant("a")),
    ),
    "a content that says nothing": (CHAT, example(user(""), user(" "), assistant("a"))),
    "ids of calls": (
        "{% for m in messages %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
        "{% endfor %}",
        example(
            user("q"),
            assistant("", tool_calls=[{**CALL, "id": "x1"}]),
            {"role": "tool", "content": "2", "tool_call_id": "x1", "name": "end_date"},
            assistant("a"),
        ),
    ),
    "tools": (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + CHAT,
        example(user("q"), assistant("a"), tools=TOOLS),
    ),
    "a name": (
        CHAT.replace("|{{ m['role'] }}", "|{{ m.name or m.role }}"),
        example(user("q", name="n"), assistant("a")),
    ),
}


@pytest.mark.parametrize("case", SHOWN)
def test_what_a_template_shows_is_taken_however_it_does(case: str) -> None:
    template, conversation = SHOWN[case]
    tokenizer = character_tokenizer(template)
    stock = tokenizer.apply_chat_template(
        list(conversation.messages), tools=list(conversation.tools) or None, tokenize=False
    )
    assert written(template, conversation) == stock


def test_a_template_that_wants_parts_gets_them() -> None:
    for content in ("a b", [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]):
        assert written(PARTS, example(user(content), assistant("c"))) == "|user:a b|assistant:c"
    assert prompt_text([user("q")], character_tokenizer(PARTS)) == "|user:q"


@pytest.mark.parametrize(
    "as_what",
    ["{{ m['content'] }}", "{{ m['content'] | tojson if m['content'] is not string else m['content'] }}"],
)
def test_parts_are_lines_where_a_template_would_write_the_list(as_what: str) -> None:
    template = CHAT.replace("{{ m['content'] + eos_token }}", as_what)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "|user:a\nb\n" in written(template, example(user(parts), assistant("c")))


def test_a_template_that_wants_arguments_as_text_gets_their_json() -> None:
    template = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name + c.function.arguments }}{% endfor %}{% endfor %}"
    )
    conversation = example(user("q"), assistant(None, tool_calls=[CALL]), assistant("a"))
    assert written(template, conversation) == 'qend_date{"contract": 12, "kind": "lease"}a'
    plain = template.replace("c.function.name + c.function.arguments", "c.function.arguments")
    assert problem(plain, conversation).endswith("shows it")
    both = template.replace(
        "c.function.name + c.function.arguments", "c.function.name }}{{ c.function.arguments"
    )
    assert written(both, conversation) == 'qend_date{"contract": 12, "kind": "lease"}a'


DATED = "{% if strftime_now is defined %}On {{ strftime_now('%d %b %Y') }}{% endif %}: " + CHAT


def test_the_date_is_that_of_the_start_on_any_day() -> None:
    conversation = example(user("q"), assistant("a"))
    text = written(DATED, conversation, datetime(2020, 2, 3, 4, 5))
    assert text == "On 03 Feb 2020: " + written(CHAT, conversation)
    asked = prompt_text([user("q")], (t := character_tokenizer(DATED)), ChatTemplate(t, datetime(2020, 2, 3)))
    assert asked.startswith("On 03 Feb 2020: ")
    assert written(DATED, conversation).startswith(f"On {datetime.now():%d %b %Y}: ")


@pytest.mark.parametrize(
    "writes",
    [
        "{% macro day(x) %}{{ strftime_now('%Y') }}{{ x }}{% endmacro %}{{ day('!') }}",
        "{% set now = strftime_now %}{{ now(format=\"%Y\") + '!' }}",
        "\n{%- if true %}{{ strftime_now('%Y') ~ '!' }}{% endif %}",
    ],
)
def test_the_date_is_found_however_a_template_asks_for_it(writes: str) -> None:
    conversation = example(user("q"), assistant("a"))
    found = written(writes + CHAT, conversation, datetime(1999, 1, 1))
    today = character_tokenizer(writes + CHAT).apply_chat_template(
        list(conversation.messages), tokenize=False
    )
    assert found == today.replace(f"{datetime.now():%Y}", "1999")


def test_a_date_that_cannot_be_repeated_is_refused() -> None:
    template = "{{ strftime_now('%' ~ messages[0].content) }}" + CHAT
    assert "its date cannot be repeated on another day" in problem(
        template, example(user("Y"), assistant("a"))
    )


def test_the_tokenizer_keeps_its_own_template() -> None:
    tokenizer = character_tokenizer(DATED)
    encode(example(user("q"), assistant("a")), tokenizer, LONG, ChatTemplate(tokenizer, datetime(2020, 1, 1)))
    assert tokenizer.chat_template == DATED


REAL = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))[::2]
CONVERSATIONS: dict[str, tuple[Conversation, Sequence[str]]] = {
    "turns": (example(user("first"), assistant("second"), user("third"), assistant("fourth")), ()),
    "a system message": (example(system("zeroth"), user("first"), assistant("second")), ["zeroth"]),
    "calls": (
        example(
            user("first"),
            assistant(None, tool_calls=[CALL]),
            {"role": "tool", "content": "third"},
            assistant("fourth"),
            tools=TOOLS,
        ),
        ["end_date", "lease", "third", "When a contract ends"],
    ),
    "thoughts": (
        example(
            user("first"), assistant("second", reasoning_content="sixth"), user("third"), assistant("fourth")
        ),
        ["sixth"],
    ),
    "one thought": (example(user("first"), assistant("second", reasoning_content="sixth")), ["sixth"]),
    "parts": (
        example(user([{"type": "text", "text": x} for x in ("first", "third")]), assistant("second")),
        (),
    ),
}


@pytest.fixture(scope="module")
def real_tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(asset("models/tiny-llama"))
    control = {x for path in REAL for x in re.findall(r"<[^<>\s'\"{}]+>", path.read_text())}
    tokenizer.add_tokens(sorted(control), special_tokens=True)
    return tokenizer


def test_nothing_is_lost_in_templates_of_real_models(real_tokenizer: Any) -> None:
    """Those that TRL trains with: all words are there, and none in a program's notation, or it is refused."""
    assert len(REAL) > 25
    taken: dict[str, int] = {}
    for path in REAL:
        real_tokenizer.chat_template = path.read_text()
        template = ChatTemplate(real_tokenizer)
        for name, (conversation, more) in CONVERSATIONS.items():
            try:
                encoded = encode(conversation, real_tokenizer, LONG, template)
            except DataError:
                continue
            taken[name] = taken.get(name, 0) + 1
            text = real_tokenizer.decode(encoded.input_ids)
            texts = [
                t
                for x in conversation.messages
                for t in re.findall(r"'text': '(\w+)'|^(\w+)$", str(x["content"]))
            ]
            for words in (*more, *("".join(t) for t in texts)):
                assert words in text, f"{path.name}, {name}: {words}"
            assert "'text'" not in text
            assert '"text"' not in text
            assert "{'" not in text.replace(json.dumps(TOOLS), "")
            learned = [x for x in encoded.labels if x != IGNORED]
            assert conversation.messages[-1]["content"] in real_tokenizer.decode(learned), path.name
    assert taken["a system message"] > 25
    assert taken["calls"] > 10
    assert 0 < taken["thoughts"] < taken["one thought"] < len(REAL)
