"""From conversations to token numbers, and which of them carry the loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from blindtune.client.data.reading.formats import Completion, Conversation
from blindtune.client.data.reading.messages import Message, is_shown, texts_of
from blindtune.client.data.templates.borders import Borders
from blindtune.client.data.templates.ends import Ends, end_of_turn, ends_of
from blindtune.client.data.templates.template import ChatTemplate, Written
from blindtune.errors import DataError

__all__ = ["IGNORED", "Encoded", "answer_text", "encode", "prompt_text"]

IGNORED = -100
"""The label of a token that carries no loss, as PyTorch's cross entropy has it."""


@dataclass(frozen=True)
class Encoded:
    """An example as token numbers.

    Attributes:
        input_ids: of all tokens.
        labels: the same, with `IGNORED` where a token carries no loss.
        cut: whether the example was longer than allowed.
        ends: how its answers end.
    """

    input_ids: list[int]
    labels: list[int]
    cut: bool
    ends: Ends = field(default_factory=Ends)

    @property
    def learns(self) -> bool:
        """Whether any token carries loss. The first one never does: nothing precedes it."""
        return any(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class _Tokens:
    """A conversation's tokens, which of them are learned, and the answers' places and messages."""

    ids: list[int]
    mask: list[bool]
    turns: Sequence[tuple[int, int]]
    said: Sequence[Message]


def encode(
    example: Conversation | Completion, tokenizer: Any, max_length: int, template: ChatTemplate | None = None
) -> Encoded:
    """Token numbers of an example, cut off at ``max_length``.

    Args:
        template: of the tokenizer, which remembers what it was asked and what time it is; else a new one.

    Raises:
        DataError: the tokenizer's chat template fails, leaves out something of the example, or does not show
            which tokens are the answer.
    """
    if isinstance(example, Completion) or tokenizer.chat_template is None:
        joined = example if isinstance(example, Completion) else _without_template(example)
        ids, mask = _join(joined, tokenizer)
        end = tokenizer.eos_token_id
        ends = Ends(frozenset() if end is None else frozenset({end}), endless=end is None)
    else:
        written = (template or ChatTemplate(tokenizer)).write(example)
        found = (_by_marks if written.template.marks_answers(example) else _by_prefixes)(written, tokenizer)
        ids, mask = found.ids, found.mask
        ends = ends_of(ids, found.turns, found.said, tokenizer)
    labels = [token if carries else IGNORED for token, carries in zip(ids, mask, strict=True)]
    return Encoded(ids[:max_length], labels[:max_length], len(ids) > max_length, ends)


def prompt_text(
    messages: Sequence[Message],
    tokenizer: Any,
    template: ChatTemplate | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    where: str = "the prompt",
) -> str:
    """The text after which the model answers.

    Raises:
        DataError: the tokenizer's chat template fails, or leaves out something.
    """
    asked = Conversation(messages, where, tools=tools)
    if tokenizer.chat_template is None:
        answer = {"role": "assistant", "content": ""}
        return _without_template(replace(asked, messages=[*messages, answer])).prompt
    return (template or ChatTemplate(tokenizer)).write(asked, ask=True).text


def answer_text(example: Conversation, tokenizer: Any, template: ChatTemplate | None = None) -> str:
    """What a model has to say after a conversation's other messages to say its last one.

    That is what the chat template makes of it, without special tokens: a thought that is a field of its own,
    or an empty one where the template has a place for thoughts, is said as well.
    """
    if tokenizer.chat_template is None:
        return _without_template(example).completion
    written = (template or ChatTemplate(tokenizer)).write(example)
    last = len(example.messages) - 1
    whole, before = written.text, written.prefix(last, True)
    if not whole.startswith(before):
        return "\n".join(texts_of(example.messages[last]))
    ids = tokenizer(whole[len(before) :], add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids[: end_of_turn(ids, 0, len(ids), tokenizer)], skip_special_tokens=True))


