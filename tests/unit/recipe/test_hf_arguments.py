"""The section ``training`` follows the installed release of transformers, field by field."""

import dataclasses
import enum
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from support.recipes import recipe_of
from transformers import TrainingArguments

from blindtune.client.recipe import hf_arguments
from blindtune.client.recipe.hf_arguments import DEFAULTS, REFUSED, TrainingSection, refused
from blindtune.client.training.trainer import training_arguments

pytestmark = pytest.mark.hf
FIELDS = {x.name: x for x in dataclasses.fields(TrainingArguments) if x.init}
OFFERED = TrainingSection.model_fields


def test_every_field_is_offered_or_refused_with_a_reason() -> None:
    for name in FIELDS:
        assert (name in OFFERED) != bool(refused(name)), name
    assert OFFERED.keys() == hf_arguments.OFFERED, "each was tried"


def test_nothing_is_offered_refused_or_given_a_default_that_is_no_field() -> None:
    assert OFFERED.keys() <= FIELDS.keys()
    assert REFUSED.keys() <= FIELDS.keys()
    assert DEFAULTS.keys() <= OFFERED.keys()
    assert refused("no_such_field") is None


@pytest.mark.parametrize(
    "name",
    [
        "push_to_hub",
        "hub_token",
        "report_to",
        "trackio_space_id",
        "output_dir",
        "fp16",
        "deepspeed",
        "ddp_backend",
    ],
)
def test_what_would_send_data_elsewhere_or_break_masks_is_refused(name: str) -> None:
    assert name in FIELDS
    assert refused(name)
    with pytest.raises(ValidationError, match="Extra inputs"):
        TrainingSection.model_validate({name: "x"})


def test_what_a_release_adds_is_refused_until_somebody_tried_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_arguments, "OFFERED", hf_arguments.OFFERED - {"use_cache"})
    assert "untried here" in str(refused("use_cache"))


@pytest.mark.parametrize(
    ("section", "why"),
    [
        ({"bf16_full_eval": True}, "would turn the adapter itself into bf16"),
        ({"dataloader_in_order": False}, "could not be repeated"),
        ({"optim_args": "momentum"}, "expected name=value"),
        ({"optim_args": "momentum=0.9=1"}, "expected name=value"),
        ({"optim_args": "momentum=0.9,,"}, "expected name=value"),
        ({"optim_target_modules": "*proj"}, "no regular expression: nothing to repeat"),
        ({"gradient_checkpointing": True, "activation_checkpointing": False}, "two names of one setting"),
    ],
)
def test_values_that_would_do_something_else_than_they_say_are_refused(
    section: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValidationError, match=why):
        TrainingSection.model_validate(section)


def test_values_that_do_what_they_say_are_taken() -> None:
    for section in (
        {"bf16_full_eval": False, "dataloader_in_order": True},
        {"optim_args": "momentum=0.9, nesterov = true"},
        {"optim_target_modules": ["*proj"]},
        {"gradient_checkpointing": True, "activation_checkpointing": True},
    ):
        TrainingSection.model_validate(section)


def test_defaults_are_those_of_hugging_face_but_for_the_documented_ones() -> None:
    section = TrainingSection()
    for name in OFFERED:
        field = FIELDS[name]
        default: Any = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory()  # type: ignore[misc]
        default = default.value if isinstance(default, enum.Enum) else default
        assert getattr(section, name) == DEFAULTS.get(name, default), name


def test_every_choice_that_is_allowed_is_one_of_hugging_faces(tmp_path: Path) -> None:
    for strategy in ("no", "steps", "epoch"):
        section = TrainingSection.model_validate({"logging_strategy": strategy})
        assert (
            TrainingArguments(str(tmp_path), report_to="none", **section.model_dump()).logging_strategy
            == strategy
        )
    with pytest.raises(ValidationError, match="'linear', 'cosine'"):
        TrainingSection.model_validate({"lr_scheduler_type": "linera"})


def test_the_section_builds_training_arguments_that_mean_the_same(tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path,
        "m",
        tmp_path / "train.jsonl",
        training={
            "learning_rate": 3e-5,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr": 1e-6},
            "optim": "sgd",
            "save_strategy": "epoch",
            "warmup_steps": 0.1,
            "data_seed": 3,
        },
    )
    arguments = training_arguments(recipe, tmp_path)
    for name, value in recipe.training.model_dump(exclude_none=True).items():
        if name not in ("save_total_limit", "gradient_checkpointing"):
            found = getattr(arguments, name)
            assert (found.value if isinstance(found, enum.Enum) else found) == value, name
    assert arguments.report_to == []
    assert not arguments.push_to_hub
