"""The best checkpoint is one of the run's own folder, whatever path trainer_state.json names."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from blindtune.client.training.trainer import _AfterStep
from blindtune.errors import CheckpointError

pytestmark = pytest.mark.hf


def _begun(folder: Path, best: str | None, step: int | None, wanted: bool) -> str | None:
    state = TrainerState(best_model_checkpoint=best, best_global_step=step)
    arguments: Any = SimpleNamespace(output_dir=str(folder), load_best_model_at_end=wanted)
    trainer: Any = None  # is told of steps alone
    _AfterStep(trainer).on_train_begin(arguments, state, TrainerControl())
    return state.best_model_checkpoint


@pytest.mark.parametrize("wanted", [True, False])
def test_a_path_that_leads_elsewhere_is_not_followed(tmp_path: Path, wanted: bool) -> None:
    elsewhere = tmp_path / "elsewhere" / "checkpoint-2"
    elsewhere.mkdir(parents=True)
    assert _begun(tmp_path, None, None, wanted) is None
    if wanted:
        for step in (2, None):
            with pytest.raises(CheckpointError, match="lacks the best checkpoint"):
                _begun(tmp_path, str(elsewhere), step, wanted)
    else:
        assert _begun(tmp_path, str(elsewhere), 2, wanted) is None
    own = tmp_path / "checkpoint-2"
    own.mkdir()
    assert _begun(tmp_path, str(elsewhere), 2, wanted) == str(own)
