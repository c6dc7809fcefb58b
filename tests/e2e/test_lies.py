"""Workers that lie are caught, named and survived, over real connections."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.lies import LIES
from support.operators import RunningOperators
from support.training import training_step, with_adapter
from transformers import PreTrainedModel

from blindtune.client import multiplier_of
from blindtune.errors import OperatorUnavailableError

pytestmark = pytest.mark.hf

Load = Callable[..., PreTrainedModel]
# A training step of the tiny Llama asks for 8 groups forward and for as many backward.
FORWARD, BACKWARD = 4, 13
EACH_OPERATOR = pytest.mark.parametrize("liar", [0, 1], ids=["who gets seeds", "who gets residues"])


@pytest.fixture(scope="module")
def honest_step(checkpoints: dict[str, Path]) -> dict[str, bytes]:
    """Loss and gradients without workers."""
    from support.checkpoints import CLASSES

    from blindtune.client import BlindConfig

    config = BlindConfig(masking="reference", progress=False)
    model = CLASSES["llama"].from_pretrained(checkpoints["llama"], quantization_config=config)
    return training_step(with_adapter(model, "llama"), "llama")


def _model(load: Load, operators: RunningOperators, workers: Sequence[int] | None = None) -> PeftModel:
    """The tiny Llama with an adapter, at all workers of each operator or at some."""
    return with_adapter(load("llama", operators=operators.operators("llama", workers)), "llama")


def _errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


@EACH_OPERATOR
@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_caught_named_and_survived_when_a_replica_is_there(
    operators: RunningOperators,
    load: Load,
    honest_step: dict[str, bytes],
    caplog: pytest.LogCaptureFixture,
    lie: str,
    liar: int,
) -> None:
    model = _model(load, operators)
    worker, name = operators[liar].workers[0], operators[liar].name
    address = worker.addresses["llama"]
    assert training_step(model, "llama") == honest_step
    worker.lie("llama", lie, at=FORWARD, times=100)
    assert training_step(model, "llama") == honest_step
    assert worker.lies_told("llama") == 1, "a liar must not be asked again"
    statistics = multiplier_of(model).statistics()
    assert {operator: x.lies for operator, x in statistics.items()} == {
        operator.name: (address,) if operator.name == name else () for operator in operators
    }
    (message,) = _errors(caplog)
    assert f"worker {address} of operator {name} gave a wrong answer" in message


@EACH_OPERATOR
@pytest.mark.parametrize("at", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_a_lie_without_a_replica_is_one_clear_error(
    operators: RunningOperators, load: Load, caplog: pytest.LogCaptureFixture, at: int, liar: int
) -> None:
    model = _model(load, operators, [0])
    worker, name = operators[liar].workers[0], operators[liar].name
    worker.lie("llama", "one residue is off by one", at=at)
    with pytest.raises(OperatorUnavailableError) as caught:
        training_step(model, "llama")
    message = str(caught.value)
    for part in (
        f"operator {name}: no worker is left",
        f"{worker.addresses['llama']}: gave a wrong answer",
        "resume from the last checkpoint",
    ):
        assert part in message
    assert "\n" not in message
    assert len(_errors(caplog)) == 1
    assert multiplier_of(model).statistics()[name].lies == (worker.addresses["llama"],)


def test_a_liar_stays_out_for_the_rest_of_the_run(operators: RunningOperators, load: Load) -> None:
    model = _model(load, operators, [0])
    operators[1].workers[0].lie("llama", "y + q")
    for _ in range(2):
        with pytest.raises(OperatorUnavailableError, match="no worker is left"):
            training_step(model, "llama")
    assert len(multiplier_of(model).statistics()["beta"].lies) == 1


def test_replicas_that_all_lie_are_all_named(
    operators: RunningOperators, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    model = _model(load, operators)
    for worker in operators[0].workers:
        worker.lie("llama", "y + 2^30")
    with pytest.raises(OperatorUnavailableError, match="operator alpha: no worker is left"):
        training_step(model, "llama")
    addresses = tuple(worker.addresses["llama"] for worker in operators[0].workers)
    assert multiplier_of(model).statistics()["alpha"].lies == addresses
    assert all(address in message for address, message in zip(addresses, _errors(caplog), strict=True))


def test_liars_of_two_operators_at_once_are_both_caught(
    operators: RunningOperators, load: Load, honest_step: dict[str, bytes]
) -> None:
    model = _model(load, operators)
    for operator in operators:
        operator.workers[0].lie("llama", "one residue is off by one", at=FORWARD)
    assert training_step(model, "llama") == honest_step
    lies = [x.lies for x in multiplier_of(model).statistics().values()]
    assert lies == [(operator.workers[0].addresses["llama"],) for operator in operators]


def test_a_lie_while_generating_changes_no_token(operators: RunningOperators, load: Load) -> None:
    prompt = torch.tensor([[5, 17, 31]])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = with_adapter(load("llama", masking="reference"), "llama").eval().generate(prompt, **options)
    model = _model(load, operators).eval()
    operators[1].workers[0].lie("llama", "y + 2^30", at=20)
    assert torch.equal(model.generate(prompt, **options), expected)
    assert len(multiplier_of(model).statistics()["beta"].lies) == 1


def test_honest_workers_are_never_accused(operators: RunningOperators, load: Load) -> None:
    model = _model(load, operators)
    for _ in range(3):
        training_step(model, "llama")
    for statistics in multiplier_of(model).statistics().values():
        assert statistics.lies == ()
        assert statistics.verified_responses == statistics.requests > 40
