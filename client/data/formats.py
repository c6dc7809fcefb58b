"""The layouts of records that are understood, and what each becomes.

    messages            {"messages": [{"role": ..., "content": ...}, ...]}
    prompt-completion   {"prompt": text or messages, "completion": text or messages}
    instruction         {"instruction": ..., "response": ...} and perhaps "context"
                        (Alpaca's names "output" and "input" do as well)
    question            {"question": ..., "answer": ...} and perhaps "rationale"
    text-label          {"text": ..., "label": ...}

All but the last become a `Conversation`, in which the assistant's turns carry the loss. Two plain texts
are a `Completion`: they are joined as they are, without a chat template.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from blindtune.client.data.records import Record
from blindtune.client.recipe.schema import DataFormat, Task
from blindtune.protocol.errors import DataError

__all__ = ["Completion", "Conversation", "Labelled", "Message", "Parsed", "parse", "recognise"]

Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """Messages; the assistant's carry the loss.

    Attributes:
        answer: what the last one should be compared with, where that is not all of it.
    """

    messages: Sequence[Message]
    where: str
    answer: str | None = None


@dataclass(frozen=True)
class Completion:
    """A text and how it goes on; what follows carries the loss."""

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True)
class Labelled:
    """A text of a class."""

    text: str
    label: str
    where: str


Parsed = Conversation | Completion | Labelled

ANSWER_MARK = "####"
_ROLES = ("system", "user", "assistant", "tool")
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
        if all(_given(record, names) for names in _NEEDED[name]):
            return cast(DataFormat, name)
    wanted = "; ".join(f"{name}: {', '.join(x[0] for x in _NEEDED[name])}" for name in usable)
    # A field's name may be private as well, unless it is one that formats use.
    known = [x for x in _KNOWN if _given(record, [x])]
    others = len(record.fields) - len(known)
    found = ", ".join([*known, *([f"{others} of other names"] if others else [])]) or "none at all"
    raise DataError(
        f"{record.where}: no format for data.task: {task} has just these fields: {found}. Rename them to "
        f"those of a format ({wanted})"
    )


def parse(record: Record, layout: DataFormat) -> Parsed:
    """What a record says.

    Raises:
        DataError: a field is missing, empty or of the wrong type.
    """
    for names in _NEEDED[layout]:
        if not _given(record, names):
            raise DataError(f"{record.where}: field {names[0]!r} is missing or null (format {layout})")
    return _PARSERS[layout](record)


def _given(record: Record, names: Sequence[str]) -> list[str]:
    """Those of some names that a record has a value for: tables fill gaps with null."""
    return [name for name in names if record.fields.get(name) is not None]


def _text(record: Record, *names: str, empty: bool = False) -> str:
    name = _given(record, names)[0]
    value = record.fields[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{record.where}: field {name!r} should be a text, not {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{record.where}: field {name!r} is no number (NaN), or an infinite one")
    if not empty and not str(value).strip():
        raise DataError(f"{record.where}: field {name!r} is empty")
    return str(value)


def _optional(record: Record, *names: str) -> str:
    return _text(record, *names, empty=True) if _given(record, names) else ""


def _messages(record: Record, name: str) -> list[Message]:
    value = record.fields[name]
    if not isinstance(value, list) or not value:
        raise DataError(f"{record.where}: field {name!r} should be a list of messages")
    found = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise DataError(
                f"{record.where}: message {number} of {name!r} should have a role and a content, both texts"
            )
        if message.get("role") not in _ROLES:
            raise DataError(
                f"{record.where}: the role of message {number} of {name!r} should be one of "
                f"{', '.join(_ROLES)}"
            )
        if message.get("tool_calls"):
            raise DataError(
                f"{record.where}: message {number} of {name!r} has tool_calls, which are not trained on: "
                "write the call into the content, as the model's chat template would"
            )
        found.append({"role": str(message["role"]), "content": str(message["content"])})
    return found


def _from_messages(record: Record) -> Conversation:
    messages = _messages(record, "messages")
    if not any(x["role"] == "assistant" and x["content"].strip() for x in messages):
        raise DataError(
            f"{record.where}: no message of role assistant says anything: there is nothing to learn"
        )
    return Conversation(messages, record.where)


def _from_prompt(record: Record) -> Conversation | Completion:
    kinds = {type(record.fields[name]) for name in ("prompt", "completion")}
    if kinds == {str}:
        return Completion(_text(record, "prompt", empty=True), _text(record, "completion"), record.where)
    if kinds != {list}:
        raise DataError(f"{record.where}: 'prompt' and 'completion' should both be texts, or both messages")
    completion = _messages(record, "completion")
    if not any(x["role"] == "assistant" and x["content"].strip() for x in completion):
        raise DataError(f"{record.where}: 'completion' has no message of role assistant that says anything")
    return Conversation(_messages(record, "prompt") + completion, record.where)


def _turns(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _from_instruction(record: Record) -> Conversation:
    context = _optional(record, "context", "input")
    instruction = _text(record, "instruction")
    asked = f"{instruction}\n\n{context}" if context.strip() else instruction
    return Conversation(_turns(asked, _text(record, "response", "output")), record.where)


def _from_question(record: Record) -> Conversation:
    rationale, answer = _optional(record, "rationale"), _text(record, "answer")
    reply = f"{rationale}\n{ANSWER_MARK} {answer}" if rationale.strip() else answer
    return Conversation(_turns(_text(record, "question"), reply), record.where, answer)


def _from_label(record: Record) -> Labelled:
    label = record.fields["label"]
    if isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip():
        raise DataError(f"{record.where}: field 'label' should be a text or a whole number")
    return Labelled(_text(record, "text"), str(label), record.where)


_PARSERS: dict[str, Callable[[Record], Parsed]] = {
    "messages": _from_messages,
    "prompt-completion": _from_prompt,
    "instruction": _from_instruction,
    "question": _from_question,
    "text-label": _from_label,
}
