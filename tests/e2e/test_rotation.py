"""Certificates and authorities that are exchanged in the middle of a step: nothing of it is lost."""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from support.operators import PATIENCE, RunningOperators, RunningWorker, running_operators
from support.training import training_step, with_adapter
from transformers import PreTrainedModel

from blindtune.client import multiplier_of
from blindtune.client.tls.certs import issue_operator_certificates

pytestmark = pytest.mark.hf

Load = Callable[..., PreTrainedModel]


@pytest.fixture
def spare(checkpoints: dict[str, Path], tmp_path: Path) -> Iterator[RunningOperators]:
    """Operators of one worker each that a test may kill."""
    with running_operators(tmp_path, {"llama": checkpoints["llama"]}, (1, 1)) as operators:
        yield operators


def exchange(live: Path, folder: Path, host: str) -> None:
    """Puts the files of a new authority, worker and client in the place of an operator's."""
    issued = issue_operator_certificates(folder, live.name, [host]).ca.parent
    for path in issued.iterdir():
        fresh = live / f"{path.name}.new"
        shutil.copyfile(path, fresh)
        fresh.replace(live / path.name)


def test_a_worker_that_dies_and_comes_back_with_another_authority_costs_no_step(
    spare: RunningOperators, load: Load, tmp_path: Path
) -> None:
    expected = training_step(with_adapter(load("llama", masking="reference"), "llama"), "llama")
    model = with_adapter(load("llama", operators=spare.operators("llama"), retry_seconds=PATIENCE), "llama")
    assert training_step(model, "llama") == expected
    alpha = spare[0]
    worker = alpha.workers[0]
    port = int(worker.addresses["llama"].rpartition(":")[2])
    worker.lie("llama", "dies", at=7)
    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(training_step, model, "llama")
        worker.process.join(PATIENCE)
        exchange(alpha.certificates, tmp_path / "next", worker.spec.host)
        back = RunningWorker(replace(worker.spec, port=port))
        try:
            assert step.result(2 * PATIENCE) == expected
            assert training_step(model, "llama") == expected
        finally:
            back.stop()
    assert all(not figures.lies for figures in multiplier_of(model).statistics().values())


def test_workers_that_go_on_with_another_authority_cost_no_step(
    spare: RunningOperators, load: Load, tmp_path: Path
) -> None:
    expected = training_step(with_adapter(load("llama", masking="reference"), "llama"), "llama")
    chosen = spare.operators("llama")
    model = with_adapter(load("llama", operators=chosen, retry_seconds=PATIENCE), "llama")
    assert training_step(model, "llama") == expected
    for index, operator in enumerate(spare):
        exchange(operator.certificates, tmp_path / f"next-{index}", operator.workers[0].spec.host)
    # Connections that stand go on, and new ones are made with the new files by workers and client alike.
    assert training_step(model, "llama") == expected
    again = with_adapter(load("llama", operators=chosen, retry_seconds=PATIENCE), "llama")
    assert training_step(again, "llama") == expected
