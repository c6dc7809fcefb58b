"""What an optimizer does not read is refused before anything is loaded."""

from pathlib import Path
from typing import Any

import pytest
from support.recipes import recipe_of

from blindtune.client.training.trainer import training_arguments
from blindtune.errors import ConfigurationError

pytestmark = pytest.mark.hf


def _arguments(folder: Path, measuring: bool = False, **training: Any) -> Any:
    return training_arguments(
        recipe_of(folder, "model", folder / "train.jsonl", training=training), folder, measuring
    )


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"},
        {"optim": "rmsprop", "optim_args": "alpha=0.9,centered=yes"},
    ],
)
def test_what_an_optimizer_reads_is_taken(training: dict[str, Any], tmp_path: Path) -> None:
    _arguments(tmp_path, **training)


@pytest.mark.parametrize(
    ("training", "match"),
    [
        ({"optim": "sgd", "optim_args": "momentum=0.9,nestorov=true"}, "optimizer sgd reads no nestorov"),
        ({"optim_args": "betas=0.5"}, "optimizer adamw_torch_fused reads no betas"),
        ({"optim": "adafactor", "optim_args": "decay_rate=-0.8"}, "reads no decay_rate"),
        ({"optim": "sgd", "optim_args": "momentum=much"}, "training.optim sgd: .*'much'"),
        ({"optim": "galore_adamw", "optim_args": "rank=4"}, "training.optim galore_adamw: .*galore_torch"),
        ({"optim": "lomo"}, "training.optim lomo: .*lomo_optim"),
        ({"optim_target_modules": ["q_proj"]}, "optim_target_modules: .* does not read it"),
    ],
)
def test_what_it_does_not_read_or_has_no_package_for_is_refused(
    training: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=match):
        _arguments(tmp_path, **training)


def test_measuring_needs_no_optimizer(tmp_path: Path) -> None:
    _arguments(tmp_path, measuring=True, optim="lomo")
