"""Whose word decides where data goes: this user's, and never that of a folder.

    FOLDER/operators.yaml      FOLDER being the user's own, see `blindtune.client.settings`

    insecure: false            written by hand, if at all; so is allow_one_machine
    trusted:                   operators that runs of this user's own recipes have used, together
      - masking: shares
        operators: [{name, workers, ca, cert, key, token, ca_sha256}, ...]

A recipe that the user names is the user's word. One that lies in an output folder may have come from anyone,
so its operators count only if they are the trusted ones to the letter, files included, for the same masking:
operators that do not collude are a set. Whether plaintext or one machine is allowed never comes from there.
"""

import hashlib
import os
import stat
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from pydantic import Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from blindtune.client.config import Operator
from blindtune.client.disk import disk_errors_are_clear, file_written_at_once
from blindtune.client.recipe import Recipe, load_operators, load_recipe
from blindtune.client.recipe.schema import MaskingSection, OperatorSection, Section
from blindtune.client.settings import settings_folder
from blindtune.client.tls_files import public_keys
from blindtune.protocol.errors import BlindtuneError, ConfigurationError

__all__ = [
    "is_output_folder",
    "own_recipe",
    "recipe_of_run",
    "remember_operators",
    "trust_file",
    "trust_named",
]

RECIPE = "recipe.yaml"
# What only a run or a published adapter leaves beside a recipe.
_OF_A_RUN = ("run.json", "summary.json", "record.jsonl", "adapter_config.json")
_FLAGS = ("insecure", "allow_one_machine")
_HEADER = """\
# Operators that runs of your own recipes have used. blindtune train adds to them, and blindtune trust does.
# eval and generate of an output folder, and train of the recipe in one, ask no others: delete what you no
# longer trust. Trials may have insecure: true or allow_one_machine: true here; nothing is private then.
"""


class TrustedOperator(OperatorSection):
    """An operator as it was used."""

    ca_sha256: str | None = None


class Circle(Section):
    """Operators that were used together, and how."""

    masking: Literal["shares", "lattice"]
    operators: list[TrustedOperator]

    @property
    def shown(self) -> str:
        """Who they are, for messages."""
        return "; ".join(f"{x.name} at {', '.join(x.workers)}" for x in self.operators)


class TrustList(Section):
    """The content of ``operators.yaml``."""

    insecure: bool = False
    allow_one_machine: bool = False
    trusted: list[Circle] = Field(default_factory=list)


def trust_file() -> Path:
    """Where the trusted operators stand."""
    return settings_folder() / "operators.yaml"


def is_output_folder(folder: Path) -> bool:
    """Whether a folder holds what a run or a published adapter consists of."""
    return any((folder / name).exists() for name in _OF_A_RUN)


def own_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """A recipe to act on, which the user names.

    Raises:
        ConfigurationError: see `load_recipe`; or it lies in an output folder, and names operators that are
            not trusted, another output folder, or a key for its record.
    """
    recipe = load_recipe(path, settings)
    beside = {path.absolute().parent, path.resolve().parent}
    if not any(is_output_folder(x) for x in beside):
        return recipe
    given = _given(settings)
    if recipe.output.dir.resolve() not in beside and not given & {"output", "output.dir"}:
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
    try:
        new = _remember(_circle_of(recipe.masking.mode, recipe.operators))
    except (BlindtuneError, OSError) as error:  # the run goes on: only other commands will want to be told
        return f"warning: eval and generate will need --operators FILE, since these can't be noted: {error}"
    return f"noted in {trust_file()}: eval and generate may use these operators" if new else None


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
    circle = _circle_of(mode, operators)
    return circle, _remember(circle)


