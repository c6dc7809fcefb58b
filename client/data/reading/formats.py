"""The layouts of records that are understood, and what each becomes.

    messages            {"messages": [{"role": ..., "content": ...}, ...]} and perhaps "system", "tools"
    prompt-completion   {"prompt": text or messages, "completion": text or messages}; the same
    instruction         {"instruction": ..., "response": ...} and perhaps "context", "system", "history"
                        (Alpaca's names "output" and "input" do as well)
    question            {"question": ..., "answer": ...} and perhaps "context", "rationale", "system",
                        "history"
    text-label          {"text": ..., "label": ...} and perhaps "text_pair"

All but the last become a `Conversation`, in which the assistant's turns carry the loss, but for those of a
prompt and those that say otherwise. Two plain texts are a `Completion`: they are joined as they are,
without a chat template.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from blindtune.client.data.reading.fields import EmptyRecordError, given, require_understood
from blindtune.client.data.reading.messages import Message, says_something, tools_of, turns_of
from blindtune.client.data.reading.records import Record
from blindtune.client.recipe.schema import DataFormat, Task
from blindtune.errors import DataError

__all__ = ["Completion", "Conversation", "Labelled", "Parsed", "parse", "recognise", "with_system"]


@dataclass(frozen=True)
class Conversation:
    """Messages; the assistant's carry the loss.

    Attributes:
        answer: what the last one should be compared with, where that is not all of it.
        unlearned: indices of messages of the assistant that carry none.
        tools: that the assistant can call, for the chat template.
        system_added: whether the first message is none of the record's own messages.
    """

    messages: Sequence[Message]
    where: str
    answer: str | None = None
    unlearned: frozenset[int] = frozenset()
    tools: Sequence[Mapping[str, Any]] = ()
    system_added: bool = False


@dataclass(frozen=True)
class Completion:
    """A text and how it goes on; what follows carries the loss."""

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True)
class Labelled:
    """A text of a class, or a pair of texts."""

    text: str
    label: str
    where: str
    pair: str | None = None


Parsed = Conversation | Completion | Labelled

ANSWER_MARK = "####"
# Names that must be there, for each format; the first name of each tuple is the one that messages give.
_NEEDED: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "prompt-completion": (("prompt",), ("completion",)),
    "instruction": (("instruction",), ("response", "output")),
    "question": (("question",), ("answer",)),
    "text-label": (("text",), ("label",)),
}
_KNOWN = tuple(dict.fromkeys(name for needed in _NEEDED.values() for names in needed for name in names))


def recognise(record: Record, task: Task) -> DataFormat:
    """The format of a record.

    Raises:
        DataError: it is none of those that the task can use.
    """
    usable = [name for name in _NEEDED if (name == "text-label") == (task == "classification")]
    for name in usable:
        if all(given(record, *names) for names in _NEEDED[name]):
            return cast(DataFormat, name)
    wanted = "; ".join(f"{name}: {', '.join(x[0] for x in _NEEDED[name])}" for name in usable)
    # A field's name may be private as well, unless it is one that formats use.
    known = [x for x in _KNOWN if given(record, x)]
    others = len(record.fields) - len(known)
    found = ", ".join([*known, *([f"{others} of other names"] if others else [])]) or "none at all"
    raise DataError(
        f"{record.where}: no format for data.task: {task} has just these fields: {found}. Rename them to "
        f"those of a format ({wanted})"
    )


def parse(record: Record, layout: DataFormat) -> Parsed:
    """What a record says.

    Raises:
        EmptyRecordError: it says nothing where it must say something.
        DataError: a field is missing or of the wrong type, or changes what the record means and is not
            understood.
    """
    for names in _NEEDED[layout]:
        if not given(record, *names):
            raise DataError(f"{record.where}: field {names[0]!r} is missing or null (format {layout})")
    require_understood(record, layout)
    return _PARSERS[layout](record)


def with_system(example: Conversation, system: str) -> Conversation:
    """A conversation with a system message before it, unless it has one of its own."""
    if example.messages[0]["role"] == "system":
        return example
    return replace(
        example,
        messages=[{"role": "system", "content": system}, *example.messages],
        unlearned=frozenset(index + 1 for index in example.unlearned),
        system_added=True,
    )


def _text(record: Record, *names: str, empty: bool = False) -> str:
    found = given(record, *names)
    name, *others = [x for x in found if record.fields[x] != ""] or found[:1]
    if others:
        raise DataError(f"{record.where}: fields {name!r} and {others[0]!r} mean the same: remove one")
    value = record.fields[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{record.where}: field {name!r} should be a text, not {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{record.where}: field {name!r} is no number (NaN), or an infinite one")
    if not empty and not str(value).strip():
        raise EmptyRecordError(f"{record.where}: field {name!r} is empty")
    return str(value)


def _optional(record: Record, *names: str) -> str:
    return _text(record, *names, empty=True) if given(record, *names) else ""


def _conversation(
    record: Record,
    messages: Sequence[Message],
    unlearned: frozenset[int] = frozenset(),
    answer: str | None = None,
) -> Conversation:
    """A conversation with what a record says of it beside its messages."""
    learned = [x for i, x in enumerate(messages) if x["role"] == "assistant" and i not in unlearned]
    if not any(says_something(x) for x in learned):
        raise EmptyRecordError(
            f"{record.where}: no message of role assistant says anything that is learned: there is nothing "
            "to learn"
        )
    found = Conversation(messages, record.where, answer, unlearned, tools_of(record))
    system = _optional(record, "system")
    if not system.strip():
        return found
    if messages[0]["role"] == "system" and messages[0]["content"] != system:
        raise DataError(f"{record.where}: field 'system' and the first message are two system messages")
    return with_system(found, system)


def _from_messages(record: Record) -> Conversation:
    turns = turns_of(record, "messages")
    return _conversation(record, turns.messages, _answers(turns.messages, turns.unlearned))


def _from_prompt(record: Record) -> Conversation | Completion:
    kinds = {type(record.fields[name]) for name in ("prompt", "completion")}
    if kinds == {str}:
        for name in ("system", "tools"):
            if record.fields.get(name):
                raise DataError(
                    f"{record.where}: field {name!r} needs a conversation, and this record is two plain "
                    "texts: write them as messages"
                )
        return Completion(_text(record, "prompt", empty=True), _text(record, "completion"), record.where)
    if kinds != {list}:
        raise DataError(f"{record.where}: 'prompt' and 'completion' should both be texts, or both messages")
    prompt, completion = turns_of(record, "prompt"), turns_of(record, "completion")
    if prompt.learned:
        raise DataError(
            f"{record.where}: a message of 'prompt' says that it is learned, and only 'completion' is: use "
            "format messages"
        )
    before = len(prompt.messages)
    messages = prompt.messages + completion.messages
    unlearned = {*range(before), *(before + index for index in completion.unlearned)}
    return _conversation(record, messages, _answers(messages, unlearned))


def _answers(messages: Sequence[Message], indices: Iterable[int]) -> frozenset[int]:
    return frozenset(i for i in indices if messages[i]["role"] == "assistant")


def _turns(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _history(record: Record) -> list[Message]:
    """Earlier questions and answers; those are learned too, as the format's authors have it."""
    history = record.fields.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(x, list) and len(x) == 2 and all(isinstance(y, str) and y.strip() for y in x)
        for x in history
    ):
        raise DataError(
            f"{record.where}: field 'history' should be a list of pairs: a question and its answer"
        )
    return [message for question, answer in history for message in _turns(question, answer)]


