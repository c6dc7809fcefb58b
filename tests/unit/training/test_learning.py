"""A run that learned nothing says so, and one that learned something does not."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.recipes import Silent, recipe_of, with_tokenizer, write_lines
from torch import nn

from blindtune.client.runs.learning import learning_warnings
from blindtune.client.runs.run import train_recipe

pytestmark = pytest.mark.hf


def _adapter(*ends: float) -> nn.Module:
    """A model with a ``lora_B`` of each value."""
    model = nn.Module()
    for number, end in enumerate(ends):
        layer = nn.Module()
        layer.lora_A = nn.Linear(2, 2, bias=False)
        layer.lora_B = nn.Linear(2, 2, bias=False)
        nn.init.constant_(layer.lora_B.weight, end)
        model.add_module(f"layer{number}", layer)
    return model


def _said(
    before: dict[str, Any] | None = None,
    after: dict[str, Any] | None = None,
    losses: Sequence[float] = (),
    steps: int = 50,
    epochs: float = 1.0,
    model: nn.Module | None = None,
) -> str:
    history = [{"eval_loss": 1.0}, *({"loss": x} for x in losses), {"train_loss": 9.0}]
    return " ".join(learning_warnings(model or _adapter(0.1), steps, epochs, before, after, history))


def test_an_adapter_that_is_zero_everywhere_is_said_and_one_that_is_not_is_not() -> None:
    assert "still zero after 1 steps" in _said(model=_adapter(0.0, 0.0), steps=1, epochs=0.1)
    assert _said(model=_adapter(0.0, 1e-30)) == ""
    assert _said(model=nn.Linear(2, 2)) == "", "nothing of it is LoRA"


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"loss": 2.994}, {"loss": 2.989}, "hardly anything"),
        ({"loss": 2.994}, {"loss": 2.994}, "hardly anything"),
        ({"loss": 2.994}, {"loss": 2.95}, ""),
        ({"loss": 2.994}, {"loss": 3.1}, "worse than before"),
        ({"loss": 2.994}, {"loss": 3.0}, "hardly anything"),
        ({"loss": 0.7, "accuracy": 0.5}, {"loss": 0.699, "accuracy": 0.5}, "hardly anything"),
        ({"loss": 0.7, "accuracy": 0.5}, {"loss": 0.9, "accuracy": 0.6}, ""),
        ({"loss": 0.7, "token_accuracy": 0.5}, {"loss": 0.699, "token_accuracy": 0.502}, "hardly anything"),
        ({"loss": 0.7, "macro_f1": 0.3}, {"loss": 0.699, "macro_f1": 0.32}, ""),
        ({"loss": 0.004}, {"loss": 0.004}, ""),
        ({"loss": math.nan}, {"loss": 2.0}, ""),
        ({"loss": None}, {"loss": 2.0}, ""),
        ({"loss": 2.0}, {"loss": math.inf}, ""),
    ],
)
def test_validation_figures_that_do_not_move_are_said(
    before: dict[str, Any], after: dict[str, Any], said: str
) -> None:
    found = _said(before, after)
    assert found.startswith(said) and bool(found) == bool(said)


def test_a_few_steps_are_no_run_unless_they_are_all() -> None:
    figures = {"loss": 2.994}
    assert _said(figures, figures, steps=6, epochs=0.5) == ""
    assert _said(figures, figures, steps=6, epochs=1.0)
    assert _said(figures, figures, steps=10, epochs=0.5)


def _losses(begin: float, end: float, noise: float, steps: int, seed: int) -> list[float]:
    chance = random.Random(seed)
    return [begin + (end - begin) * i / steps + chance.gauss(0, noise) for i in range(steps)]


def test_training_losses_are_judged_only_where_noise_allows_it() -> None:
    assert "from 2.99" in _said(losses=_losses(2.994, 2.989, 0.01, 40, 0))
    assert _said(losses=_losses(2.994, 2.7, 0.01, 40, 0)) == ""
    assert _said(losses=_losses(2.994, 2.994, 1.0, 40, 0)) == "", "nobody can tell"
    assert _said(losses=[3.0] * 7) == "", "too few"
    assert _said(losses=[3.0] * 20 + [math.nan]) == ""
    wolves = sum(bool(_said(losses=_losses(3.0, 2.8, 0.2, 100, seed))) for seed in range(300))
    assert wolves <= 3, "it learned 5 % in each"


@pytest.mark.parametrize(
    ("rate", "validated", "said"),
    [
        (0.0, False, "still zero"),
        (1e-7, True, "validation loss"),
        (1e-7, False, "training loss"),
        (0.02, True, ""),
    ],
)
def test_a_run_ends_with_the_warning_and_keeps_it(
    rate: float, validated: bool, said: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    records = [{"prompt": "ab", "completion": "cd"}] * 8
    train = write_lines(tmp_path / "train.jsonl", records)
    recipe = recipe_of(
        tmp_path,
        with_tokenizer(checkpoints["llama"], tmp_path),
        train,
        data={"validation": str(train)} if validated else {},
        training={"learning_rate": rate, "num_train_epochs": 2, "lr_scheduler_type": "constant"},
    )
    observer = Silent()
    with torch.random.fork_rng():
        summary = train_recipe(recipe, observer)
    warned = [x for x in observer.said if x.startswith("warning:")]
    assert [f"warning: {x}" for x in summary["warnings"]] == warned
    assert len(warned) == bool(said)
    assert all(said in x for x in warned)
    assert json.loads((recipe.output.dir / "summary.json").read_text())["warnings"] == summary["warnings"]
