"""Recipes of which one thing is broken, for what must find it before anything is loaded or connected to.

Their matrices are no numbers and their operators lead nowhere, so whatever loads or connects finds something
else than what is broken.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from blindtune.client.cli.dry_run import show_dry_run
from blindtune.client.preflight.finding import Finding
from blindtune.client.preflight.recipe import check_recipe
from blindtune.client.recipe import Recipe
from blindtune.client.runs.run import train_recipe
from blindtune.errors import BlindtuneError
from support.recipes import Silent, character_tokenizer, recipe_of, with_tokenizer, write_lines

__all__ = [
    "LABELLED",
    "TEXTS",
    "configured",
    "found_by_check",
    "found_by_dry_run",
    "found_by_run",
    "only_named",
    "recipe_for",
    "tensors_changed",
    "token_added",
]

TEXTS = [{"prompt": "ab" * i, "completion": "c" * (1 + 3 * (i % 4))} for i in range(1, 8)]
LABELLED = [{"text": "ab " * i, "label": ("x", "y", "z")[i % 3]} for i in range(1, 9)]
# Operators that nobody reaches.
NOBODY = [{"name": "a", "workers": ["127.0.0.2:1"]}, {"name": "b", "workers": ["127.0.0.3:1"]}]

Damage = Callable[[Path], object]


def recipe_for(
    folder: Path, checkpoint: Path, *, damage: Damage | None = None, rows: Any = None, **sections: Any
) -> Recipe:
    """A recipe with matrices of no numbers, and with workers that are not there.

    Args:
        folder: for the model, the data and the output.
        checkpoint: of the model, which is copied.
        damage: done to the copy.
        rows: of the data, for training and validation; those of the checkpoint's task unless given.
        sections: of the recipe.
    """
    model = with_tokenizer(checkpoint, folder)
    tensors_changed(_no_numbers)(model)
    if damage is not None:
        damage(model)
    classifies = checkpoint.name == "bert"
    records = rows or (LABELLED if classifies else TEXTS)
    data = {
        "task": "classification" if classifies else "instructions",
        "validation": str(write_lines(folder / "validation.jsonl", records)),
        **sections.pop("data", {}),
    }
    sections = {
        "masking": {"mode": "shares", "insecure": True},
        "operators": NOBODY,
        **sections,
        "training": {"max_steps": 2, **sections.get("training", {})},
    }
    return recipe_of(folder, model, write_lines(folder / "train.jsonl", records), data=data, **sections)


def found_by_dry_run(recipe: Recipe, resume: bool = False) -> BlindtuneError | None:
    """The error that the dry run ends with."""
    try:
        show_dry_run(recipe, Path("recipe.yaml"), json=False, resume=resume)
    except BlindtuneError as error:
        return error
    return None


def found_by_run(recipe: Recipe) -> BlindtuneError | None:
    """The error that the run ends with."""
    try:
        train_recipe(recipe, Silent())
    except BlindtuneError as error:
        return error
    return None


def found_by_check(recipe: Recipe) -> list[Finding]:
    """The problems that the check finds, in order."""
    return [x for x in check_recipe(recipe) if x.status == "problem"]


def configured(**settings: Any) -> Damage:
    """Changes what config.json says."""
    return lambda model: _change(model / "config.json", settings)


def _change(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def _no_numbers(tensors: dict[str, Any]) -> None:
    for tensor in tensors.values():
        if tensor.dim() > 1:
            tensor.fill_(float("nan"))


def tensors_changed(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Changes the tensors of a checkpoint."""

    def damage(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})

    return damage


def token_added(pads: bool) -> Damage:
    """A tokenizer with more tokens than the embedding has rows, of which one pads."""

    def damage(model: Path) -> None:
        tokenizer = character_tokenizer()
        tokenizer.add_tokens([f"<x{i}>" for i in range(40)])
        if pads:
            tokenizer.add_special_tokens({"pad_token": "<padding>"})
        tokenizer.save_pretrained(model)

    return damage


def only_named(name: str) -> Damage:
    """Git's note in the place of a file."""
    note = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 12345\n"
    return lambda model: (model / name).write_text(note)
