"""From conversations to tokens: the loss is on what the assistant says, and on nothing else."""

import re
from typing import Any

import pytest
from support.assets import asset
from support.chats import LONG, MARKED, WHERE, conversation, ids_of, learned, merging_tokenizer
from support.recipes import CHAT, GENERATION, character_tokenizer
from transformers import AutoTokenizer

from blindtune.client.data.chat import IGNORED, answer_text, encode, prompt_text
from blindtune.client.data.reading.formats import Completion, Conversation
from blindtune.errors import DataError

pytestmark = pytest.mark.hf
MARK = "PLANTED-SECRET"


CONVERSATIONS = {
    "one answer": conversation("hi", "hello"),
    "several answers": conversation("hi", "hello", "and", "bye", "so", "no"),
    "a system message": conversation("hi", "hello", system="be kind"),
    "answers with spaces at their ends": conversation("hi", "\nhello \n", "and", " bye "),
    "an answer that repeats the question": conversation("hello", "hello", "hello", "hello"),
    "an answer like a heading": conversation("hi", "|user:hello"),
    "an empty answer among others": conversation("hi", "", "and", "bye"),
    "ends with a question": conversation("hi", "hello", "and"),
}


@pytest.mark.parametrize("template", [GENERATION, CHAT], ids=["marked", "prefixes"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_loss_is_on_the_answers_and_their_ends_alone(name: str, template: str) -> None:
    tokenizer = character_tokenizer(template)
    example = CONVERSATIONS[name]
    answers = [x["content"] + "</s>" for x in example.messages if x["role"] == "assistant"]
    encoded = encode(example, tokenizer, LONG)
    assert learned(encoded, tokenizer) == answers
    assert (
        encoded.input_ids
        == tokenizer.apply_chat_template(list(example.messages), return_dict=True)["input_ids"]
    )
    assert not encoded.cut


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_marks_and_prefixes_agree_where_tokens_reach_over_borders(name: str) -> None:
    example = CONVERSATIONS[name]
    marked = encode(example, merging_tokenizer(GENERATION.replace(":{%", ":\n{%")), LONG)
    assert encode(example, merging_tokenizer(CHAT.replace(":{%", ":\n{%")), LONG) == marked
    assert marked.learns


def test_a_token_of_both_the_heading_and_the_answer_belongs_to_the_answer() -> None:
    tokenizer = merging_tokenizer(CHAT.replace(":{%", ":\n{%"))
    encoded = encode(conversation("hi", "\n\nhello"), tokenizer, LONG)
    assert tokenizer("\n\n")["input_ids"][0] in encoded.labels
    assert learned(encoded, tokenizer) == ["\n\n\nhello</s>"]


def test_marks_and_prefixes_agree_for_a_real_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(asset("models/tiny-llama"))
    marked = tokenizer.chat_template
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", marked)
    assert plain != marked
    for example in CONVERSATIONS.values():
        tokenizer.chat_template = marked
        expected = encode(example, tokenizer, LONG)
        answers = [x["content"] + tokenizer.eos_token for x in example.messages if x["role"] == "assistant"]
        assert learned(expected, tokenizer) == answers
        tokenizer.chat_template = plain
        assert encode(example, tokenizer, LONG) == expected


@pytest.mark.parametrize("mark", ["{%generation%}", "{%- generation -%}", "{% generation %}"])
def test_marks_are_found_however_they_are_written(mark: str) -> None:
    tokenizer = character_tokenizer(GENERATION.replace("{% generation %}", mark))
    # Prefixes can't find an answer that nothing precedes, so this tells which way was taken.
    example = Conversation(
        [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "hi"}], WHERE
    )
    assert learned(encode(example, tokenizer, LONG), tokenizer) == ["hello</s>"]


def test_a_variable_called_generation_is_no_mark() -> None:
    tokenizer = character_tokenizer(CHAT + "{% if generation %}{% endif %}")
    assert learned(encode(conversation("hi", "hello"), tokenizer, LONG), tokenizer) == ["hello</s>"]


def test_one_of_several_templates_is_the_default() -> None:
    tokenizer = character_tokenizer(None)
    tokenizer.chat_template = {"default": GENERATION, "tool_use": "{{ raise_exception('not this one') }}"}
    assert learned(encode(conversation("hi", "hello"), tokenizer, LONG), tokenizer) == ["hello</s>"]
    tokenizer.chat_template = {"a": GENERATION, "b": GENERATION}
    with pytest.raises(DataError, match="several chat templates, and none is called default"):
        encode(conversation("hi", "hello"), tokenizer, LONG)


def test_a_template_that_rewrites_earlier_turns_is_refused_for_several_answers() -> None:
    rewritten = "{% for m in messages %}{% if loop.last and loop.length > 1 %}!{% endif %}"
    template = CHAT.replace("{% for m in messages %}", rewritten)
    tokenizer = character_tokenizer(template)
    with pytest.raises(
        DataError, match=f"{WHERE}: the model's chat template renders message 2 in another way"
    ):
        encode(conversation("hi", MARK, "and", MARK), tokenizer, LONG)


def test_a_template_that_leaves_out_earlier_thoughts_serves_one_answer_only() -> None:
    template = CHAT.replace(
        "{% if m['role'] == 'assistant' %}",
        "{% if m['role'] == 'assistant' %}{% if loop.last %}(no thoughts)\n{% endif %}",
    )
    tokenizer = character_tokenizer(template)
    one = encode(conversation("hi", "hello"), tokenizer, LONG)
    assert learned(one, tokenizer) == ["(no thoughts)\nhello</s>"]
    with pytest.raises(DataError, match="use one answer in each example"):
        encode(conversation("hi", "hello", "and", "bye"), tokenizer, LONG)


def test_an_answer_that_nothing_precedes_needs_marks() -> None:
    example = Conversation([{"role": "assistant", "content": MARK}], WHERE)
    with pytest.raises(DataError, match="the assistant speaks first") as caught:
        encode(example, character_tokenizer(CHAT), LONG)
    assert MARK not in str(caught.value)


ALTERNATE = "{{ raise_exception('roles must alternate') }}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (ALTERNATE, "refuses this conversation: roles must alternate"),
        ("{{ raise_exception(messages[0]['content']) }}", "refuses this conversation: TemplateError"),
        (
            "{{ raise_exception('unlike ' + messages[0]['content']) }}",
            "refuses this conversation: TemplateError",
        ),
        ("{{ messages[0]['content'] + 1 }}", "refuses this conversation: TypeError"),
        ("{{ messages[0]['content'] | int // 0 }}", "refuses this conversation: ZeroDivisionError"),
        ("{{ messages[0].none.such }}", "refuses this conversation: UndefinedError"),
        ("{{ {}[messages[0]['content']].x }}", "refuses this conversation: UndefinedError"),
        ("{% if %}", "refuses this conversation: TemplateSyntaxError"),
    ],
)
@pytest.mark.parametrize("mark", ["", "{% generation %}{% endgeneration %}"])
def test_what_a_template_says_is_shown_unless_it_quotes_the_conversation(
    template: str, said: str, mark: str
) -> None:
    with pytest.raises(DataError) as caught:
        encode(conversation(MARK, MARK), character_tokenizer(template + mark), LONG)
    assert said in str(caught.value)
    assert str(caught.value).startswith(WHERE)
    assert MARK not in str(caught.value)


