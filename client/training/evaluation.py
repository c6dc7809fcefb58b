"""Measuring a run's adapter on other data, and asking it for answers: privately, with the same workers."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from blindtune.client.data.chat import prompt_text
from blindtune.client.data.formats import ANSWER_MARK, Completion, Conversation, Message
from blindtune.client.data.prepared import read_questions, read_split
from blindtune.client.quantizer import multiplier_of
from blindtune.client.recipe import Recipe, load_recipe
from blindtune.client.training.checkpoints import read_json
from blindtune.client.training.environment import without_accelerate_variables
from blindtune.client.training.fit import require_positions, require_rows
from blindtune.client.training.folder import RECIPE, STATE, SUMMARY
from blindtune.client.training.models import (
    base_folder,
    blind_config,
    load_base,
    load_tokenizer,
    trained_adapter,
)
from blindtune.client.training.trainer import RecipeTrainer
from blindtune.protocol.errors import ConfigurationError

__all__ = ["Tuned", "exact_match", "same_answer", "tuned_model"]


class Tuned:
    """A run's result, ready to be used.

    Attributes:
        recipe: of the run.
        labels: class names.
        tokenizer: that the run wrote.
        model: the base with remote layers, and the adapter unless the base alone was asked for.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, labels: Sequence[str], tokenizer: Any, model: Any
    ) -> None:
        self._folder = folder
        self.recipe = recipe
        self.labels = labels
        self.tokenizer = tokenizer
        self.model = model.eval()

    def measure(self, path: Path, limit: int | None) -> dict[str, float]:
        """The task's figures on a data file; see `blindtune.client.training.metrics`."""
        data, seed = self.recipe.data, self.recipe.training.seed
        split = read_split(data, path, self.tokenizer, self.labels or None, limit, seed)
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
        """What the model says instead of an example's last turn; see `answer`."""
        asked = example.messages[:-1] if isinstance(example, Conversation) else example.prompt
        return self.answer(asked, max_new_tokens, temperature)

    @torch.no_grad()
    def answer(
        self,
        prompt: str | Sequence[Message],
        max_new_tokens: int,
        temperature: float = 0.0,
        streamer: Any = None,
    ) -> str:
        """What the model says after a prompt.

        Args:
            prompt: a text as it is, or messages for the chat template.
            max_new_tokens: at most so many.
            temperature: of sampling; 0 takes the most likely token each time.
            streamer: is given tokens as they come.
        """
        text = prompt if isinstance(prompt, str) else prompt_text(prompt, self.tokenizer)
        # A chat template writes the special tokens itself.
        special = isinstance(prompt, str) or self.tokenizer.chat_template is None
        inputs = self.tokenizer(text, return_tensors="pt", add_special_tokens=special)
        sampling = (
            {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        )
        output = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            streamer=streamer,
            **sampling,
        )
        new = output[0][inputs["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(new, skip_special_tokens=True))


@contextmanager
def tuned_model(folder: Path, settings: Sequence[str] = (), adapter: bool = True) -> Iterator[Tuned]:
    """Opens a run's result.

    Args:
        folder: output folder of a run.
        settings: changes to its recipe, ``section.key=value``; other operators, for example.
        adapter: False for the base model alone.

    Raises:
        ConfigurationError: the folder is no output folder, or has no adapter yet.
        ProtocolError: the workers can't be reached, or hold something else.
    """
    if not (folder / RECIPE).is_file():
        raise ConfigurationError(
            f"{folder} is not the output folder of a run: name output.dir of one that blindtune train "
            "finished"
        )
    if not (folder / SUMMARY).is_file():
        raise ConfigurationError(
            f"{folder} holds a run that is not finished: go on with blindtune train {folder / RECIPE} "
            "--resume"
        )
    recipe = load_recipe(folder / RECIPE, settings)
    labels = read_json(folder / STATE).get("labels", [])
    tokenizer = load_tokenizer(folder)
    with without_accelerate_variables():
        base = load_base(recipe, base_folder(recipe), labels, tokenizer, blind_config(recipe))
        multiplier = multiplier_of(base)
        try:
            model = trained_adapter(base, folder)
            if not adapter:
                model.base_model.disable_adapter_layers()
            yield Tuned(folder, recipe, labels, tokenizer, model)
        finally:
            multiplier.close()


def exact_match(
    tuned: Tuned,
    examples: Iterable[Conversation | Completion],
    max_new_tokens: int,
    on_answer: Callable[[bool], None],
) -> float:
    """Share of examples whose generated answer is the right one.

    Args:
        examples: from `Tuned.questions`.
        max_new_tokens: at most so many for each answer.
        on_answer: is told of each, whether it was right.
    """
    right = []
    for example in examples:
        said = tuned.answer_to(example, max_new_tokens)
        if isinstance(example, Completion):
            expected = example.completion
        else:
            expected = example.answer or example.messages[-1]["content"]
        right.append(same_answer(said, expected))
        on_answer(right[-1])
    return sum(right) / len(right) if right else 0.0


def same_answer(said: str, expected: str) -> bool:
    """Whether two answers agree, but for case, spaces, commas in numbers and what precedes ``####``."""
    return _normal(said) == _normal(expected)


def _normal(answer: str) -> str:
    last = answer.rsplit(ANSWER_MARK, 1)[-1].strip().casefold()
    return " ".join(re.sub(r"(?<=\d),(?=\d{3})", "", last).rstrip(".").split())
