"""Measuring a run's adapter on other data, and asking it for answers: privately, with the same workers."""

import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from blindtune.client.data.chat import answer_text, prompt_text
from blindtune.client.data.prepared import read_questions, read_split
from blindtune.client.data.reading.formats import ANSWER_MARK, Completion, Conversation
from blindtune.client.data.reading.messages import Message, texts_of
from blindtune.client.data.templates.template import ChatTemplate
from blindtune.client.model.quantizer import multiplier_of
from blindtune.client.recipe import Recipe
from blindtune.client.training.environment import without_accelerate_variables
from blindtune.client.training.fit import require_positions, require_rows
from blindtune.client.training.folder import RECIPE, SUMMARY, RunFolder
from blindtune.client.training.models import BaseModel, blind_config, load_tokenizer, trained_adapter
from blindtune.client.training.stops import stop_tokens, taught_stops
from blindtune.client.training.trainer import RecipeTrainer
from blindtune.client.trust.adapter_config import require_plain_lora
from blindtune.client.trust.choice import is_output_folder, recipe_of_run
from blindtune.client.trust.links import require_own_files
from blindtune.errors import ConfigurationError, DataError

__all__ = ["Tuned", "exact_match", "same_answer", "tuned_model"]

_logger = logging.getLogger(__name__)