class TestWithoutATemplate:
    def test_headings_separate_the_turns(self) -> None:
        tokenizer = character_tokenizer(None)
        encoded = encode(conversation("hi", "hello", system="be kind"), tokenizer, LONG)
        text = "### System:\nbe kind\n\n### User:\nhi\n\n### Assistant:\nhello</s>"
        assert tokenizer.decode(encoded.input_ids) == text
        assert learned(encoded, tokenizer) == ["hello</s>"]

    def test_the_question_is_asked_as_it_was_in_training(self) -> None:
        tokenizer = character_tokenizer(None)
        example = conversation("hi", "hello")
        asked = tokenizer(prompt_text(example.messages[:-1], tokenizer))["input_ids"]
        encoded = encode(example, tokenizer, LONG)
        assert encoded.input_ids[: len(asked)] == asked
        assert set(encoded.labels[: len(asked)]) == {IGNORED}
        assert encoded.labels[len(asked)] != IGNORED

    def test_a_conversation_that_ends_with_a_question_is_refused(self) -> None:
        with pytest.raises(DataError, match="does not end with the assistant") as caught:
            encode(conversation(MARK, MARK, MARK), character_tokenizer(None), LONG)
        assert MARK not in str(caught.value)


@pytest.mark.parametrize("template", [GENERATION, CHAT])
def test_the_question_is_asked_as_the_template_has_it(template: str) -> None:
    tokenizer = character_tokenizer(template)
    example = conversation("hi", "hello", "and", "bye")
    asked = tokenizer(prompt_text(example.messages[:-1], tokenizer), add_special_tokens=False)["input_ids"]
    assert encode(example, tokenizer, LONG).input_ids[: len(asked)] == asked


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("ab", "cd"), ("", "cd"), ("<s>ab", "cd"), ("ab", "cd</s>"), ("", "<s>cd</s>"), ("ab", " cd")],
)
def test_special_tokens_stand_at_the_ends_and_are_never_doubled(
    begins: bool, ends: bool, prompt: str, completion: str
) -> None:
    tokenizer = character_tokenizer(None, begins=begins, ends=ends)
    encoded = encode(Completion(prompt, completion, WHERE), tokenizer, LONG)
    found = tokenizer.decode(encoded.input_ids)
    begin = "<s>" if begins or "<s>" in prompt + completion else ""
    plain = (prompt + completion).replace("<s>", "").replace("</s>", "")
    assert found == f"{begin}{plain}</s>"
    inside = completion.replace("<s>", "").replace("</s>", "") + "</s>"
    assert "".join(learned(encoded, tokenizer)).removeprefix("<s>") == inside


