"""From conversations to token numbers, and which of them carry the loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from blindtune.client.data.formats import Completion, Conversation, Message
from blindtune.protocol.errors import DataError

__all__ = ["IGNORED", "Encoded", "encode", "prompt_text"]

IGNORED = -100
"""The label of a token that carries no loss, as PyTorch's cross entropy has it."""


@dataclass(frozen=True)
class Encoded:
    """An example as token numbers.

    Attributes:
        input_ids: of all tokens.
        labels: the same, with `IGNORED` where a token carries no loss.
    """

    input_ids: list[int]
    labels: list[int]

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
    return Encoded(ids[:max_length], labels[:max_length])


def prompt_text(messages: Sequence[Message], tokenizer: Any) -> str:
    """The text after which the model answers."""
    if tokenizer.chat_template is None:
        asked = Conversation([*messages, {"role": "assistant", "content": ""}], "the prompt")
        return _without_template(asked).prompt
    return str(_render(tokenizer, messages, "the prompt", tokenize=False, add_generation_prompt=True))


def _join(example: Completion, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Both texts in one, without a chat template."""
    prompt = tokenizer(example.prompt)["input_ids"] if example.prompt else []
    if prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]  # some tokenizers end every text, and this one goes on
    completion = tokenizer(example.completion, add_special_tokens=not prompt)["input_ids"]
    if tokenizer.eos_token_id is not None and completion[-1:] != [tokenizer.eos_token_id]:
        completion = [*completion, tokenizer.eos_token_id]
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
    if "generation %}" in tokenizer.chat_template or "generation -%}" in tokenizer.chat_template:
        rendered = _render(
            tokenizer, example.messages, example.where, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(rendered["input_ids"]), [bool(x) for x in rendered["assistant_masks"]]
    return _by_prefixes(example, tokenizer)


def _by_prefixes(example: Conversation, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Finds the assistant's turns by rendering the conversation up to each of them."""

    def ids(messages: Sequence[Message], ask: bool) -> list[int]:
        rendered = _render(tokenizer, messages, example.where, return_dict=True, add_generation_prompt=ask)
        return list(rendered["input_ids"])

    whole = ids(example.messages, False)
    mask = [False] * len(whole)
    for index, message in enumerate(example.messages):
        if message["role"] != "assistant":
            continue
        before = ids(example.messages[:index], True)
        after = ids(example.messages[: index + 1], False)
        if whole[: len(before)] != before or whole[: len(after)] != after:
            raise DataError(
                f"{example.where}: the model's chat template renders message {index + 1} in another way when "
                "more follows, so its tokens can't be found: use one answer in each example, or a template "
                "with {% generation %} blocks"
            )
        mask[len(before) : len(after)] = [True] * (len(after) - len(before))
    return whole, mask


def _render(tokenizer: Any, messages: Sequence[Message], where: str, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except TemplateError as error:  # what a template says itself, about roles and their order
        raise DataError(f"{where}: the model's chat template refuses this conversation: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        # The library's own words could quote the conversation.
        raise DataError(
            f"{where}: the model's chat template cannot render this conversation ({type(error).__name__})"
        ) from None
