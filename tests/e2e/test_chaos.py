"""Trainings through real daemons that crash, lie, are drained, and get new certificates: a short form of the
benchmark of the same name, with its code."""

from pathlib import Path

import pytest
from support.recipes import with_tokenizer

from benchmarks.resilience.chaos import chaos, rolling

pytestmark = [pytest.mark.hf, pytest.mark.slow]


@pytest.fixture
def model(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    return with_tokenizer(checkpoints["llama"], tmp_path)


def test_workers_that_crash_and_lie_change_no_bit_of_the_adapter(model: Path, tmp_path: Path) -> None:
    report = chaos(tmp_path, model, seconds=20.0, seed=0)
    assert report.identical
    assert report.lies
    assert sum(report.kills.values())
    # Whatever a kill cut off, or a liar answered, was asked again.
    assert report.repeated >= report.lies


def test_restarts_and_new_certificates_in_the_middle_of_a_run_cost_no_step(
    model: Path, tmp_path: Path
) -> None:
    report = rolling(tmp_path, model, together=True)
    assert report.identical
    assert report.lies == 0
    assert min(report.restarts.values()) >= 2
    assert len(set(report.exchanges)) == 12
