"""A tiny model as the client knows it, and workers of it in this process."""

from pathlib import Path

import pytest
from support.transports import honest_multiplier

from blindtune.checkpoint import Checkpoint
from blindtune.client.kit.kit import Kit
from blindtune.client.kit.prepare import cached_kit
from blindtune.protocol.multiplication.multiplier import Multiplier


@pytest.fixture(scope="session")
def checkpoint(checkpoints: dict[str, Path]) -> Checkpoint:
    return Checkpoint.open(checkpoints["llama"])


@pytest.fixture(scope="session")
def kit(checkpoint: Checkpoint) -> Kit:
    return cached_kit(checkpoint)


@pytest.fixture(scope="session")
def honest(checkpoint: Checkpoint) -> Multiplier:
    return honest_multiplier(checkpoint)
