"""Messages of a record, as a chat template takes them, and which of them are learned."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blindtune.client.data.reading.fields import LEARNING, is_absent
from blindtune.client.data.reading.records import Record
from blindtune.errors import DataError

__all__ = ["Message", "Turns", "is_shown", "says_something", "texts_of", "tools_of", "turns_of"]

Message = dict[str, Any]
"""A role, a content, and what else the chat template is to show, such as tool calls.

The content is a text or, where a record gives it in several parts, a list of such as
``{"type": "text", "text": ...}``.
"""

_ROLES = ("system", "user", "assistant", "tool")
_SILENT = frozenset({"role", "content", "id", "tool_call_id"})


@dataclass(frozen=True)
class Turns:
    """The messages of a field.

    Attributes:
        unlearned: indices of those that say of themselves that they are not learned.
        learned: of those that say that they are.
    """

    messages: list[Message]
    unlearned: frozenset[int]
    learned: frozenset[int]


def turns_of(record: Record, name: str) -> Turns:
    """The messages in a record's field.

    Raises:
        DataError: it is no list of messages, or one of them is not understood.
    """
    value = record.fields[name]
    if not isinstance(value, list) or not value:
        raise DataError(f"{record.where}: field {name!r} should be a list of messages")
    messages = []
    said: dict[bool, set[int]] = {True: set(), False: set()}
    for index, message in enumerate(value):
        what = f"message {index + 1} of {name!r}"
        if not isinstance(message, Mapping):
            raise DataError(f"{record.where}: {what} should have a role and a content, both texts")
        for learned in _learning(message, record, what):
            said[learned].add(index)
        messages.append(_message(message, record, what))
        if index in said[True] and (index in said[False] or messages[-1]["role"] != "assistant"):
            raise DataError(f"{record.where}: {what} says that it is learned, and only answers can be")
    return Turns(messages, frozenset(said[False]), frozenset(said[True]))


def texts_of(message: Message) -> list[str]:
    """The texts of a message's content."""
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def says_something(message: Message) -> bool:
    """Whether there is anything in a message to read or to learn."""
    return any(text.strip() for text in texts_of(message)) or bool(message.keys() - _SILENT - {"name"})


def is_shown(message: Message, name: str) -> bool:
    """Whether a field of a message must be in what the chat template writes.

    What links a call with its answer need not: their order does that too. And an answer's name is that of
    the call.
    """
    return name not in _SILENT and not (name == "name" and message["role"] == "tool")


def tools_of(record: Record) -> Sequence[Mapping[str, Any]]:
    """The tools that a record offers: a list of them, or its JSON.

    Raises:
        DataError: it is neither.
    """
    value = record.fields.get("tools")
    if isinstance(value, str) and value.strip():
        value = _from_json(value)
    if is_absent(value) or value in ({}, " "):
        return ()
    if not isinstance(value, list) or not all(isinstance(x, Mapping) and x for x in value):
        raise DataError(f"{record.where}: field 'tools' should be a list of tools, each of them an object")
    return [_without_gaps(x, record) for x in value]


def _message(message: Mapping[str, Any], record: Record, what: str) -> Message:
    content = message.get("content")
    if content is None and not is_absent(message.get("tool_calls")):
        content = ""
    elif isinstance(content, list) and content:
        content = _texts(content, record, what)
    if not isinstance(content, str | list) or content == []:
        raise DataError(f"{record.where}: {what} should have a role and a content, both texts")
    if message.get("role") not in _ROLES:
        raise DataError(f"{record.where}: the role of {what} should be one of {', '.join(_ROLES)}")
    found: Message = {"role": str(message["role"]), "content": content}
    for name, value in message.items():
        if name in (*found, *LEARNING) or is_absent(value):
            continue
        found[name] = _without_gaps(value, record)
    if "tool_calls" in found:
        found["tool_calls"] = _calls(found["tool_calls"], record, what)
    return found


def _texts(parts: list[Any], record: Record, what: str) -> str | list[dict[str, Any]]:
    """A content in parts, all of them texts; a single one is the content."""
    found = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            raise DataError(
                f"{record.where}: {what} has a part that is no text, and only texts are trained on"
            )
        more = (
            [name for name, value in part.items() if value is not None] if isinstance(part, Mapping) else []
        )
        if set(more) - {"type", "text"}:
            raise DataError(f"{record.where}: {what} has a part with more than a type and a text")
        found.append({"type": "text", "text": text})
    return str(found[0]["text"]) if len(found) == 1 else found


def _calls(value: Any, record: Record, what: str) -> list[dict[str, Any]]:
    """Calls with their arguments as objects, as chat templates expect them; a record may have their JSON."""
    if not isinstance(value, list) or not all(isinstance(x, Mapping) for x in value):
        raise DataError(f"{record.where}: {what} should have a list of objects as tool_calls")
    calls = []
    for call in value:
        called = call.get("function", call)
        if not isinstance(called, Mapping) or not isinstance(called.get("name"), str):
            raise DataError(f"{record.where}: {what} has a call in tool_calls without the name of a function")
        arguments = called.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = _from_json(arguments)
        if not isinstance(arguments, Mapping):
            raise DataError(f"{record.where}: {what} has a call in tool_calls whose arguments are no object")
        called = {**called, "arguments": dict(arguments)}
        calls.append({**call, "function": called} if "function" in call else called)
    return calls


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _without_gaps(value: Any, record: Record) -> Any:
    """A value as it was before a table filled it up with nulls."""
    if not record.in_table:
        return value
    if isinstance(value, Mapping):
        return {name: _without_gaps(x, record) for name, x in value.items() if x is not None}
    return [_without_gaps(x, record) for x in value] if isinstance(value, list) else value


def _learning(message: Mapping[str, Any], record: Record, what: str) -> set[bool]:
    """What a message says of whether it is learned."""
    said = set()
    for name in LEARNING & message.keys():
        value = message[name]
        if is_absent(value):
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(
                f"{record.where}: field {name!r} of {what} should be 0 or 1: it is learned or it is not"
            )
        said.add(bool(value))
    return said