def _with_context(asked: str, context: str) -> str:
    return f"{asked}\n\n{context}" if context.strip() else asked


def _from_instruction(record: Record) -> Conversation:
    asked = _with_context(_text(record, "instruction"), _optional(record, "context", "input"))
    answer = _text(record, "response", "output")
    return _conversation(record, [*_history(record), *_turns(asked, answer)])


def _from_question(record: Record) -> Conversation:
    asked = _with_context(_text(record, "question"), _optional(record, "context"))
    rationale, answer = _optional(record, "rationale"), _text(record, "answer")
    reply = f"{rationale}\n{ANSWER_MARK} {answer}" if rationale.strip() else answer
    return _conversation(record, [*_history(record), *_turns(asked, reply)], answer=answer)


def _from_label(record: Record) -> Labelled:
    label = record.fields["label"]
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise DataError(f"{record.where}: field 'label' should be a text or a whole number")
    if not str(label).strip():
        raise EmptyRecordError(f"{record.where}: field 'label' is empty")
    pair = _text(record, "text_pair") if given(record, "text_pair") else None
    return Labelled(_text(record, "text"), str(label), record.where, pair)


_PARSERS: dict[str, Callable[[Record], Parsed]] = {
    "messages": _from_messages,
    "prompt-completion": _from_prompt,
    "instruction": _from_instruction,
    "question": _from_question,
    "text-label": _from_label,
}
