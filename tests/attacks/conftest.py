"""One small run of the attack lab, with real workers, that all tests of attacks look at."""

from pathlib import Path

import pytest
from support.recorded import forked_workers

from blindtune.client.audit.lab import LabResult, run_lab
from blindtune.client.audit.workloads import Sizes

SMALL = Sizes(steps=12, texts=8, length=24, hidden=32, intermediate=40)


@pytest.fixture(scope="session")
def lab_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the lab leaves models and transcripts."""
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="session")
def small_lab(lab_folder: Path, kit_cache: Path) -> LabResult:
    return run_lab(lab_folder, SMALL, rounds=75, workers=forked_workers)
