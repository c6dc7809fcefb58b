"""A training that diverges is said once, and shown in JSON that every parser takes."""

import json
import math
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from blindtune.client.cli.console import emit
from blindtune.client.process.finite import finite
from blindtune.client.runs.divergence import DivergenceWarning


def test_numbers_that_json_lacks_become_null_wherever_they_are() -> None:
    content = {"a": math.nan, "b": [1, -math.inf, {"c": (math.inf, 0.5)}], "d": "nan", "e": None}
    assert finite(content) == {"a": None, "b": [1, None, {"c": [None, 0.5]}], "d": "nan", "e": None}


def test_an_event_with_a_loss_that_is_no_number_is_valid_json(capsys: pytest.CaptureFixture[str]) -> None:
    emit("step", step=3, loss=math.nan, tokens_per_second=math.inf)
    (line,) = capsys.readouterr().out.splitlines()
    event = json.loads(line, parse_constant=pytest.fail)
    assert event == {"event": "step", "step": 3, "loss": None, "tokens_per_second": None}


@pytest.mark.parametrize("name", ["loss", "grad_norm", "eval_nll"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_figure_that_is_no_finite_number_is_said_once(
    name: str, value: float, tmp_path: Any
) -> None:
    said: list[str] = []
    warning = DivergenceWarning(said.append)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    for step, logs in enumerate(({"loss": 1.0, "epoch": 1}, {"loss": 2.0, name: value}, {name: value}, None)):
        warning.on_log(arguments, TrainerState(global_step=step), TrainerControl(), logs)
    (line,) = said
    assert line.startswith(f"warning: {name} at step 1 is no finite number")
