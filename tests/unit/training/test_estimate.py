"""What is said of a run in advance is what it then does: through real workers, to the byte."""

from pathlib import Path
from typing import Any

import pytest
from support.operators import RunningOperators
from support.recipes import Silent, operator_sections, recipe_of, with_tokenizer, write_lines

from blindtune.client.data.prepared import prepare_data
from blindtune.client.plan.estimate import Estimate, estimate
from blindtune.client.recipe import Recipe
from blindtune.client.runs.run import train_recipe
from blindtune.client.training.models import BaseModel
from blindtune.errors import ConfigurationError

pytestmark = pytest.mark.hf

SHORT = [{"prompt": "ab" * i, "completion": "c" * (1 + 3 * (i % 4))} for i in range(1, 8)]
LABELLED = [{"text": "ab " * i, "label": ("x", "y", "z")[i % 3]} for i in range(1, 9)]


def _estimate(recipe: Recipe) -> Estimate:
    return estimate(
        recipe, prepare_data(recipe.data, BaseModel.found(recipe).tokenizer(), recipe.training.seed)
    )


@pytest.fixture
def recipe(tmp_path: Path, checkpoints: dict[str, Path], operators: RunningOperators) -> Any:
    """A recipe for a family's checkpoint, with workers and validation data."""

    def make(family: str, **sections: Any) -> Recipe:
        records = LABELLED if family == "bert" else SHORT
        data = {
            "task": "classification" if family == "bert" else "instructions",
            "validation": str(write_lines(tmp_path / "validation.jsonl", records[:3])),
            **sections.pop("data", {}),
        }
        return recipe_of(
            tmp_path,
            with_tokenizer(checkpoints[family], tmp_path),
            write_lines(tmp_path / "train.jsonl", records),
            masking={"mode": "shares", **sections.pop("masking", {})},
            operators=operator_sections(operators, family),
            data=data,
            **sections,
        )

    return make


