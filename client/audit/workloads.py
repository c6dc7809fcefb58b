"""Two small private trainings for the lab: a language model with a remote head, and a classifier.

Both learn from contract clauses, as word tokens. Their base models are random, which the attacks on the
first and last layers don't notice: these layers' operands follow from the embedding and the loss.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from blindtune.client.config.blind_config import BlindConfig
from blindtune.client.demo.clauses import write_clauses
from blindtune.client.kit.head import Head

__all__ = ["Batch", "Sizes", "Workload", "classifier", "language_model"]

Tensors = dict[str, torch.Tensor]
PADDING = 0
_SEED = 1


@dataclass(frozen=True)
class Sizes:
    """How much is trained.

    Attributes:
        steps: batches; each is one training step.
        texts, length: of a batch.
        hidden, intermediate: features of the base model.
        layers: of the base model.
    """

    steps: int = 30
    texts: int = 8
    length: int = 32
    hidden: int = 64
    intermediate: int = 96
    layers: int = 2


@dataclass(frozen=True)
class Batch:
    """One training step's data.

    Attributes:
        tokens: int64 [texts, length]; 0 is padding.
        labels: int64 [texts, length] (-100 for none) or [texts].
    """

    tokens: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Workload:
    """A private training.

    Attributes:
        name: what the report calls it.
        checkpoint: folder of the public base model.
        model_class: with which it is trained.
        task: of the adapter.
        head: where a language model's head is computed.
        classes: of a classifier; 0 for a language model.
        batches: the private data.
    """

    name: str
    checkpoint: Path
    model_class: type[PreTrainedModel]
    task: TaskType
    head: Head
    classes: int
    batches: list[Batch]

    def load(self, config: BlindConfig) -> nn.Module:
        """The model with remote layers and an adapter."""
        torch.manual_seed(_SEED)
        options = {"num_labels": self.classes} if self.classes else {}
        model = self.model_class.from_pretrained(
            self.checkpoint, quantization_config=config, dtype=torch.float32, **options
        )
        lora = LoraConfig(task_type=self.task, target_modules="all-linear", r=4)
        return get_peft_model(model, lora)

    def train(self, model: nn.Module) -> None:
        """One step on each batch."""
        torch.manual_seed(_SEED)
        optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=1e-3)
        model.train()
        for batch in self.batches:
            mask = (batch.tokens != PADDING).long()
            model(input_ids=batch.tokens, attention_mask=mask, labels=batch.labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def tokens(self) -> list[np.ndarray]:
        """The token of each row of the first layers' operands, -1 for padding."""
        return [np.where(x.tokens == PADDING, -1, x.tokens).ravel() for x in self.batches]

    def labels(self) -> list[np.ndarray]:
        """The label of each row of the last layers' gradients, -1 where there is none."""
        if self.classes:
            return [x.labels.numpy() for x in self.batches]
        # A row's label is the next token; the last row of a text has none.
        labels = [torch.nn.functional.pad(x.labels[:, 1:], (0, 1), value=-100) for x in self.batches]
        return [np.where(x < 0, -1, x).ravel() for x in labels]


def language_model(folder: Path, sizes: Sizes) -> Workload:
    """A Llama whose output head is remote, so that the workers get the gradients of its outputs."""
    texts, vocabulary, _ = _texts(sizes)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=PADDING,
    )
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        LlamaForCausalLM(config).save_pretrained(folder)
    batches = [Batch(x, torch.where(x == PADDING, -100, x)) for x in texts]
    return Workload("language model", folder, LlamaForCausalLM, TaskType.CAUSAL_LM, "remote", 0, batches)


def classifier(folder: Path, sizes: Sizes) -> Workload:
    """A BERT with a classification head that stays on the client."""
    texts, vocabulary, labels = _texts(sizes)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        max_position_embeddings=sizes.length,
        initializer_range=0.15,
        pad_token_id=PADDING,
    )
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        BertModel(config).save_pretrained(folder)
    batches = [Batch(x, y) for x, y in zip(texts, labels, strict=True)]
    classes = int(max(x.max() for x in labels)) + 1
    return Workload(
        "classifier", folder, BertForSequenceClassification, TaskType.SEQ_CLS, "auto", classes, batches
    )


def _texts(sizes: Sizes) -> tuple[list[torch.Tensor], int, list[torch.Tensor]]:
    """Tokens of each batch, the size of the vocabulary, and the class of each text."""
    clauses = write_clauses()
    words = [re.findall(r"\w+|[^\w\s]", x.text.lower()) for x in clauses]
    counts = Counter(word for text in words for word in text)
    # 0, 1 and 2 are padding and the ends of a text.
    numbers = {word: i for i, word in enumerate(sorted(counts), 3)}
    names = sorted({x.label for x in clauses})
    wanted = sizes.steps * sizes.texts
    tokens = np.full((wanted, sizes.length), PADDING)
    for row in range(wanted):
        known = [numbers[word] for word in words[row % len(words)]][: sizes.length]
        tokens[row, : len(known)] = known
    labels = [names.index(clauses[row % len(clauses)].label) for row in range(wanted)]
    batches = torch.from_numpy(tokens).reshape(sizes.steps, sizes.texts, sizes.length)
    return list(batches), len(numbers) + 3, list(torch.tensor(labels).reshape(sizes.steps, sizes.texts))
