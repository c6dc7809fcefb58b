"""Whether a text that a chat template wrote shows all that the template was given."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blindtune.client.data.reading.messages import Message, is_shown, texts_of

__all__ = ["Marks", "Place", "first_without_words", "forms"]

# What of a tool's description is in words; the rest says what type something has.
_WORDS_OF_TOOLS = ("name", "description")


@dataclass(frozen=True)
class Place:
    """Where words stand: in a field of a message or, without an index, in the tools."""

    index: int | None
    name: str


def forms(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The ways to put the same messages, the likeliest one first.

    Templates want contents as texts or as lists of parts, and arguments of calls as objects or as JSON.
    """
    several = any(isinstance(x["content"], list) for x in messages)
    calls = any("tool_calls" in x for x in messages)
    for parts in (several, not several):
        for as_json in (False, True) if calls else (False,):
            yield [_in_form(x, parts, as_json) for x in messages]


def first_without_words(messages: Sequence[Message], text: str) -> Place | None:
    """The first place whose words are not in a text, white space apart, or are in a notation for programs."""
    whole = _condensed(text)
    begin = 0
    for index, message in enumerate(messages):
        for name, words in _words(message):
            place = _position(words, whole, begin)
            if place < 0:
                return Place(index, name)
            begin = place
        for name in ("content", "tool_calls"):
            if any(_condensed(x) in whole for x in _notations(message.get(name))):
                return Place(index, name)
    return None


class Marks:
    """Messages and tools with a mark in the place of each text, to see which ones a template shows.

    Attributes:
        messages, tools: to be given to the template.
    """

    def __init__(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], text: str) -> None:
        self._text = text.casefold()
        self._count = 0
        self._places: list[tuple[str, Place]] = []
        self.messages = [self._message(index, message) for index, message in enumerate(messages)]
        self.tools = [self._value(x, Place(None, "tools"), _WORDS_OF_TOOLS) for x in tools]

    @property
    def only_contents(self) -> bool:
        """Whether nothing is marked but contents of messages."""
        return all(place.name == "content" for _, place in self._places)

    def first_lost(self, text: str) -> Place | None:
        """The first place whose mark is not in what the template wrote."""
        found = text.casefold()
        return next((place for mark, place in self._places if mark not in found), None)

    def _message(self, index: int, message: Message) -> Message:
        marked: Message = {}
        for name, value in message.items():
            place = Place(index, name)
            if name == "tool_calls":
                marked[name] = [self._call(call, place) for call in value]
            elif name == "content" or is_shown(message, name):
                before = len(self._places)
                marked[name] = self._value(value, place, ("text",) if name == "content" else None)
                if name != "content" and len(self._places) == before:
                    self._places.append(("\0", place))  # no words, such as true: nothing could show it
            else:
                marked[name] = value
        return marked

    def _call(self, call: Mapping[str, Any], place: Place) -> dict[str, Any]:
        if "function" in call:
            return {**call, "function": self._call(call["function"], place)}
        arguments = call["arguments"]
        as_json = isinstance(arguments, str)
        arguments = self._value(json.loads(arguments) if as_json else arguments, place)
        marked = {**call, "name": self._mark(place), "arguments": arguments}
        return {**marked, "arguments": json.dumps(arguments)} if as_json else marked

    def _value(self, value: Any, place: Place, only: Sequence[str] | None = None) -> Any:
        """The same with a mark for each text and number, or for those of some names."""
        if isinstance(value, Mapping):
            return {
                name: self._value(x, place, only)
                if isinstance(x, Mapping | list) or name in (only or value)
                else x
                for name, x in value.items()
            }
        if isinstance(value, list):
            return [self._value(x, place, only) if isinstance(x, Mapping) or not only else x for x in value]
        if isinstance(value, bool) or value is None or not str(value).strip():
            return value
        return self._mark(place)

    def _mark(self, place: Place) -> str:
        while (mark := f"x{self._count}x") in self._text:
            self._count += 1
        self._count += 1
        self._places.append((mark, place))
        return mark


def _in_form(message: Message, parts: bool, as_json: bool) -> Message:
    texts = texts_of(message)
    content = [{"type": "text", "text": x} for x in texts] if parts else "\n".join(texts)
    changed = {**message, "content": content}
    if as_json and "tool_calls" in message:
        changed["tool_calls"] = [_with_json(x) for x in message["tool_calls"]]
    return changed


def _with_json(call: Mapping[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _with_json(call["function"])}
    return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}


def _words(message: Message) -> Iterator[tuple[str, str]]:
    for text in texts_of(message):
        yield "content", text
    for name, value in message.items():
        if isinstance(value, str) and name != "content" and is_shown(message, name):
            yield name, value


def _position(words: str, whole: str, begin: int) -> int:
    """Where words are in a text, after a position if possible, also as JSON writes them; -1 for nowhere."""
    for spelling in (words, json.dumps(words, ensure_ascii=False)[1:-1], json.dumps(words)[1:-1]):
        sought = _condensed(spelling)
        for start in (begin, 0):
            if (found := whole.find(sought, start)) >= 0:
                return found
    return -1


def _notations(value: Any) -> Iterator[str]:
    """How a template writes what it takes for a text and is none.

    Calls are written in JSON as a rule, but not in Python's notation, and contents in neither.
    """
    if isinstance(value, Mapping | list):
        as_json = json.dumps(value, ensure_ascii=False)
        if str(value) != as_json:
            yield str(value)
        if isinstance(value, list) and all(isinstance(x, Mapping) and "text" in x for x in value):
            yield as_json
        for x in value.values() if isinstance(value, Mapping) else value:
            yield from _notations(x)


def _condensed(text: str) -> str:
    return "".join(text.split())