def assert_comes_true(recipe: Recipe) -> Estimate:
    """Runs a recipe and compares all that can be known in advance."""
    expected = _estimate(recipe)
    summary = train_recipe(recipe, Silent())
    names = ("steps", "tokens", "rounds", "bytes_up", "bytes_down", "padding_share")
    assert {x: summary[x] for x in names} == {x: getattr(expected, x) for x in names}
    assert expected.rounds > 0
    return expected


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "two_epochs": ("llama", {"training": {"num_train_epochs": 2}}),
    "ends_in_the_middle_of_an_epoch": ("llama", {"training": {"max_steps": 5}}),
    "half_an_epoch": ("llama", {"training": {"num_train_epochs": 0.5}}),
    "accumulates_gradients": ("llama", {"training": {"gradient_accumulation_steps": 3, "max_steps": 3}}),
    "drops_the_last_batch": (
        "llama",
        {
            "training": {"dataloader_drop_last": True, "max_steps": 3, "gradient_accumulation_steps": 2},
            "data": {"validation": None},
        },
    ),
    "order_is_random": ("llama", {"training": {"max_steps": 2}, "data": {"group_by_length": False}}),
    "order_has_a_seed_of_its_own": ("llama", {"training": {"max_steps": 2, "data_seed": 7}}),
    "examples_are_cut": ("llama", {"training": {"max_steps": 2}, "data": {"max_length": 9}}),
    "only_the_last_block_has_adapters": (
        "llama",
        {"training": {"max_steps": 1}, "adapter": {"target_modules": ["q_proj"], "layers_to_transform": [1]}},
    ),
    "only_some_layers_have_adapters": (
        "llama",
        {"training": {"max_steps": 1}, "adapter": {"target_modules": ["down_proj"]}},
    ),
    "targets_are_an_expression": (
        "llama",
        {"training": {"max_steps": 1}, "adapter": {"target_modules": r".*layers\.1\..*(v_proj|up_proj)"}},
    ),
    "layers_are_excluded": (
        "llama",
        {"training": {"max_steps": 1}, "adapter": {"exclude_modules": r".*layers\.0\..*"}},
    ),
    "embeddings_are_trained": (
        "llama",
        {
            "training": {"max_steps": 1},
            "adapter": {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"]},
        },
    ),
    "activations_are_not_kept": ("llama", {"training": {"max_steps": 1, "gradient_checkpointing": True}}),
    "activations_are_not_kept_and_few_layers_have_adapters": (
        "llama",
        {
            "training": {"max_steps": 1, "activation_checkpointing": True},
            "adapter": {"target_modules": ["q_proj"]},
        },
    ),
    "activations_of_a_classifier_are_not_kept": (
        "bert",
        {"training": {"max_steps": 1, "gradient_checkpointing": True}},
    ),
    "head_is_remote": ("llama", {"training": {"max_steps": 1}, "quantization": {"head": "remote"}}),
    "head_is_local": ("llama", {"training": {"max_steps": 1}, "quantization": {"head": "local"}}),
    "measures_every_second_step": (
        "llama",
        {"training": {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}},
    ),
    "measures_every_epoch": ("llama", {"training": {"max_steps": 5, "eval_strategy": "epoch"}}),
    "measures_late": (
        "llama",
        {"training": {"max_steps": 5, "eval_strategy": "epoch", "eval_delay": 2}},
    ),
    "gpt2_by_q24": ("gpt2", {"training": {"max_steps": 1}, "masking": {"parameter_set": "q24"}}),
    "qwen3_by_q31": ("qwen3", {"training": {"max_steps": 1}, "masking": {"parameter_set": "q31"}}),
    "classifier": ("bert", {"training": {"max_steps": 2}}),
    "biases_of_a_classifier_are_trained": (
        "bert",
        {"training": {"max_steps": 1}, "adapter": {"target_modules": ["dense"], "bias": "all"}},
    ),
    "only_a_classifiers_last_block_has_adapters": (
        "bert",
        {"training": {"max_steps": 1}, "adapter": {"target_modules": ["query"], "layers_to_transform": [1]}},
    ),
}


def test_hints_are_counted_as_long_as_they_are_not_there(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLINDTUNE_CACHE", str(tmp_path / "cache"))
    wanted = recipe("llama_tied", training={"max_steps": 1}, data={"validation": None})
    # Three bytes a number on the way, four on the disk, and fewer rows than another.
    masking = wanted.masking.model_copy(update={"mode": "lattice", "parameter_set": "mlwe1024-q24"})
    wanted = wanted.model_copy(update={"masking": masking, "operators": wanted.operators[:1]})
    first = assert_comes_true(wanted)
    assert 0 < first.hint_bytes < first.bytes_down
    later = _estimate(wanted)
    assert later.hint_bytes == 0
    assert later.bytes_down == first.bytes_down - first.hint_bytes


@pytest.mark.parametrize("case", CASES)
def test_a_run_costs_what_was_estimated_when(case: str, recipe: Any) -> None:
    family, sections = CASES[case]
    assert_comes_true(recipe(family, **sections))


def test_the_estimate_leaves_the_random_number_generators_alone(recipe: Any) -> None:
    import torch

    wanted = recipe("llama")
    before = torch.random.get_rng_state()
    _estimate(wanted)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_run_in_one_process_sends_nothing(recipe: Any) -> None:
    wanted = recipe("llama", training={"max_steps": 1})
    expected = _estimate(
        wanted.model_copy(update={"masking": wanted.masking.model_copy(update={"mode": "reference"})})
    )
    assert (expected.rounds, expected.bytes_up, expected.bytes_down) == (0, 0, 0)
    assert expected.tokens > 0


def test_an_adapter_on_layers_that_are_not_there_is_refused_before_a_run(recipe: Any) -> None:
    with pytest.raises(ConfigurationError, match="adapter.target_modules names 'no_such_layer'"):
        _estimate(recipe("llama", adapter={"target_modules": ["no_such_layer"]}))