def _join(example: Completion, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Both texts in one, without a chat template."""
    end = tokenizer.eos_token_id
    prompt = tokenizer(example.prompt)["input_ids"] if example.prompt else []
    if prompt and prompt[-1] == end and not example.prompt.endswith(tokenizer.eos_token):
        prompt = prompt[:-1]  # some tokenizers end every text, and this one goes on
    completion = tokenizer(example.completion, add_special_tokens=not prompt)["input_ids"]
    if end is not None:
        while completion[-1:] == [end]:  # the text has it, or the tokenizer adds it, or both
            completion = completion[:-1]
        completion = [*completion, end]
    begins_twice = [tokenizer.bos_token_id] * 2
    if prompt[:2] == begins_twice:  # the text has what the tokenizer adds
        prompt = prompt[1:]
    elif completion[:2] == begins_twice and not prompt:
        completion = completion[1:]
    return [*prompt, *completion], [False] * len(prompt) + [True] * len(completion)


def _without_template(example: Conversation) -> Completion:
    """A conversation for a model that has no chat template: headings, as in Alpaca."""
    *before, last = example.messages
    if last["role"] != "assistant":
        raise DataError(
            f"{example.where}: the conversation does not end with the assistant, which a tokenizer without a "
            "chat template can't show: use a model with a chat template"
        )
    if example.tools or any(is_shown(x, name) for x in example.messages for name in x if name != "content"):
        raise DataError(
            f"{example.where}: the conversation has tools or messages with more than a role and a content, "
            "which a tokenizer without a chat template can't show: use a model with a chat template"
        )
    if len(before) in example.unlearned:
        raise DataError(
            f"{example.where}: the last answer is not to be learned, and without a chat template it is the "
            "only one that could be: remove it, or use a model with a chat template"
        )
    texts = ["\n".join(texts_of(x)) for x in example.messages]
    parts = [f"### {x['role'].capitalize()}:\n{text}\n\n" for x, text in zip(before, texts, strict=False)]
    return Completion("".join(parts) + "### Assistant:\n", texts[-1], example.where)


def _by_marks(written: Written, tokenizer: Any) -> _Tokens:
    """The template says what the assistant says; what of that is not to be learned is found by prefixes."""
    ids, mask = written.with_answers_marked()
    example = written.example
    learned = [i for i in _answers(example) if i not in example.unlearned]
    if example.unlearned and learned:
        borders = Borders(written.text, tokenizer, ids)
        # Most of them stand at the beginning, and then nothing is asked of what the template does later.
        start = borders.token(_before(written, learned[0]))
        mask[:start] = [False] * start
        for index in (x for x in example.unlearned if x > learned[0]):
            before, after = written.prefix(index), written.prefix(index + 1)
            start, stop = len(before), _ended(written, after, before, index)
            start, stop = borders.token(start), borders.token(stop)
            mask[start:stop] = [False] * (stop - start)
    if not learned:
        mask = [False] * len(ids)
    turns = _runs(mask)
    # Which run is of which message is not said, but for the last, or where there are as many.
    said = learned if len(turns) == len(learned) else learned[-1:]
    last = turns[len(turns) - len(said) :] if turns else []
    return _Tokens(ids, mask, last, [example.messages[index] for index in said[: len(last)]])


def _before(written: Written, index: int) -> int:
    """Where a text ends that is written out before a message, with or without the question for an answer."""
    if index == 0:
        return 0
    texts = [written.prefix(index), written.prefix(index, True)]
    return _ended(written, next(filter(written.text.startswith, texts), texts[0]), "", index)


def _by_prefixes(written: Written, tokenizer: Any) -> _Tokens:
    """Finds the assistant's turns by writing the conversation out up to each of them."""
    example = written.example
    borders = Borders(written.text, tokenizer)
    mask = [False] * len(borders.ids)
    turns = []
    learned = [i for i in _answers(example) if i not in example.unlearned]
    for index in learned:
        if index == 0:
            raise DataError(
                f"{example.where}: the assistant speaks first, and nothing shows where its words begin: put "
                "a message of the user or the system before, or use a template with {% generation %} blocks"
            )
        before, after = written.prefix(index, True), written.prefix(index + 1)
        end = _ended(written, after, before, index)
        start = borders.token(len(before))
        stop = end_of_turn(borders.ids, start, borders.token(end), tokenizer)
        mask[start:stop] = [True] * (stop - start)
        turns.append((start, stop))
    return _Tokens(borders.ids, mask, turns, [example.messages[index] for index in learned])


def _runs(mask: Sequence[bool]) -> list[tuple[int, int]]:
    borders = [i for i in range(len(mask) + 1) if (i > 0 and mask[i - 1]) != (i < len(mask) and mask[i])]
    return list(zip(borders[::2], borders[1::2], strict=True))


def _answers(example: Conversation) -> list[int]:
    return [index for index, x in enumerate(example.messages) if x["role"] == "assistant"]


def _ended(written: Written, after: str, before: str, index: int) -> int:
    """Where a text ends that begins with another one and that the whole text begins with."""
    if written.text.startswith(after) and after.startswith(before):
        return len(after)
    raise DataError(
        f"{written.example.where}: the model's chat template renders message {index + 1} in another way when "
        "more follows, so its tokens can't be found: use one answer in each example, or a template with "
        "{% generation %} blocks"
    )
