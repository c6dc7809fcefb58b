"""Whose word decides where data goes: this user's, and never that of a folder.

A recipe that the user names is the user's word. One that lies in an output folder may have come from anyone,
so its operators count only if they are trusted ones to the letter, files included, for the same masking.
Whether plaintext or one machine is allowed never comes from there.
"""

from collections.abc import Sequence
from pathlib import Path

from blindtune.client.config.blind_config import Operator
from blindtune.client.kit.kit import is_kit
from blindtune.client.recipe import Recipe, load_operators, load_recipe
from blindtune.client.recipe.schema import MaskingSection
from blindtune.client.trust.trust_list import (
    Circle,
    TrustList,
    are_the_same,
    circle_of,
    enter,
    trust_file,
    trust_list,
)
from blindtune.errors import BlindtuneError, ConfigurationError

__all__ = [
    "are_new",
    "is_output_folder",
    "own_recipe",
    "recipe_of_run",
    "remember_operators",
    "trust_named",
]

RECIPE = "recipe.yaml"
# What only a run or a published adapter leaves beside a recipe.
_OF_A_RUN = ("run.json", "summary.json", "record.jsonl", "adapter_config.json")
_FLAGS = ("insecure", "allow_one_machine")


def is_output_folder(folder: Path) -> bool:
    """Whether a folder holds what a run or a published adapter consists of."""
    return any((folder / name).exists() for name in _OF_A_RUN)


def _is_in_output_folder(path: Path) -> bool:
    return is_output_folder(path.absolute().parent) or is_output_folder(path.resolve().parent)


def own_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """A recipe to act on, which the user names.

    Raises:
        ConfigurationError: see `load_recipe`; or it lies in an output folder, and names operators that are
            not trusted, another output folder, or a key for its record.
    """
    recipe = load_recipe(path, settings)
    if not _is_in_output_folder(path):
        return recipe
    given = _given(settings)
    if recipe.output.dir.resolve() != path.resolve().parent and not given & {"output", "output.dir"}:
        raise ConfigurationError(
            f"{path} lies in the output folder of a run and writes to another one, {recipe.output.dir}: say "
            "where to with --set output.dir=FOLDER"
        )
    if recipe.record.key is not None and not given & {"record", "record.key"}:
        raise ConfigurationError(
            f"{path} lies in an output folder and names the key {recipe.record.key}: name your key yourself, "
            "with --set record.key=FILE"
        )
    return _as_the_user_says(recipe, path, settings, None)


def recipe_of_run(folder: Path, settings: Sequence[str] = (), operators: Path | None = None) -> Recipe:
    """The recipe in an output folder, with operators and permissions of the user's own.

    Args:
        folder: of a run.
        settings: from the command line; ``operators=[...]`` as a whole is the user's word too.
        operators: a file that names other operators, see `load_operators`.

    Raises:
        ConfigurationError: the recipe can't be read, or its operators are not trusted and no others named.
    """
    path = folder / RECIPE
    return _as_the_user_says(load_recipe(path, settings), path, settings, operators)


def remember_operators(recipe: Recipe) -> str | None:
    """Enters the operators that a run has connected to in the user's trust list.

    Returns:
        What there is to say about it.
    """
    kit = Path(recipe.model.name)
    try:
        new = enter(circle_of(recipe.masking.mode, recipe.operators), kit if is_kit(kit) else None)
    except BlindtuneError as error:  # the run goes on: only other commands will want to be told
        return f"warning: eval and generate will need --operators FILE, since these can't be noted: {error}"
    return f"noted in {trust_file()}: eval and generate may use these operators" if new else None


def are_new(recipe: Recipe) -> bool:
    """Whether no run of this user's has used a recipe's operators before.

    Raises:
        ConfigurationError: the trust list or a CA can't be read.
    """
    circle = circle_of(recipe.masking.mode, recipe.operators)
    return not any(are_the_same(circle, x) for x in trust_list().trusted)


def trust_named(path: Path) -> tuple[Circle, bool]:
    """Enters the operators that a recipe or another file names in the user's trust list.

    Returns:
        The operators, and whether they were not there yet.

    Raises:
        ConfigurationError: the file names none that can be used, or the list can't be written.
    """
    operators, masking = load_operators(path)
    for x in operators:
        Operator(x.name, x.workers)  # whose name and addresses can be shown
    mode = "lattice" if len(operators) == 1 else "shares"
    if masking.mode not in ("reference", mode):
        mode = masking.mode
    circle = circle_of(mode, operators)
    return circle, enter(circle)


def _as_the_user_says(recipe: Recipe, path: Path, settings: Sequence[str], operators: Path | None) -> Recipe:
    """A recipe out of a folder, with what it may not decide taken from the user."""
    given = _given(settings)
    used, flags = recipe.operators, dict.fromkeys(_FLAGS, False)
    if operators is not None:
        if any(x.split(".")[0] == "operators" for x in given):
            raise ConfigurationError("give --operators or --set operators, and not both")
        if recipe.masking.mode == "reference":
            raise ConfigurationError("masking reference asks no operators: leave out --operators")
        used, masking = load_operators(operators)
        if not _is_in_output_folder(operators):
            flags = _flags(masking)
    elif recipe.masking.mode == "reference":
        used = []
    else:
        trusted = trust_list()
        flags = _flags(trusted)
        if "operators" not in given and used:
            _require_trusted(recipe, path, trusted)
    if not given & {"model", "model.name"}:
        _require_own_kit(recipe, path)
    flags |= {
        name: getattr(recipe.masking, name) for name in _FLAGS if given & {"masking", f"masking.{name}"}
    }
    masking = recipe.masking.model_copy(update=flags)
    return recipe.model_copy(update={"operators": used, "masking": masking})


def _require_own_kit(recipe: Recipe, path: Path) -> None:
    kit = Path(recipe.model.name)
    if is_kit(kit) and kit not in trust_list().kits:
        raise ConfigurationError(
            f"{path} names the kit {kit}, which no run of yours has used, and whoever made it could have "
            f"wrong answers pass: if it is yours, say so with --set model.name={kit}"
        )


def _require_trusted(recipe: Recipe, path: Path, trusted: TrustList) -> None:
    mode, operators = recipe.masking.mode, recipe.operators
    for x in operators:
        Operator(x.name, x.workers)  # whose name and addresses can be shown
    # A certificate's file is read only where the user has named the very same one.
    named = Circle.model_validate({"masking": mode, "operators": [x.model_dump() for x in operators]})
    alike = [x for x in trusted.trusted if are_the_same(named, x, digests=False)]
    if any(are_the_same(circle_of(mode, operators), x) for x in alike):
        return
    if alike:
        why = "the file of a CA holds another one than when you trusted it"
    elif any({x.name for x in c.operators} == {x.name for x in operators} for c in trusted.trusted):
        why = "you trust operators of these names with other addresses, files or masking"
    else:
        why = "none of your runs has used these"
    raise ConfigurationError(
        f"{path} names operators that you do not trust ({named.shown}): {why}. A folder does not decide who "
        f"gets your requests: name your own with --operators FILE or --set 'operators=[...]', or trust these "
        f"with blindtune trust {path}"
    )


def _flags(section: TrustList | MaskingSection) -> dict[str, bool]:
    return {name: getattr(section, name) for name in _FLAGS}


def _given(settings: Sequence[str]) -> set[str]:
    """The keys that the command line sets."""
    return {x.partition("=")[0].strip() for x in settings}
