"""Where turns begin and end among tokens, and with which tokens answers end."""

from typing import Any

import pytest
from support.assets import asset
from support.chats import LONG, MARKED, WHERE, conversation, ids_of, learned, merging_tokenizer
from support.recipes import CHAT, character_tokenizer
from tokenizers import AddedToken
from transformers import AutoTokenizer

from blindtune.client.data.chat import encode
from blindtune.client.data.reading.formats import Completion, Conversation
from blindtune.client.data.templates.borders import Borders

pytestmark = pytest.mark.hf

TEXTS = [
    "<s>|user: hello\n\n</s>\n|assistant:\n\n\n\nhello there</s>\n\n|user: a b</s>",
    "</s></s> hello\u00e9\u4e2d\n\n\n</s>hello  hello",
    "no control token at all \n\n hello",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["merging", "characters", "real", "real with stripping tokens"])
def test_borders_are_where_the_tokens_of_the_text_s_beginning_end(kind: str, text: str) -> None:
    """The slow way, of which this is a short cut: all tokens of all that is before each border."""
    tokenizer: Any
    if kind == "merging":
        tokenizer = merging_tokenizer(CHAT)
    elif kind == "characters":
        tokenizer = character_tokenizer(CHAT, split=True)
    else:
        tokenizer = AutoTokenizer.from_pretrained(asset("models/tiny-llama"))
        strips = kind == "real with stripping tokens"
        added = [
            AddedToken(x, lstrip=strips, rstrip=strips, normalized=strips)
            for x in ("</s>", "|user", "|assistant")
        ]
        tokenizer.add_tokens(added)
    ids = ids_of(text, tokenizer)
    borders = Borders(text, tokenizer)
    assert borders.ids == ids
    for end in range(len(text) + 1):
        before = ids_of(text[:end], tokenizer)
        common = next((i for i, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), None)
        assert borders.token(end) == (min(len(ids), len(before)) if common is None else common), end


class Counting:
    """A tokenizer that counts the characters that it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.characters = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: str, **options: Any) -> Any:
        self.characters += len(text)
        return self.tokenizer(text, **options)


def test_a_conversation_of_many_turns_is_tokenized_a_few_times_and_not_once_for_each() -> None:
    tokenizer = Counting(character_tokenizer(CHAT))
    long = conversation(*["hi", "hello there"] * 100)
    encoded = encode(long, tokenizer, LONG)
    assert learned(encoded, tokenizer) == ["hello there</s>"] * 100
    assert tokenizer.characters < 6 * len(encoded.input_ids)


def ending(template: str, *texts: str, **more: Any) -> list[str]:
    tokenizer = character_tokenizer(template)
    tokenizer.add_tokens(["<end>", "<call>", "</think>"])
    found = conversation(*texts)
    messages = [{**x, **more} if x["role"] == "assistant" else x for x in found.messages]
    encoded = encode(Conversation(messages, WHERE), tokenizer, LONG)
    assert encoded.ends.endless == (not encoded.ends.stops)
    return sorted(tokenizer.decode([x]) for x in encoded.ends.stops)


@pytest.mark.parametrize("template", MARKED, ids=["marked", "prefixes"])
def test_answers_end_with_the_tokens_that_the_template_ends_them_with(template: str) -> None:
    assert ending(template, "hi", "hello") == ["</s>"]
    other = template.replace("m['content'] + eos_token", "m['content'] + '<end>'")
    assert ending(other, "hi", "hello", "and", "bye") == ["<end>"]
    both = template.replace("m['content'] + eos_token", "m['content'] + '<end>\n' + eos_token")
    assert ending(both, "hi", "hello") == ["</s>", "<end>"]
    none = template.replace("m['content'] + eos_token", "m['content']")
    assert ending(none, "hi", "hello") == []
    assert ending(none, "hi", "hello<end>") == [], "the data's own"


@pytest.mark.parametrize("template", MARKED, ids=["marked", "prefixes"])
def test_a_token_after_which_more_is_said_does_not_end_an_answer(template: str) -> None:
    twice = template.replace("m['content'] + eos_token", "'no<end>' + m['content'] + '<end>' + eos_token")
    assert ending(twice, "hi", "hello") == ["</s>"]
    assert ending(template, "hi", "a</think>b") == ["</s>"]
    call = [{"name": "f", "arguments": {"x": "y"}}]
    calls = "{% for c in m.tool_calls or [] %}{{ c.name + c.arguments.x }}<call>{% endfor %}"
    shown = template.replace("{{ m['content'] + eos_token }}", calls + "{{ m['content'] + eos_token }}")
    assert ending(shown, "hi", "", tool_calls=call) == ["</s>"]


def test_a_plain_text_ends_as_texts_do() -> None:
    tokenizer = character_tokenizer(None)
    assert encode(Completion("a", "b", WHERE), tokenizer, LONG).ends.stops == {tokenizer.eos_token_id}
    tokenizer.eos_token = None
    assert encode(Completion("a", "b", WHERE), tokenizer, LONG).ends.endless
