"""From conversations to token numbers, and which of them carry the loss."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from blindtune.client.data.formats import Completion, Conversation, Message
from blindtune.protocol.errors import DataError

__all__ = ["IGNORED", "Encoded", "encode", "prompt_text"]

IGNORED = -100
"""The label of a token that carries no loss, as PyTorch's cross entropy has it."""

# As transformers looks for it.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Encoded:
    """An example as token numbers.

    Attributes:
        input_ids: of all tokens.
        labels: the same, with `IGNORED` where a token carries no loss.
        cut: whether the example was longer than allowed.
    """

    input_ids: list[int]
    labels: list[int]
    cut: bool

    @property
    def learns(self) -> bool:
        """Whether any token carries loss. The first one never does: nothing precedes it."""
        return any(label != IGNORED for label in self.labels[1:])


def encode(example: Conversation | Completion, tokenizer: Any, max_length: int) -> Encoded:
    """Token numbers of an example, cut off at ``max_length``.

    Raises:
        DataError: the tokenizer's chat template fails, or does not show which tokens are the answer.
    """
    if isinstance(example, Completion):
        ids, mask = _join(example, tokenizer)
    elif tokenizer.chat_template is None:
        ids, mask = _join(_without_template(example), tokenizer)
    else:
        ids, mask = _from_template(example, tokenizer)
    labels = [token if carries else IGNORED for token, carries in zip(ids, mask, strict=True)]
    return Encoded(ids[:max_length], labels[:max_length], len(ids) > max_length)


def prompt_text(messages: Sequence[Message], tokenizer: Any) -> str:
    """The text after which the model answers."""
    if tokenizer.chat_template is None:
        asked = Conversation([*messages, {"role": "assistant", "content": ""}], "the prompt")
        return _without_template(asked).prompt
    return _rendered(tokenizer, messages, "the prompt", add_generation_prompt=True)


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
    parts = [f"### {message['role'].capitalize()}:\n{message['content']}\n\n" for message in before]
    return Completion("".join(parts) + "### Assistant:\n", last["content"], example.where)


def _from_template(example: Conversation, tokenizer: Any) -> tuple[list[int], list[bool]]:
    if _GENERATION.search(_template(tokenizer, example.where)):
        rendered = _apply(
            tokenizer, example.messages, example.where, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(rendered["input_ids"]), [bool(x) for x in rendered["assistant_masks"]]
    return _by_prefixes(example, tokenizer)


def _by_prefixes(example: Conversation, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Finds the assistant's turns by rendering the conversation up to each of them."""
    if example.messages[0]["role"] == "assistant":
        raise DataError(
            f"{example.where}: the assistant speaks first, and nothing shows where its words begin: put a "
            "message of the user or the system before, or use a template with {% generation %} blocks"
        )

    def text(messages: Sequence[Message], ask: bool) -> str:
        return _rendered(tokenizer, messages, example.where, add_generation_prompt=ask)

    def tokens(rendered: str) -> list[int]:
        return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])

    whole = text(example.messages, False)
    ids = tokens(whole)
    mask = [False] * len(ids)
    for index, message in enumerate(example.messages):
        if message["role"] != "assistant":
            continue
        before = text(example.messages[:index], True)
        after = text(example.messages[: index + 1], False)
        if not (whole.startswith(after) and after.startswith(before)):
            raise DataError(
                f"{example.where}: the model's chat template renders message {index + 1} in another way when "
                "more follows, so its tokens can't be found: use one answer in each example, or a template "
                "with {% generation %} blocks"
            )
        # A token may reach over the border of two texts: then it is another one in the whole.
        start, stop = _common(ids, tokens(before)), _common(ids, tokens(after))
        stop = _end_of_turn(ids, start, stop, tokenizer)
        mask[start:stop] = [True] * (stop - start)
    return ids, mask


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _end_of_turn(ids: Sequence[int], start: int, stop: int, tokenizer: Any) -> int:
    """Leaves out the white space that a template puts after the token that ends a turn: nobody says it."""
    control = tokenizer.added_tokens_decoder
    last = max((i for i in range(start, stop) if ids[i] in control), default=None)
    if last is None or tokenizer.decode(ids[last + 1 : stop]).strip():
        return stop
    return last + 1


def _template(tokenizer: Any, where: str) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        raise DataError(
            f"{where}: the model's tokenizer has several chat templates, and none is called default"
        ) from None


def _rendered(tokenizer: Any, messages: Sequence[Message], where: str, **options: Any) -> str:
    return str(_apply(tokenizer, messages, where, tokenize=False, **options))


def _apply(tokenizer: Any, messages: Sequence[Message], where: str, **options: Any) -> Any:
    template = _template(tokenizer, where)
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except Exception as error:  # a template is a program, and may fail in any way
        # Its message could quote the conversation, unless it stands in the template as it is.
        said = str(error) if isinstance(error, TemplateError) and str(error) in template else ""
        raise DataError(
            f"{where}: the model's chat template refuses this conversation: {said or type(error).__name__}"
        ) from None