def _circle_of(masking: str, operators: Sequence[OperatorSection]) -> Circle:
    return Circle.model_validate(
        {
            "masking": masking,
            "operators": [{**x.model_dump(), "ca_sha256": _ca_digest(x)} for x in operators],
        }
    )


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
        if not is_output_folder(operators.resolve().parent):
            flags = _flags(masking)
    elif recipe.masking.mode == "reference":
        used = []
    else:
        trusted = _trust_list()
        flags = _flags(trusted)
        if "operators" not in given:
            _require_trusted(recipe, path, trusted)
    flags |= {
        name: getattr(recipe.masking, name) for name in _FLAGS if given & {"masking", f"masking.{name}"}
    }
    masking = recipe.masking.model_copy(update=flags)
    return recipe.model_copy(update={"operators": used, "masking": masking})


def _require_trusted(recipe: Recipe, path: Path, trusted: TrustList) -> None:
    mode, operators = recipe.masking.mode, recipe.operators
    for x in operators:
        Operator(x.name, x.workers)  # whose name and addresses can be shown
    # A certificate's file is read only where the user has named the very same one.
    named = Circle.model_validate({"masking": mode, "operators": [x.model_dump() for x in operators]})
    alike = [x for x in trusted.trusted if _same(named, x, digests=False)]
    if any(_same(_circle_of(mode, operators), x) for x in alike):
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


def _remember(circle: Circle) -> bool:
    """Whether operators were not in the user's trust list yet, where they are from now on."""
    path = trust_file()
    with disk_errors_are_clear(path.parent):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock"), mode=0o600):
            if any(_same(circle, x) for x in _trust_list().trusted):
                return False
            document = YAML(typ="rt").load(path.read_bytes()) if path.exists() else None
            if document is None:
                document = YAML(typ="rt").load(_HEADER + "trusted: []\n")
                document["trusted"] = []
            entry = circle.model_dump(mode="json", exclude_none=True)
            document["trusted"] = [*(document.get("trusted") or []), entry]
            text = StringIO()
            YAML(typ="rt").dump(document, text)
            file_written_at_once(path, lambda file: file.write(text.getvalue().encode()))
    return True


def _same(one: Circle, other: Circle, digests: bool = True) -> bool:
    def plain(circle: Circle) -> list[dict[str, Any]]:
        dumped = [x.model_dump(exclude=set() if digests else {"ca_sha256"}) for x in circle.operators]
        return sorted(({**x, "workers": sorted(x["workers"])} for x in dumped), key=lambda x: x["name"])

    return one.masking == other.masking and plain(one) == plain(other)


def _flags(section: TrustList | MaskingSection) -> dict[str, bool]:
    return {name: getattr(section, name) for name in _FLAGS}


def _given(settings: Sequence[str]) -> set[str]:
    """The keys that the command line sets."""
    return {x.partition("=")[0].strip() for x in settings}


def _ca_digest(operator: OperatorSection) -> str | None:
    """SHA-256 over the public keys of an authority; None without one."""
    if operator.ca is None:
        return None
    keys = sorted(set(public_keys(operator.ca, operator.name)))
    return hashlib.sha256(b"".join(hashlib.sha256(x).digest() for x in keys)).hexdigest()


def _trust_list() -> TrustList:
    """The user's trust list; empty where there is none."""
    path = trust_file()
    try:
        with open(path, "rb") as file:
            state = os.fstat(file.fileno())
            content = file.read()
    except FileNotFoundError:
        return TrustList()
    except OSError as error:
        raise ConfigurationError(f"cannot read your trusted operators {path}: {error.strerror}") from None
    if stat.S_IMODE(state.st_mode) & 0o022 or state.st_uid not in (os.geteuid(), 0):
        raise ConfigurationError(
            f"{path} decides who gets your data, and others can write to it: look through it, and make it "
            "yours alone with chmod 600 and chown"
        )
    try:
        document = YAML(typ="safe", pure=True).load(content) or {}
        return TrustList.model_validate(document)
    except (ValidationError, YAMLError, ValueError, RecursionError) as error:
        first = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else None
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else "this is no YAML"
        raise ConfigurationError(f"{path}: {what}: correct it, or delete it and trust anew") from None