def test_an_end_that_the_prompt_itself_has_stays() -> None:
    tokenizer = character_tokenizer(None)
    encoded = encode(Completion("ab</s>", "cd", WHERE), tokenizer, LONG)
    assert tokenizer.decode(encoded.input_ids) == "ab</s>cd</s>"
    assert learned(encoded, tokenizer) == ["cd</s>"]


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("template", [GENERATION, CHAT])
def test_a_template_writes_the_special_tokens_alone(begins: bool, ends: bool, template: str) -> None:
    tokenizer = character_tokenizer(template, begins=begins, ends=ends)
    ids = encode(conversation("hi", "hello"), tokenizer, LONG).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.eos_token_id) == 2


@pytest.mark.parametrize(
    ("length", "learns", "cut"), [(5, False, True), (6, True, True), (9, True, False), (8, True, True)]
)
def test_what_is_too_long_is_cut_off_and_may_teach_nothing_then(length: int, learns: bool, cut: bool) -> None:
    encoded = encode(Completion("abcde", "fgh", WHERE), character_tokenizer(None), length)
    assert (encoded.learns, encoded.cut) == (learns, cut)
    assert len(encoded.input_ids) == len(encoded.labels) == min(length, 9)


def test_a_first_token_alone_teaches_nothing() -> None:
    assert not encode(Completion("", "cd", WHERE), character_tokenizer(None), 1).learns


def test_a_plain_text_is_joined_as_it_is() -> None:
    tokenizer = character_tokenizer(GENERATION, split=True)
    encoded = encode(Completion("a b ", "c d", WHERE), tokenizer, LONG)
    assert encoded.input_ids == [*ids_of("a b c d", tokenizer), tokenizer.eos_token_id]


