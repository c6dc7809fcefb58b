"""The demo's private training: a stock transformers and peft script, with one argument added."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from blindtune.client import BlindConfig
from blindtune.client.demo.clauses import Clause

__all__ = ["EPOCHS", "Trainer", "steps_in"]

EPOCHS = 3
BATCH = 16
LEARNING_RATE = 2e-3
MAX_TOKENS = 128


def steps_in(examples: int) -> int:
    """Optimizer steps that training on so many examples takes."""
    return EPOCHS * -(-examples // BATCH)


@dataclass(frozen=True)
class Step:
    """One optimizer step's figures: mean loss, and share of the batch that was right before it."""

    loss: float
    accuracy: float


class Trainer:
    """A sequence classifier with LoRA on remote layers and a trainable head.

    Args:
        model: checkpoint folder or name.
        labels: class names.
        config: who multiplies; None for the whole model in this process, unquantized.
        seed: of the adapter's initialization, dropout and the order of examples.
    """

    def __init__(self, model: str, labels: Sequence[str], config: BlindConfig | None, seed: int) -> None:
        torch.manual_seed(seed)
        self._shuffle = random.Random(seed)
        self._labels = {label: i for i, label in enumerate(labels)}
        self._tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        base = AutoModelForSequenceClassification.from_pretrained(
            model,
            num_labels=len(labels),
            quantization_config=config,
            dtype=torch.float32,
            trust_remote_code=False,
        )
        lora = LoraConfig(task_type=TaskType.SEQ_CLS, target_modules="all-linear", r=8)
        self.model = get_peft_model(base, lora)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)

    def train(
        self, examples: Sequence[Clause], on_step: Callable[[Step], None], epochs: int = EPOCHS
    ) -> None:
        """Trains; ``on_step`` is told of each step."""
        self.model.train()
        for _ in range(epochs):
            for batch in self._shuffled_batches(examples):
                inputs, labels = self._batch(batch)
                output = self.model(**inputs, labels=labels)
                output.loss.backward()
                self._optimizer.step()
                self._optimizer.zero_grad()
                right = output.logits.argmax(-1) == labels
                on_step(Step(output.loss.item(), right.float().mean().item()))

    @torch.no_grad()
    def accuracy(self, examples: Sequence[Clause]) -> float:
        """Share of examples whose class is found."""
        self.model.eval()
        right = 0
        for start in range(0, len(examples), BATCH):
            inputs, labels = self._batch(examples[start : start + BATCH])
            right += int((self.model(**inputs).logits.argmax(-1) == labels).sum())
        return right / len(examples)

    def _shuffled_batches(self, examples: Sequence[Clause]) -> list[list[Clause]]:
        """Batches of texts of similar length, in random order: padding would travel and be computed too."""
        shuffled = self._shuffle.sample(list(examples), len(examples))
        window = 4 * BATCH
        batches = []
        for start in range(0, len(shuffled), window):
            by_length = sorted(shuffled[start : start + window], key=lambda x: len(x.text))
            batches += [by_length[i : i + BATCH] for i in range(0, len(by_length), BATCH)]
        self._shuffle.shuffle(batches)
        return batches

    def _batch(self, examples: Sequence[Clause]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        texts = [x.text for x in examples]
        inputs = self._tokenizer(
            texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        return dict(inputs), torch.tensor([self._labels[x.label] for x in examples])
