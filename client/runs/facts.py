"""What is known of a run before its model is loaded."""

from dataclasses import dataclass
from typing import Any

from blindtune.client.config.blind_config import BlindConfig
from blindtune.client.data.prepared import PreparedData
from blindtune.client.recipe import Recipe
from blindtune.client.training.folder import RunFolder
from blindtune.client.training.models import BaseModel

__all__ = ["Privacy", "RunFacts"]


@dataclass(frozen=True, repr=False)
class Privacy:
    """What a private run rests on.

    Attributes:
        config: how its operators are reached.
        fingerprint: of the base model's frozen layers.
    """

    config: BlindConfig
    fingerprint: str


@dataclass(frozen=True, repr=False)
class RunFacts:
    """What is known of a run before its model is loaded. It has no repr, since it holds the data.

    Attributes:
        recipe: what it does.
        folder: where it writes, held by this process.
        base: the model that it trains an adapter for.
        tokenizer: of the base model.
        data: what it learns from.
        privacy: None for a run with the whole model in this process.
    """

    recipe: Recipe
    folder: RunFolder
    base: BaseModel
    tokenizer: Any
    data: PreparedData
    privacy: Privacy | None
