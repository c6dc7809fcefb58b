"""Runs with several micro-batches in flight, through real workers: the same run whatever their number."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.operators import PATIENCE, RunningOperators, running_operators
from support.recipes import Silent, operator_sections, recipe_of, with_tokenizer, write_lines
from transformers import TrainerCallback

from blindtune.client.recipe import Recipe
from blindtune.client.recipe.schema import OperatorSection
from blindtune.client.runs.run import train_recipe
from blindtune.client.runs.stopping import StopRequest
from blindtune.client.training.figures import Figures
from blindtune.errors import InterruptedRunError, UntrustworthyOperatorError

pytestmark = pytest.mark.hf

# Two steps of four micro-batches and one of three in each epoch, the last one with a single example.
RECORDS = [{"prompt": "ab" * i, "completion": "c" * (1 + 3 * (i % 4))} for i in range(1, 22)]
STEPS = 6
TRAINING = {
    "num_train_epochs": 2,
    "gradient_accumulation_steps": 4,
    "per_device_train_batch_size": 2,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 0.05,
    "optim": "adafactor",
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 10,
}
Make = Callable[..., Recipe]


@pytest.fixture
def recipe(checkpoints: dict[str, Path], operators: RunningOperators, tmp_path: Path) -> Make:
    """Makes recipes of six steps with so many micro-batches in flight; 0 for the reference."""
    model = with_tokenizer(checkpoints["llama"], tmp_path)
    train = write_lines(tmp_path / "train.jsonl", RECORDS)

    def make(in_flight: int, name: str = "run", workers: list[int] | None = None, **training: Any) -> Recipe:
        named = operator_sections(operators, "llama")
        for section in named:
            section["workers"] = [section["workers"][i] for i in workers or range(len(section["workers"]))]
        mode = {"mode": "shares" if in_flight else "reference", "micro_batches_in_flight": in_flight or 1}
        return recipe_of(
            tmp_path / f"{name} {in_flight}",
            model,
            train,
            masking={**mode, "retry_seconds": 20.0},
            operators=named,
            adapter={"lora_dropout": 0.2},
            training={**TRAINING, **training},
        )

    return make


class Logging(Silent):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[float, float]] = []

    def steps(self, so_far: Callable[[], Figures]) -> TrainerCallback:
        logged = self.logged

        class Log(TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
                if "loss" in logs:
                    logged.append((logs["loss"], logs["grad_norm"]))

        return Log()


def _adapter(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def _random_state(checkpoint: Path) -> Any:
    state = torch.load(checkpoint / "rng_state.pth", weights_only=False)
    return state["python"], state["numpy"][1].tolist(), state["cpu"].tolist()


@pytest.mark.parametrize(
    "extra",
    [{}, {"bf16": True, "activation_checkpointing": True}],
    ids=["fp32", "bf16 and activations computed again"],
)
def test_losses_adapter_and_checkpoints_do_not_depend_on_the_number_in_flight(
    extra: dict[str, Any], recipe: Make
) -> None:
    logged, runs, traffic = [], [], []
    for in_flight in (0, 1, 2, 4):
        run, observer = recipe(in_flight, **extra), Logging()
        summary = train_recipe(run, observer)
        runs.append(run.output.dir)
        logged.append(observer.logged)
        traffic.append(tuple(summary[x] for x in ("tokens", "rounds", "requests", "bytes_up", "bytes_down")))
    assert len(logged[0]) == STEPS
    assert logged[1:] == logged[:1] * 3
    assert traffic[2:] == traffic[1:2] * 2, "how much is asked for does not depend on it either"
    assert {_adapter(folder) for folder in runs} == {_adapter(runs[0])}
    trained = load_file(runs[0] / "adapter_model.safetensors")
    assert any(name.endswith("lora_B.weight") and x.any() for name, x in trained.items())
    for step in range(1, STEPS + 1):
        checkpoints = [folder / "checkpoints" / f"checkpoint-{step}" for folder in runs]
        assert len({_adapter(x) for x in checkpoints}) == 1
        assert all(_random_state(x) == _random_state(checkpoints[0]) for x in checkpoints[1:])


def test_a_lie_in_the_middle_of_a_step_costs_nothing_that_was_trained(
    recipe: Make, operators: RunningOperators
) -> None:
    whole = recipe(0, "whole")
    train_recipe(whole, Silent())
    run = recipe(4, workers=[0], save_steps=100)
    liar = operators[1].workers[0]
    liar.lie("llama", "one residue is off by one", at=130, times=10_000)
    with pytest.raises(UntrustworthyOperatorError, match="resume"):
        train_recipe(run, Silent())
    liar.lie("llama", None)
    (saved,) = (run.output.dir / "checkpoints").glob("checkpoint-*")
    step = json.loads((saved / "trainer_state.json").read_text())["global_step"]
    assert 0 < step < STEPS
    assert _adapter(saved) == _adapter(whole.output.dir / "checkpoints" / saved.name)
    # Who multiplies may change, and how many wait for it.
    going_on = recipe(2, save_steps=100).masking
    train_recipe(run.model_copy(update={"masking": going_on}), Silent(), resume=True)
    assert _adapter(run.output.dir) == _adapter(whole.output.dir)


def test_a_request_to_stop_is_heard_after_the_step_with_all_its_micro_batches(recipe: Make) -> None:
    run, request = recipe(4, "stopped"), StopRequest()
    request.wanted = True
    with pytest.raises(InterruptedRunError, match="stopped after step 1 of 6"):
        train_recipe(run, Silent(), stop=request)
    train_recipe(run, Silent(), resume=True)
    whole = recipe(1, "whole")
    train_recipe(whole, Silent())
    assert _adapter(run.output.dir) == _adapter(whole.output.dir)


@pytest.mark.slow
def test_a_second_signal_ends_micro_batches_whose_worker_does_not_answer(
    recipe: Make, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    handled = threading.Event()

    class Listening(Silent):
        def say(self, message: str) -> None:
            if message.startswith("stopping"):
                handled.set()

    def signal_twice() -> None:
        for _ in range(100 * PATIENCE):
            if mute.lies_told("llama") >= 4:
                break
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        # Two that come at once are one to Python.
        handled.wait(PATIENCE)
        os.kill(os.getpid(), signal.SIGINT)

    with running_operators(tmp_path / "mute", {"llama": checkpoints["llama"]}, (1, 1)) as operators:
        mute = operators[0].workers[0]
        assert mute.addresses
        mute.lie("llama", "hangs", at=130, times=10_000)
        run = recipe(4)
        sections = [OperatorSection(**x) for x in operator_sections(operators, "llama")]
        waiter = threading.Thread(target=signal_twice)
        waiter.start()
        with pytest.raises(KeyboardInterrupt):  # long before a request would be given up
            train_recipe(run.model_copy(update={"operators": sections}), Listening())
        waiter.join()
    assert not [x for x in threading.enumerate() if x.name.startswith("micro-batch")]
    train_recipe(run, Silent(), resume=True)
    whole = recipe(0, "whole")
    train_recipe(whole, Silent())
    assert _adapter(run.output.dir) == _adapter(whole.output.dir)
