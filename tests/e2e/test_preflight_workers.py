"""Preflight checks of real worker processes: all of them pass, and what is wrong with one is found."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from support.operators import RunningOperators, running_operators
from support.recording import read_recording

from blindtune.checkpoint import Checkpoint
from blindtune.client import BlindConfig
from blindtune.client.kit.kit import Kit
from blindtune.client.kit.prepare import cached_kit
from blindtune.client.preflight.bandwidth import measure
from blindtune.client.preflight.finding import Finding
from blindtune.client.preflight.operators import check_operators
from blindtune.client.rounds.connect import expectations
from blindtune.protocol.parameters import Q31

pytestmark = pytest.mark.hf

SIZE = 200_000


@pytest.fixture(scope="module")
def kit(checkpoints: dict[str, Path]) -> Kit:
    return cached_kit(Checkpoint.open(checkpoints["llama"]))


def config_of(operators: RunningOperators, model: str = "llama") -> BlindConfig:
    return BlindConfig(operators.operators(model), allow_one_machine=True, retry_seconds=0.0)


def problems(findings: Iterable[Finding]) -> list[Finding]:
    return [x for x in findings if x.status == "problem"]


def test_honest_workers_of_the_right_model_pass_with_all_their_replicas(
    operators: RunningOperators, kit: Kit
) -> None:
    config = config_of(operators)
    found = [*check_operators(config, expectations(kit, Q31)), *measure(config, kit, SIZE)]
    assert {x.status for x in found} == {"ok"}
    for operator in operators:
        for worker in operator.workers:
            mine = [x for x in found if x.check.startswith(f"{operator.name} {worker.addresses['llama']} ")]
            assert [x.check.split()[-1] for x in mine] == [
                *("address", "connection", "certificate", "TLS", "manifest", "model"),
                *("trip", "upload", "download"),
            ]


def test_every_worker_of_another_model_is_found(operators: RunningOperators, kit: Kit) -> None:
    found = problems(check_operators(config_of(operators, "qwen3"), expectations(kit, Q31)))
    assert len(found) == len(operators.workers)
    assert all("serves another model (qwen3" in x.detail for x in found)
    assert {x.fix for x in found} == {"start it with the same checkpoint and revision"}


@pytest.mark.parametrize("replica", [0, 1])
def test_a_liar_is_named_whichever_replica_it_is(operators: RunningOperators, kit: Kit, replica: int) -> None:
    liar = operators[1].workers[replica]
    liar.lie("llama", "one residue is off by one", at=4)
    found = list(measure(config_of(operators), kit, SIZE))
    (finding,) = problems(found)
    assert liar.lies_told("llama") == 1
    address = liar.addresses["llama"]
    assert finding.detail == f"worker {address} of operator beta gave a wrong answer"
    assert "do not train with it" in finding.fix
    assert sum(x.check.endswith("download") for x in found) == len(operators.workers) - 1


def test_a_worker_that_was_killed_is_found_and_the_others_are_still_checked(
    checkpoints: dict[str, Path], kit: Kit, tmp_path: Path
) -> None:
    with running_operators(tmp_path, {"llama": checkpoints["llama"]}, (1, 1)) as spare:
        config = config_of(spare)
        address = spare[0].workers[0].addresses["llama"]
        spare[0].workers[0].kill()
        (refused,) = problems(check_operators(config, expectations(kit, Q31)))
        assert refused.check == f"alpha {address} connection"
        found = list(measure(config, kit, SIZE))
    (silent,) = problems(found)
    assert address in silent.detail
    assert [x.status for x in found if x.check.startswith("beta")] == ["ok"] * 3


def test_workers_get_random_operands_that_are_never_used_again(
    operators: RunningOperators, kit: Kit, tmp_path: Path
) -> None:
    for number, worker in enumerate(operators.workers):
        worker.record(tmp_path / str(number))
    for _ in range(2):
        assert not problems(measure(config_of(operators), kit, SIZE))
    received = [x for number in range(4) for x in read_recording(tmp_path / str(number))]
    # Up and down, each tried with one row first, twice at four workers.
    assert len(received) == 2 * 2 * 2 * 4
    assert len({x.operand[:32] for x in received}) == len(received)
