"""The same examples give the same step, however they are cut into micro-batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.recipes import recipe_of, with_tokenizer, write_lines
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from blindtune.client.data.chat import IGNORED
from blindtune.client.data.prepared import prepare_data
from blindtune.client.recipe import Recipe
from blindtune.client.training.adapter import new_adapter
from blindtune.client.training.models import BaseModel, load_tokenizer, stored_keys
from blindtune.client.training.trainer import RecipeTrainer

pytestmark = pytest.mark.hf

ROWS = 8
# Micro-batch and how many make a step: all come to one step, the last of 3, 3 and 2 examples.
CUTS = [(8, 1), (4, 2), (2, 4), (1, 8), (3, 3)]
RECORDS = {
    "classification": [{"text": "ab" * (i + 1), "label": "xyz"[i % 3]} for i in range(ROWS)],
    "instructions": [{"prompt": "ab" * (ROWS - i), "completion": "c" * (1 + 5 * i)} for i in range(ROWS)],
}
MODELS = [
    ("classification", "bert", 0.1),
    ("classification", "llama", 0.0),
    ("instructions", "gpt2", 0.1),
    ("instructions", "llama", 0.0),
]


class _Gradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self, model: Any) -> None:
        self.found: dict[str, torch.Tensor] = {}
        self._model = model

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.found = _gradients(self._model)


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Path:
    """The models with tokenizers, and data."""
    folder = tmp_path_factory.mktemp("accumulation")
    for family in {family for _, family, _ in MODELS}:
        with_tokenizer(checkpoints[family], folder)
    for task, records in RECORDS.items():
        write_lines(folder / f"{task}.jsonl", records)
    return folder


class Steps:
    """Takes one step over all examples, cut as it is told."""

    def __init__(self, folder: Path, task: str, family: str, smoothing: float) -> None:
        self._folder = folder
        self._training = {
            "max_steps": 1,
            "label_smoothing_factor": smoothing,
            "learning_rate": 0.0,
            "max_grad_norm": 0.0,
        }
        self._sections = (folder / family, folder / f"{task}.jsonl", {"task": task})
        recipe = self._recipe(1, 1)
        self.smoothing = smoothing
        self._tokenizer = load_tokenizer(folder / family)
        data = prepare_data(recipe.data, self._tokenizer, 0)
        self.rows = data.train
        base = BaseModel(recipe, folder / family).load(data.labels, self._tokenizer, None)
        for module in base.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # which numbers are dropped does depend on the cut
        self._model = new_adapter(base, recipe, stored_keys(folder / family))

    def _recipe(self, size: int, accumulated: int) -> Recipe:
        model, train, data = self._sections
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        return recipe_of(self._folder / "run", model, train, data=data, training={**self._training, **cut})

    def take(self, size: int, accumulated: int, in_flight: int) -> tuple[float, dict[str, torch.Tensor]]:
        """The loss that the trainer logs, and the gradients that the optimizer gets."""
        recipe = self._recipe(size, accumulated)
        trainer = RecipeTrainer(
            recipe, self._folder / "run", self._model, self._tokenizer, self.rows, None, in_flight=in_flight
        )
        gradients = _Gradients(self._model)
        trainer.add_callback(gradients)
        trainer.train()
        return trainer.state.log_history[0]["loss"], gradients.found

    def expected(self) -> tuple[float, dict[str, torch.Tensor]]:
        """The mean over all tokens or texts of all examples, each computed by itself and without padding."""
        self._model.zero_grad()
        total, count = torch.zeros(()), 0
        for row in self.rows:
            ids = torch.tensor([row["input_ids"]])
            logits = self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            labels = torch.tensor([row["labels"]])
            if labels.dim() == 2:
                logits, labels = logits[0, :-1], labels[0, 1:]
            options: dict[str, Any] = {"ignore_index": IGNORED, "label_smoothing": self.smoothing}
            total = total + cross_entropy(logits, labels, reduction="sum", **options)
            count += int((labels != IGNORED).sum())
        (total / count).backward()
        return (total / count).item(), _gradients(self._model)


@pytest.mark.parametrize(("task", "family", "smoothing"), MODELS)
def test_loss_and_gradients_do_not_depend_on_how_a_step_is_cut(
    folder: Path, task: str, family: str, smoothing: float
) -> None:
    steps = Steps(folder, task, family, smoothing)
    expected, right = steps.expected()
    assert any(x.abs().max() > 1e-3 for x in right.values())
    for number, (size, accumulated) in enumerate(CUTS):
        loss, found = steps.take(size, accumulated, in_flight=1 + number % 2)
        assert loss == pytest.approx(expected, rel=1e-4), (size, accumulated)
        assert found.keys() == right.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, right[name], rtol=1e-4, atol=1e-6)
