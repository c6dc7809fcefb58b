"""Which examples make up each batch: those of similar length, in an order that only the epoch decides.

Padding is computed by everyone and travels like any other row, so texts of one batch should be equally
long. The order follows from the seed and the epoch's number alone, not from the state of a generator, so
a resumed run sees what an uninterrupted one would have seen.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import Sampler
from transformers import DataCollatorWithPadding

__all__ = ["EpochSampler", "batches", "labelled_collator", "padded_rows"]

_WINDOW = 50
"""Batches whose examples are sorted by length together: enough for little padding, few enough for chance."""


class EpochSampler(Sampler[int]):
    """Examples in the order in which an epoch takes them.

    Args:
        lengths: tokens of each example.
        batch: examples of one batch.
        seed: of the order.
        group: whether batches have similar lengths.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, group: bool) -> None:
        self._lengths = lengths
        self._batch = batch
        self._seed = seed
        self._group = group
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch, counted from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        chance = random.Random(f"{self._seed} {self._epoch}")  # noqa: S311 - it protects nothing
        order = list(range(len(self._lengths)))
        chance.shuffle(order)
        if self._group:
            order = self._grouped(order, chance)
        return iter(order)

    def _grouped(self, order: list[int], chance: random.Random) -> list[int]:
        whole: list[list[int]] = []
        # A batch that is not full gets whatever comes last, so that leaving it out hits no length more often.
        full = len(order) - len(order) % self._batch
        order, rest = order[:full], order[full:]
        for start in range(0, full, _WINDOW * self._batch):
            window = sorted(order[start : start + _WINDOW * self._batch], key=lambda i: self._lengths[i])
            whole += [window[i : i + self._batch] for i in range(0, len(window), self._batch)]
        chance.shuffle(whole)
        # It must be the last one, or it would shift all that follow.
        return [i for batch in [*whole, rest] for i in batch]


def batches(
    sampler: EpochSampler, lengths: Sequence[int], batch: int, drop_last: bool = False
) -> list[list[int]]:
    """Lengths of the examples of each batch of the sampler's epoch."""
    ordered = [lengths[i] for i in sampler]
    cut = [ordered[i : i + batch] for i in range(0, len(ordered), batch)]
    return cut[:-1] if drop_last and cut and len(cut[-1]) < batch else cut


def padded_rows(lengths: Sequence[int]) -> int:
    """Rows that a batch of these lengths is computed and sent with."""
    return len(lengths) * max(lengths)


def labelled_collator(tokenizer: Any, config: Any) -> Callable[[Sequence[Mapping[str, Any]]], Any]:
    """What makes a batch of labelled texts for a model of this configuration.

    Which text of a pair a token is of is told to models that were trained with that; others would take the
    numbers for something else, or not at all.
    """
    typed = (getattr(config, "type_vocab_size", None) or 0) > 1 or config.model_type in ("funnel", "xlnet")
    pad = DataCollatorWithPadding(tokenizer)
    if typed:
        return pad
    return lambda rows: pad([{k: v for k, v in row.items() if k != "token_type_ids"} for row in rows])