class Tuned:
    """A run's result, ready to be used.

    Attributes:
        recipe: of the run.
        labels: class names.
        tokenizer: that the run wrote.
        model: the base with remote layers, and the adapter unless the base alone was asked for.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        labels: Sequence[str],
        tokenizer: Any,
        model: Any,
        began: datetime | None,
    ) -> None:
        self._folder = folder
        self._began = began
        self._template = ChatTemplate(tokenizer, began)
        self.recipe = recipe
        self.labels = labels
        self.tokenizer = tokenizer
        self.model = model.eval()

    def measure(self, path: Path, limit: int | None) -> dict[str, float]:
        """The task's figures on a data file; see `blindtune.client.training.task_metrics`."""
        data, seed = self.recipe.data, self.recipe.training.seed
        split = read_split(data, path, self.tokenizer, self.labels or None, limit, seed, self._began)
        for warning in split.warnings:
            _logger.warning("%s", warning)
        trainer = RecipeTrainer(self.recipe, self._folder, self.model, self.tokenizer, None)
        require_positions(self.model.config, [split])
        require_rows(self.model, self.tokenizer.pad_token_id, [split])
        return {"examples": len(split.rows), **trainer.measure(split)}

    def questions(self, path: Path, limit: int | None) -> Sequence[Conversation | Completion]:
        """The examples of a data file, for `answer_to` and `exact_match`."""
        return read_questions(self.recipe.data, path, limit, self.recipe.training.seed)

    def answer_to(
        self, example: Conversation | Completion, max_new_tokens: int, temperature: float = 0.0
    ) -> str:
        """What the model says instead of an example's last answer, or after a last question; see `answer`."""
        if isinstance(example, Completion):
            return self.answer(example.prompt, max_new_tokens, temperature, where=example.where)
        answered = example.messages[-1]["role"] == "assistant"
        asked = example.messages[:-1] if answered else example.messages
        return self.answer(asked, max_new_tokens, temperature, tools=example.tools, where=example.where)

    def right_answers(self, example: Conversation | Completion) -> set[str]:
        """What counts as an example's answer: the words alone, or with what the chat template adds.

        Raises:
            DataError: the example does not end with an answer.
        """
        if isinstance(example, Completion):
            return {example.completion}
        if example.messages[-1]["role"] != "assistant":
            raise DataError(f"{example.where}: the conversation does not end with an answer to compare with")
        words = example.answer or "\n".join(texts_of(example.messages[-1]))
        whole = answer_text(example, self.tokenizer, self._template)
        return {x for x in (words, whole) if x.strip()}

    @torch.no_grad()
    def answer(
        self,
        prompt: str | Sequence[Message],
        max_new_tokens: int,
        temperature: float = 0.0,
        streamer: Any = None,
        tools: Sequence[Mapping[str, Any]] = (),
        where: str = "the prompt",
    ) -> str:
        """What the model says after a prompt, until it ends its turn or the model takes no more tokens.

        Args:
            prompt: a text as it is, or messages for the chat template.
            max_new_tokens: at most so many.
            temperature: of sampling; 0 takes the most likely token each time.
            streamer: is given tokens as they come, but for the one that ends the answer.
            tools: for the chat template.
            where: the prompt is from, for messages.

        Raises:
            DataError: the chat template refuses the prompt, or the prompt fills all that the model takes.
        """
        if isinstance(prompt, str):
            text = prompt
        else:
            text = prompt_text(prompt, self.tokenizer, self._template, tools, where)
        # A chat template writes the special tokens itself.
        special = isinstance(prompt, str) or self.tokenizer.chat_template is None
        inputs = self.tokenizer(text, return_tensors="pt", add_special_tokens=special)
        length = inputs["input_ids"].shape[1]
        sampling = (
            {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        )
        stops = stop_tokens(self.model, self.tokenizer, self._taught)
        output = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=min(max_new_tokens, self._room(length, where)),
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=stops or None,
            streamer=None if streamer is None else _UntilEnd(streamer, stops),
            **sampling,
        )
        said = output[0][length:].tolist()
        end = next((index for index, token in enumerate(said) if token in stops), len(said))
        return str(self.tokenizer.decode(said[:end], skip_special_tokens=True))

    @cached_property
    def _taught(self) -> list[int]:
        return taught_stops(self._folder, self.tokenizer)

    def _room(self, length: int, where: str) -> int:
        """How many tokens the model takes after a prompt."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(positions, int) or positions <= 0:
            return sys.maxsize
        if length >= positions:
            raise DataError(
                f"{where}: the question has {length:,} tokens, and the model takes {positions:,} with the "
                "answer: shorten it"
            )
        return positions - length


class _UntilEnd(BaseStreamer):
    """Passes tokens on, but for those that end an answer: not all of them are special to the tokenizer."""

    def __init__(self, streamer: Any, stops: Sequence[int]) -> None:
        self._streamer = streamer
        self._stops = stops
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt or int(value) not in self._stops:
            self._streamer.put(value)
        self._prompt = False

    def end(self) -> None:
        self._streamer.end()


@contextmanager
def tuned_model(
    folder: Path,
    settings: Sequence[str] = (),
    adapter: bool = True,
    operators: Path | None = None,
    say: Callable[[str], None] = _logger.info,
) -> Iterator[Tuned]:
    """Opens a run's result. Who gets requests is the user's word: see `blindtune.client.trust.choice`.

    Args:
        folder: output folder of a run.
        settings: changes to its recipe, ``section.key=value``.
        adapter: False for the base model alone.
        operators: a file with operators to use, instead of the trusted ones that the folder names.
        say: is told who gets requests, before the first one.

    Raises:
        ConfigurationError: the folder is no output folder, has no adapter yet, or names operators that the
            user does not trust.
        UnsupportedError: its adapter is more than plain LoRA.
        ProtocolError: the workers can't be reached, or hold something else.
    """
    # A recipe alone is none: to name it to train would make operators that a stranger chose the user's word.
    if not (folder / RECIPE).is_file() or not is_output_folder(folder):
        raise ConfigurationError(
            f"{folder} is not the output folder of a run: name output.dir of one that blindtune train "
            "finished"
        )
    if not (folder / SUMMARY).is_file():
        raise ConfigurationError(
            f"{folder} holds a run that is not finished: go on with blindtune train {folder / RECIPE} "
            "--resume"
        )
    recipe = recipe_of_run(folder, settings, operators)
    config = blind_config(recipe)
    require_own_files(folder)
    require_plain_lora(folder)  # the base alone is the model with this adapter, switched off
    say(config.described)
    labels, began = RunFolder(folder).labels, RunFolder(folder).began
    tokenizer = load_tokenizer(folder)
    with without_accelerate_variables():
        base = BaseModel.found(recipe).load(labels, tokenizer, config)
        multiplier = multiplier_of(base)
        try:
            model = trained_adapter(base, folder)
            if not adapter:
                model.base_model.disable_adapter_layers()
            yield Tuned(folder, recipe, labels, tokenizer, model, began)
        finally:
            multiplier.close()


def exact_match(
    tuned: Tuned,
    examples: Sequence[Conversation | Completion],
    max_new_tokens: int,
    on_answer: Callable[[bool], None],
) -> float:
    """Share of examples whose generated answer is the right one.

    Args:
        examples: from `Tuned.questions`.
        max_new_tokens: at most so many for each answer.
        on_answer: is told of each, whether it was right.

    Raises:
        DataError: an example does not end with an answer, or is too long for the model.
    """
    expected = [tuned.right_answers(x) for x in examples]
    right = []
    for example, answers in zip(examples, expected, strict=True):
        said = tuned.answer_to(example, max_new_tokens)
        right.append(any(same_answer(said, x) for x in answers))
        on_answer(right[-1])
    return sum(right) / len(right) if right else 0.0


def same_answer(said: str, expected: str) -> bool:
    """Whether two answers agree, but for case, spaces, commas in numbers and what precedes ``####``."""
    return _normal(said) == _normal(expected)


def _normal(answer: str) -> str:
    last = answer.rsplit(ANSWER_MARK, 1)[-1].strip().casefold()
    return " ".join(re.sub(r"(?<=\d),(?=\d{3})", "", last).rstrip(".").split())
