"""The assets that all simulations share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from simulation.world import Assets, small_messages


@pytest.fixture(scope="session")
def assets(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Assets:
    return Assets(checkpoints["llama"], tmp_path_factory.mktemp("simulation") / "kit")


@pytest.fixture(autouse=True)
def _small_messages() -> Iterator[None]:
    with small_messages():
        yield
