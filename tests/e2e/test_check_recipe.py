"""All checks of a recipe, against real workers."""

from pathlib import Path

import pytest
from support.operators import RunningOperators
from support.recipes import operator_sections, recipe_of, with_tokenizer, write_lines

from blindtune.client.preflight.recipe import check_recipe
from blindtune.client.recipe import Recipe

pytestmark = pytest.mark.hf


@pytest.fixture
def recipe(checkpoints: dict[str, Path], operators: RunningOperators, tmp_path: Path) -> Recipe:
    train = write_lines(tmp_path / "train.jsonl", [{"prompt": "ab", "completion": "cd"}] * 4)
    return recipe_of(
        tmp_path,
        with_tokenizer(checkpoints["llama"], tmp_path),
        train,
        masking={"mode": "shares"},
        operators=operator_sections(operators, "llama"),
    )


def test_a_recipe_that_works_has_no_problem_and_its_workers_are_measured(recipe: Recipe) -> None:
    findings = list(check_recipe(recipe))
    assert not [x for x in findings if x.status == "problem"]
    (warning,) = [x for x in findings if x.status == "warning"]
    assert (warning.check, "nothing is private" in warning.detail) == ("independence", True)
    for operator in recipe.operators:
        for address in operator.workers:
            assert any(x.check == f"{operator.name} {address} download" for x in findings)
    assert not recipe.output.dir.exists(), "looking changes nothing"


def test_operators_on_one_machine_are_a_problem_unless_they_are_allowed(recipe: Recipe) -> None:
    masking = recipe.masking.model_copy(update={"allow_one_machine": False})
    found = check_recipe(recipe.model_copy(update={"masking": masking}))
    (finding,) = [x for x in found if x.status == "problem"]
    assert "are all on this machine" in finding.detail


def test_every_worker_with_a_problem_is_named_and_nothing_is_measured(recipe: Recipe) -> None:
    gone = [x.model_copy(update={"workers": [f"127.0.0.{i}:1"]}) for i, x in enumerate(recipe.operators, 1)]
    findings = list(check_recipe(recipe.model_copy(update={"operators": gone})))
    problems = {x.check for x in findings if x.status == "problem"}
    assert problems == {"alpha 127.0.0.1:1 connection", "beta 127.0.0.2:1 connection"}
    assert not any("upload" in x.check for x in findings)


def test_a_problem_of_the_data_is_found_before_anything_is_connected_to(recipe: Recipe) -> None:
    recipe.data.train.write_text("{}\n")
    findings = list(check_recipe(recipe))
    assert [x.check for x in findings if x.status == "problem"] == ["data"]
    assert not any(x.check.startswith("alpha") and "connection" in x.check for x in findings[:3])
