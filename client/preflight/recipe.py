"""All that can be checked of a recipe before its run: data, model, disk, operators, bandwidth."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from blindtune.checkpoint.files import resolve
from blindtune.client.config import BlindConfig
from blindtune.client.connect import expectations
from blindtune.client.data.prepared import PreparedData, prepare_data
from blindtune.client.hints import hint_bytes
from blindtune.client.kit import Kit
from blindtune.client.preflight.bandwidth import measure
from blindtune.client.preflight.disk import check_disk
from blindtune.client.preflight.finding import Finding, problem_of, until_a_problem
from blindtune.client.preflight.operators import check_operators
from blindtune.client.prepare import kit_of
from blindtune.client.recipe import Recipe
from blindtune.client.training.environment import without_accelerate_variables
from blindtune.client.training.estimate import Estimate, estimate, remote_products
from blindtune.client.training.models import blind_config, load_tokenizer
from blindtune.client.training.trainer import training_arguments
from blindtune.protocol.errors import BlindtuneError
from blindtune.protocol.lattice.parameters import LATTICE_PARAMETER_SETS

__all__ = ["check_recipe"]

# An adapter with its optimizer: LoRA's two matrices, and two moments of each, in 4 bytes.
_BYTES_OF_A_PARAMETER = 12
_AGAIN = "correct it, and check again"


@dataclass
class _Known:
    """What earlier checks found out for later ones."""

    config: BlindConfig | None = None
    tokenizer: Any = None
    data: PreparedData | None = None
    kit: Kit | None = None
    expected: Estimate | None = None


def check_recipe(recipe: Recipe) -> Iterator[Finding]:
    """Checks a recipe, as far as the ones before went well. Nothing private is sent to anyone."""
    known = _Known()
    yield from until_a_problem(_settings(recipe, known), _model(recipe, known), _data(recipe, known))
    if known.data is not None:
        yield from _guarded("traffic", lambda: _traffic(recipe, known))
    if known.config is None or known.kit is None:
        return
    yield from _guarded("disk", lambda: check_disk(_disk_needs(recipe, known)))
    if recipe.masking.mode == "reference":
        yield Finding("operators", "ok", "masking reference asks none, and protects nothing")
        return
    config, kit = known.config, known.kit
    reached = True
    for finding in check_operators(config, expectations(kit)):  # all workers, to show everything at once
        reached = reached and finding.status != "problem"
        yield finding
    if reached:
        yield from _guarded("bandwidth", lambda: measure(config, kit))


def _guarded(check: str, find: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Findings, with an error of ours as one more."""
    try:
        yield from find()
    except BlindtuneError as error:
        yield problem_of(check, error, _AGAIN)


def _settings(recipe: Recipe, known: _Known) -> Iterator[Finding]:
    def find() -> Iterator[Finding]:
        known.config = blind_config(recipe)
        with without_accelerate_variables():
            training_arguments(recipe, recipe.output.dir)
        yield Finding("configuration", "ok", f"masking {recipe.masking.mode}, {known.config.described}")
        if known.config.not_private:
            yield Finding(
                "independence",
                "warning",
                known.config.not_private,
                "remove masking.allow_one_machine before you train on private data",
            )

    return _guarded("configuration", find)


def _model(recipe: Recipe, known: _Known) -> Iterator[Finding]:
    def find() -> Iterator[Finding]:
        folder = resolve(recipe.model.name, recipe.model.revision)
        known.tokenizer = load_tokenizer(folder)
        known.kit = kit_of(folder)
        fingerprint = known.kit.description.fingerprint
        yield Finding("model", "ok", f"{len(known.kit.layers)} layers, fingerprint {fingerprint[:16]}")

    return _guarded("model", find)


def _data(recipe: Recipe, known: _Known) -> Iterator[Finding]:
    def find() -> Iterator[Finding]:
        known.data = prepare_data(recipe.data, known.tokenizer, recipe.training.seed)
        for name, split in (("train", known.data.train), ("validation", known.data.validation)):
            if split is None:
                continue
            yield Finding(f"data.{name}", "ok", f"{len(split.rows):,} examples, format {split.layout}")
            for warning in split.warnings:
                yield Finding(f"data.{name}", "warning", warning, "correct the data if that is not meant")
            if split.dropped:
                yield Finding(
                    f"data.{name}",
                    "warning",
                    f"{split.dropped:,} examples have nothing of their answer left and are not used",
                    "raise data.max_length",
                )

    return _guarded("data", find)


def _traffic(recipe: Recipe, known: _Known) -> Iterator[Finding]:
    if known.data is not None:
        known.expected = expected = estimate(recipe, known.data)
        yield Finding(
            "traffic",
            "ok",
            f"{expected.steps:,} steps, {expected.rounds:,} rounds, {expected.bytes_up / 1e6:,.1f} MB up, "
            f"{expected.bytes_down / 1e6:,.1f} MB down",
        )


def _disk_needs(recipe: Recipe, known: _Known) -> dict[Any, tuple[str, int]]:
    kit = known.kit
    if kit is None:
        return {}
    adapter = sum(recipe.adapter.r * (x.in_features + x.out_features) for x in kit.layers.values())
    kept = (recipe.training.save_total_limit or 10) + 2
    needs = {recipe.output.dir: ("checkpoints", adapter * _BYTES_OF_A_PARAMETER * kept)}
    if recipe.masking.mode == "lattice" and known.data is not None:
        parameters = LATTICE_PARAMETER_SETS[recipe.masking.parameter_set]
        products = remote_products(recipe, known.data.labels)
        size = sum(hint_bytes(parameters, kit.outputs(x)) for x in products)
        needs[kit.folder] = ("hints", size)
    return needs
