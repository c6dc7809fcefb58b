"""Conversations, tokenizers for them, and what is learned of them."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from blindtune.client.data.chat import IGNORED, Encoded
from blindtune.client.data.reading.formats import Conversation
from support.recipes import CHAT, GENERATION

__all__ = ["LONG", "MARKED", "WHERE", "conversation", "ids_of", "learned", "merging_tokenizer"]

WHERE = "train.jsonl, line 317"
LONG = 10_000
MARKED = (GENERATION, CHAT)
"""The two ways to find answers: by marks, and by prefixes."""


def conversation(*texts: str, system: str | None = None) -> Conversation:
    """User and assistant in turns."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for index, text in enumerate(texts):
        messages.append({"role": "assistant" if index % 2 else "user", "content": text})
    return Conversation(messages, WHERE)


def learned(encoded: Encoded, tokenizer: Any) -> list[str]:
    """The stretches of text that carry loss."""
    runs: list[list[int]] = []
    before = IGNORED
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            if before == IGNORED:
                runs.append([])
            runs[-1].append(token)
        before = label
    return [tokenizer.decode(run) for run in runs]


def merging_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with merges, so that tokens can reach over the border of two texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["user: hello\n\nassistant: hello there\n\n\n", "|user: |assistant: a b"] * 20, trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=template,
    )


def ids_of(text: str, tokenizer: Any) -> Sequence[int]:
    """Tokens of a text, and none besides."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