@pytest.mark.parametrize("template", MARKED, ids=["marked", "prefixes"])
@pytest.mark.parametrize(
    ("unlearned", "expected"),
    [
        ({1}, ["bye</s>", "no</s>"]),
        ({1, 3}, ["no</s>"]),
        ({3}, ["hello</s>", "no</s>"]),
        ({5}, ["hello</s>", "bye</s>"]),
        ({3, 5}, ["hello</s>"]),
        ({1, 3, 5}, []),
    ],
)
def test_answers_that_are_not_to_be_learned_carry_no_loss(
    template: str, unlearned: set[int], expected: list[str]
) -> None:
    tokenizer = character_tokenizer(template)
    whole = conversation("hi", "hello", "and", "bye", "so", "no")
    example = Conversation(whole.messages, WHERE, unlearned=frozenset(unlearned))
    encoded = encode(example, tokenizer, LONG)
    assert learned(encoded, tokenizer) == expected
    assert encoded.input_ids == encode(whole, tokenizer, LONG).input_ids


@pytest.mark.parametrize("template", MARKED, ids=["marked", "prefixes"])
def test_a_template_that_rewrites_earlier_turns_serves_a_prompt_with_answers(template: str) -> None:
    tokenizer = character_tokenizer(
        template.replace("{{ m['content']", "{% if loop.last %}(none) {% endif %}{{ m['content']", 1)
    )
    messages = conversation("hi", "OLD", "and", "NEW").messages
    encoded = encode(Conversation(messages, WHERE, unlearned=frozenset({1})), tokenizer, LONG)
    assert learned(encoded, tokenizer) == ["(none) NEW</s>"]


def test_an_answer_at_the_very_beginning_may_be_one_that_is_not_learned() -> None:
    messages = [{"role": x, "content": y} for x, y in (("assistant", "a"), ("user", "b"), ("assistant", "c"))]
    for template in MARKED:
        tokenizer = character_tokenizer(template)
        encoded = encode(Conversation(messages, WHERE, unlearned=frozenset({0})), tokenizer, LONG)
        assert learned(encoded, tokenizer) == ["c</s>"]


def test_without_a_template_the_last_answer_must_be_one_that_is_learned() -> None:
    example = Conversation(conversation("hi", MARK).messages, WHERE, unlearned=frozenset({1}))
    with pytest.raises(DataError, match="the last answer is not to be learned"):
        encode(example, character_tokenizer(None), LONG)


@pytest.mark.parametrize("more", [{"tool_calls": [{"name": MARK, "arguments": {}}]}, {"thinking": MARK}])
def test_without_a_template_nothing_but_a_role_and_a_content_can_be_shown(more: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **more}]
    for example in (
        Conversation(messages, WHERE),
        Conversation(messages[:1] * 2, WHERE, tools=[{"name": MARK}]),
    ):
        with pytest.raises(DataError, match="use a model with a chat template") as caught:
            encode(example, character_tokenizer(None), LONG)
        assert MARK not in str(caught.value)


@pytest.mark.parametrize("template", [*MARKED, None])
def test_the_right_answer_is_what_a_template_makes_of_the_last_message(template: str | None) -> None:
    tokenizer = character_tokenizer(template)
    example = conversation("hi", "hello", "and", "bye")
    assert answer_text(example, tokenizer).strip() == "bye"
    if template:
        thinks = template.replace("m['content'] + eos", "(m.thinking or 'none') + ': ' + m['content'] + eos")
        tokenizer = character_tokenizer(thinks)
        assert answer_text(example, tokenizer) == "none: bye"
        said = [*example.messages[:-1], {**example.messages[-1], "thinking": "so"}]
        assert answer_text(Conversation(said, WHERE), tokenizer) == "so: bye"
