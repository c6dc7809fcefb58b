"""Fixtures that more than one test file uses."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Before anything imports torch or the hub's client.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from support.operators import RunningOperators
    from transformers import PreTrainedModel


@pytest.fixture(scope="session", autouse=True)
def kit_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Kits and keys made at first use go here, and not where a user's are."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLINDTUNE_CACHE", str(folder))
        patch.setenv("BLINDTUNE_CONFIG", str(folder / "config"))
        yield folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random checkpoint of each family."""
    from support.checkpoints import FAMILIES, save_checkpoint

    # A trainer collects garbage whenever it starts, and all that was imported would be looked at.
    gc.freeze()
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: save_checkpoint(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="session")
def session_operators(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator["RunningOperators"]:
    from support.operators import running_operators

    with running_operators(tmp_path_factory.mktemp("operators"), checkpoints, (2, 2)) as operators:
        yield operators


@pytest.fixture
def operators(
    session_operators: "RunningOperators", checkpoints: dict[str, Path]
) -> Iterator["RunningOperators"]:
    """Two operators of two workers each, which serve every checkpoint and are honest to begin with."""
    yield session_operators
    for worker in session_operators.workers:
        for model in checkpoints:
            worker.lie(model, None)
        worker.record(None)


@pytest.fixture
def load(checkpoints: dict[str, Path]) -> Iterator[Callable[..., "PreTrainedModel"]]:
    """Loads a family's checkpoint with remote layers: ``load("llama", masking="reference")``.

    Other arguments are those of `BlindConfig`, but for ``dtype`` and ``folder`` (of another checkpoint).
    Connections are closed when the test ends.
    """
    import torch
    from support.checkpoints import CLASSES

    from blindtune.client import BlindConfig, multiplier_of

    loaded = []

    def load_model(
        family: str,
        *,
        dtype: torch.dtype = torch.float32,
        folder: Path | None = None,
        **options: Any,
    ) -> "PreTrainedModel":
        config = BlindConfig(**{"progress": False, "retry_seconds": 2.0, "allow_one_machine": True} | options)
        model = CLASSES[family].from_pretrained(
            folder or checkpoints[family], quantization_config=config, dtype=dtype
        )
        loaded.append(model)
        return model

    yield load_model
    for model in loaded:
        multiplier_of(model).close()
