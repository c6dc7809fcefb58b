"""All that can be checked of a recipe before its run: data, model, disk, operators, bandwidth."""

from collections.abc import Iterator
from pathlib import Path

from blindtune.client.config.blind_config import BlindConfig
from blindtune.client.config.parameter_sets import lattice_set, residue_set
from blindtune.client.kit.hints import hint_bytes, missing_hints
from blindtune.client.kit.kit import Kit
from blindtune.client.kit.prepare import kit_of
from blindtune.client.model.quantizer import preparing
from blindtune.client.plan.estimate import remote_products
from blindtune.client.preflight.bandwidth import measure
from blindtune.client.preflight.disk import check_disk
from blindtune.client.preflight.finding import Finding, problem_of
from blindtune.client.preflight.offline import Known, Step, offline_steps
from blindtune.client.preflight.operators import check_operators
from blindtune.client.recipe import Recipe
from blindtune.client.rounds.connect import expectations
from blindtune.client.training.environment import without_accelerate_variables
from blindtune.errors import BlindtuneError
from blindtune.protocol.weights import SCHEMES

__all__ = ["check_recipe"]

# An adapter with its optimizer: LoRA's two matrices, and two moments of each, in 4 bytes.
_BYTES_OF_A_PARAMETER = 12
_AGAIN = "correct it, and check again"


def check_recipe(recipe: Recipe) -> Iterator[Finding]:
    """Checks a recipe, as far as the ones before went well. Nothing private is sent to anyone."""
    known = Known()
    well = True
    for step in offline_steps():
        if step.possible(known):
            for finding in _guarded(step, recipe, known):
                well = well and finding.status != "problem"
                yield finding
    if well and known.folder is not None and known.config is not None:
        yield from _with_the_model(recipe, known, known.config, known.folder)


def _with_the_model(recipe: Recipe, known: Known, config: BlindConfig, folder: Path) -> Iterator[Finding]:
    """What reads all weights, or asks operators."""
    try:
        kit = kit_of(folder, preparing(recipe.model.name), SCHEMES[recipe.quantization.scheme])
    except BlindtuneError as error:
        yield problem_of("model", error, _AGAIN)
        return
    yield Finding("model", "ok", f"{len(kit.layers)} layers, fingerprint {kit.description.fingerprint[:16]}")
    yield from check_disk(_disk_needs(recipe, known, kit))
    if recipe.masking.mode == "reference":
        yield Finding("operators", "ok", "masking reference asks none, and protects nothing")
        return
    reached = True
    for finding in check_operators(
        config, expectations(kit, residue_set(config.masking, config.parameter_set))
    ):  # all workers, to show everything at once
        reached = reached and finding.status != "problem"
        yield finding
    if reached:
        try:
            yield from measure(config, kit)
        except BlindtuneError as error:
            yield problem_of("bandwidth", error, _AGAIN)


@without_accelerate_variables()
def _guarded(step: Step, recipe: Recipe, known: Known) -> list[Finding]:
    """What a step finds, with an error of ours as one more."""
    found = []
    try:
        for finding in step.find(recipe, known):
            found.append(finding)
    except BlindtuneError as error:
        found.append(problem_of(step.name, error, _AGAIN))
    return found


def _disk_needs(recipe: Recipe, known: Known, kit: Kit) -> dict[Path, tuple[str, int]]:
    adapter = sum(recipe.adapter.r * (x.in_features + x.out_features) for x in kit.layers.values())
    kept = (recipe.training.save_total_limit or 10) + 2
    needs = {recipe.output.dir: ("checkpoints", adapter * _BYTES_OF_A_PARAMETER * kept)}
    if recipe.masking.mode == "lattice" and known.data is not None:
        parameters = lattice_set(recipe.masking.chosen_set)
        products = remote_products(recipe, known.folder or kit.folder, known.data.labels)
        missing = missing_hints(kit.folder, parameters, products)
        size = sum(hint_bytes(parameters, kit.outputs(x)) for x in missing)
        needs[kit.folder] = ("hints", size)
    return needs
