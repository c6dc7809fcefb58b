"""A model's chat template: conversations written out whole, or refused, and the same on any day.

A template is a program, and may leave out what it has no place for: system messages, contents in parts,
tool calls, thoughts of earlier turns. So what it wrote is searched for the words of each message. They may
be there by chance, as "no" is in "notary", so the conversation is also written with marks in their place.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from blindtune.client.data.reading.formats import Conversation
from blindtune.client.data.reading.messages import Message, texts_of
from blindtune.client.data.templates.marks import Marks, Place, first_without_words, forms
from blindtune.errors import DataError

__all__ = ["ChatTemplate", "Written"]

# As transformers looks for it.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Put before a template that asks what time it is.
_CLOCK = (
    "{% macro strftime_now(format) %}{% if format in blindtune_dates %}{{ blindtune_dates[format] }}"
    "{% else %}{{ raise_exception('its date cannot be repeated on another day') }}{% endif %}"
    "{% endmacro +%}"
)
# Fields of messages that data sets have; another name could be private.
_NAMED = (
    "function_call",
    "images",
    "name",
    "prefix",
    "reasoning",
    "reasoning_content",
    "thinking",
    "tool_calls",
)


class ChatTemplate:
    """Writes conversations as a tokenizer's chat template has them.

    Args:
        tokenizer: that has one.
        now: the time that the template is told; the same time gives the same texts.
    """

    def __init__(self, tokenizer: Any, now: datetime | None = None) -> None:
        self._tokenizer = tokenizer
        self._now = now or datetime.now()
        self._sources: dict[bool, str] = {}
        self._dates: dict[str, str] = {}
        self._known: dict[Any, Place | None] = {}

    def write(self, example: Conversation, ask: bool = False) -> "Written":
        """A conversation, in the form that the template shows all of.

        Args:
            ask: whether what comes before an answer follows the messages.

        Raises:
            DataError: the template fails, or leaves out words in any form.
        """
        try:
            return self._write(example, ask)
        except RecursionError:
            raise DataError(
                f"{example.where}: a message or a tool is nested too deeply: simplify it"
            ) from None

    def _write(self, example: Conversation, ask: bool) -> "Written":
        refused: DataError | None = None
        lost: list[Place] = []
        for messages in forms(example.messages):
            try:
                text = str(self.apply(messages, example, tokenize=False, add_generation_prompt=ask))
            except DataError as error:
                refused = refused or error
                continue
            written = Written(self, messages, example, text)
            missing = first_without_words(messages, text) or self._lost(written, ask)
            if missing is None:
                return written
            lost.append(missing)
        if refused is not None and not lost:
            raise refused
        # A form in which the template shows all contents is the one that it wants.
        raise DataError(_left_out(example, max(lost, key=lambda place: place.name != "content")))

    def marks_answers(self, example: Conversation) -> bool:
        """Whether the template says itself what the assistant says."""
        return _GENERATION.search(self._source(example)) is not None

    def apply(
        self,
        messages: Sequence[Message],
        example: Conversation,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> Any:
        """What transformers makes of some messages.

        Args:
            tools: in the place of the example's.

        Raises:
            DataError: the template fails.
        """
        source = self._source(example)
        try:
            return self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(example.tools if tools is None else tools) or None,
                chat_template=source,
                blindtune_dates=self._dates,
                **options,
            )
        except Exception as error:  # a template is a program, and may fail in any way
            # Its message could quote the conversation, unless it stands in the template as it is.
            said = str(error) if isinstance(error, TemplateError) and str(error) in source else ""
            raise DataError(
                f"{example.where}: the model's chat template refuses this conversation: "
                f"{said or type(error).__name__}"
            ) from None

    def _source(self, example: Conversation) -> str:
        """The template, which may be another one where there are tools."""
        tools = list(example.tools) or None
        if bool(tools) not in self._sources:
            try:
                source = str(self._tokenizer.get_chat_template(tools=tools))
            except ValueError:
                raise DataError(
                    f"{example.where}: the model's tokenizer has several chat templates, and none is called "
                    "default"
                ) from None
            self._sources[bool(tools)] = self._dated(source)
        return self._sources[bool(tools)]

    def _dated(self, source: str) -> str:
        """A template whose clock stands still."""
        if "strftime_now" not in source:
            return source
        try:
            tokens = ImmutableSandboxedEnvironment().lexer.tokenize(source)
            texts = {x.value for x in tokens if x.type == "string"}
        except TemplateSyntaxError:
            return source  # whoever runs it will say so
        self._dates |= {text: self._now.strftime(text) for text in texts if "%" in text}
        return _CLOCK + source

    def _lost(self, written: "Written", ask: bool) -> Place | None:
        """The first place that the template does not show, whatever stands there."""
        shape = (ask, tuple(map(_shape, written.messages)))
        plain = not written.example.tools and None not in shape[1]
        if plain and shape in self._known:
            return self._known[shape]
        marks = Marks(written.messages, written.example.tools, written.text)
        try:
            shown = self.apply(
                marks.messages, written.example, marks.tools, tokenize=False, add_generation_prompt=ask
            )
        except DataError:
            if marks.only_contents:
                return None  # it accepts certain words alone, and has shown those of the example
            raise
        lost = marks.first_lost(shown)
        if plain:
            self._known[shape] = lost
        return lost


@dataclass(frozen=True)
class Written:
    """A conversation in the form that its template shows all of.

    Attributes:
        messages: in that form.
        example: that they are from.
        text: what the template writes for them.
    """

    template: ChatTemplate
    messages: Sequence[Message]
    example: Conversation
    text: str

    def prefix(self, count: int, ask: bool = False) -> str:
        """What the template writes for the first messages.

        Args:
            ask: whether what comes before an answer follows.
        """
        return str(
            self.template.apply(
                self.messages[:count], self.example, tokenize=False, add_generation_prompt=ask
            )
        )

    def with_answers_marked(self) -> tuple[list[int], list[bool]]:
        """Token numbers, and for each whether the template says that the assistant says it."""
        found = self.template.apply(
            self.messages, self.example, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(found["input_ids"]), [bool(x) for x in found["assistant_masks"]]


def _shape(message: Message) -> Any:
    """What decides on whether a template shows a plain message, whatever its words; None for others."""
    if message.keys() != {"role", "content"}:
        return None
    content = message["content"]
    says = tuple(bool(text.strip()) for text in texts_of(message))
    return message["role"], isinstance(content, str), says


def _left_out(example: Conversation, place: Place) -> str:
    if place.index is None:
        return (
            f"{example.where}: the model's chat template leaves out something of the tools: take a model "
            "whose template shows tools, or remove them and the conversations that use them"
        )
    role = example.messages[place.index]["role"]
    number = place.index + (0 if example.system_added else 1)
    whose = f"of message {number} ({role})" if number else "of the system message"
    take = "or take a model whose template shows it"
    if role == "assistant":
        take = f"make an example of each answer if it is an earlier thought, {take}"
    if place.name == "content":
        advice = f"remove it, {take}"
        if role == "system":
            advice = "put it into the first message of the user"
            if example.system_added:
                advice += ", and leave out data.system or the record's field"
        return f"{example.where}: the model's chat template leaves out words {whose}: {advice}"
    name = repr(place.name) if place.name in _NAMED else "a field"
    return (
        f"{example.where}: the model's chat template leaves out {name} {whose}: write it into the content as "
        f"the template would, remove it, {take}"
    )
