"""The fresh adapter of a run: LoRA on what the recipe names, and whole modules where there is no base.

What a checkpoint lacks, such as a classifier's head or an encoder's pooler, is made up at random when the
model is loaded, and differently wherever the adapter is loaded later. So it is trained whole and saved with
the adapter.
"""

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from blindtune.checkpoint.skeleton import absent_parameters
from blindtune.client.model.remote_linear import RemoteLinear
from blindtune.client.recipe.schema import AdapterSection, Recipe
from blindtune.errors import CheckpointError, ConfigurationError

__all__ = ["fresh_modules", "new_adapter"]

_TASK_TYPES = {"instructions": "CAUSAL_LM", "classification": "SEQ_CLS"}
_ALL_LINEAR = "all-linear"
# PEFT trains these whole for a SEQ_CLS task, and every module whose name ends like this.
_HEADS = ("classifier", "score")


def fresh_modules(model: PreTrainedModel, keys: Iterable[str]) -> list[str]:
    """The modules of a model that a checkpoint says nothing of, the outermost ones.

    Args:
        model: on any device.
        keys: of all tensors in the checkpoint, those that stay with the workers included.

    Raises:
        CheckpointError: what it lacks belongs to a block, or to no module that could be trained whole.
    """
    absent = set(absent_parameters(model, keys))
    parameters = [name for name, _ in model.named_parameters()]
    base = "" if model.base_model is model else f"{model.base_model_prefix}."
    modules = []
    for name in (x for x in parameters if x in absent):
        if name.startswith(base) and _numbered(name):
            raise CheckpointError(
                f"the checkpoint lacks {name}, which is part of one of its blocks: it is damaged, or of "
                "another architecture than its config.json says; get it again"
            )
        owner = name.rpartition(".")[0]
        # Outwards, as long as nothing in there is known.
        while "." in owner and set(_inside(owner.rpartition(".")[0], parameters)) <= absent:
            owner = owner.rpartition(".")[0]
        known = [x for x in _inside(owner, parameters) if x not in absent]
        if not owner or any(map(_numbered, known)):
            raise CheckpointError(
                f"the checkpoint lacks {name}, which would be random, and cannot be trained by itself: take "
                "a checkpoint that holds it"
            )
        modules.append(owner)
    return list(dict.fromkeys(modules))


def _numbered(name: str) -> bool:
    return any(x.isdigit() for x in name.split("."))


def _inside(module: str, parameters: Sequence[str]) -> list[str]:
    return [x for x in parameters if x.startswith(f"{module}.")]


def new_adapter(
    base: PreTrainedModel,
    recipe: Recipe,
    keys: Iterable[str],
    remote: Collection[str] | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> PeftModel:
    """A fresh adapter on a base model, the same for the same seed.

    Args:
        base: the model; it is modified.
        keys: of all tensors in its checkpoint; see `fresh_modules`.
        remote: names of the layers whose weights stay with the workers; by default the model's remote layers.
        say: is told what is trained whole since the checkpoint lacks it, a classifier's head aside.

    Raises:
        ConfigurationError: PEFT refuses the section, or a name in it matches nothing.
        CheckpointError: see `fresh_modules`.
    """
    section = recipe.adapter
    names = [name for name, _ in base.named_modules(remove_duplicate=False) if name]
    if remote is None:
        remote = [name for name, module in base.named_modules() if isinstance(module, RemoteLinear)]
    _require_modules(section, names)
    task = _TASK_TYPES[recipe.data.task]
    fresh = fresh_modules(base, keys)
    if more := [x for x in fresh if x not in _HEADS]:
        say(f"not in the checkpoint, so trained whole and saved with the adapter: {', '.join(more)}")
    wanted = [*(section.modules_to_save or ()), *fresh]
    saved = _trained_whole(names, [*wanted, *(_HEADS if task == "SEQ_CLS" else ())])
    for module in saved:
        if hidden := [x for x in remote if x == module or x.startswith(f"{module}.")]:
            raise ConfigurationError(
                f"adapter.modules_to_save names {module}, and the weight of {hidden[0]} stays with the "
                "workers, so it cannot be trained whole: name it in adapter.target_modules"
            )
    options = section.model_dump() | {"modules_to_save": saved or None}
    if section.layers_to_transform is not None:
        options |= _in_layers(section, base, names)
    try:
        lora = LoraConfig(task_type=task, revision=recipe.model.revision, **options)
        set_seed(recipe.training.seed)
        model = get_peft_model(base, lora)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"adapter: {' '.join(str(error).split())}") from None
    _require_patterns(section, model.base_model.targeted_module_names)
    for config in model.peft_config.values():
        _put_sets_in_order(config)
    return model


def _put_sets_in_order(config: PeftConfig) -> None:
    """Makes lists of a configuration's sets, whose order in its file would differ from process to process."""
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))


def _trained_whole(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The whole names of modules that PEFT will train whole, so that it puts no LoRA on any of them as well.

    It looks for names that end so, in the middle of a word too: ``pre_classifier`` for ``classifier``.
    """
    found = [name for name in names if name.endswith(tuple(wanted))] if wanted else []
    return [x for x in found if not any(x.startswith(f"{y}.") for y in found)]


def _in_layers(section: AdapterSection, base: PreTrainedModel, names: Sequence[str]) -> dict[str, Any]:
    """``target_modules`` and ``layers_to_transform`` as PEFT takes them.

    It takes the latter only together with a list of names, so what one word or an expression names is
    written out.
    """
    wanted = section.layers_to_transform or []
    numbers = {name: number for name in names if (number := _block(name)) is not None}
    if unknown := sorted(set(wanted) - set(numbers.values())):
        blocks = len(set(numbers.values()))
        raise ConfigurationError(
            f"adapter.layers_to_transform names block {unknown[0]}, and the model has {blocks} blocks, from "
            f"0 to {blocks - 1}"
        )
    targets = section.target_modules
    if not isinstance(targets, str):
        return {}
    linear = [name for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    matching = linear if targets == _ALL_LINEAR else [x for x in names if re.fullmatch(targets, x)]
    chosen = [name for name in matching if numbers.get(name) in wanted]
    if not chosen:
        raise ConfigurationError(
            "adapter: no layer is in adapter.target_modules and in adapter.layers_to_transform"
        )
    return {"target_modules": chosen, "layers_to_transform": None}


def _block(name: str) -> int | None:
    """The number of the block that a module is in, as PEFT reads it."""
    match = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", f".{name}.")
    return None if match is None else int(match["idx"])


def _require_modules(section: AdapterSection, names: Sequence[str]) -> None:
    """Refuses names of modules that the model does not have: PEFT passes over them."""
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        given = getattr(section, key)
        if isinstance(given, str):
            if given != _ALL_LINEAR and not any(re.fullmatch(given, x) for x in names):
                raise ConfigurationError(
                    f"adapter.{key}: no module's whole name matches the expression {given!r}; for names, "
                    "write a list"
                )
            continue
        for wanted in given or ():
            if not any(x == wanted or x.endswith(f".{wanted}") for x in names):
                raise ConfigurationError(
                    f"adapter.{key} names {wanted!r}, and the model has no such module: correct it, or "
                    "leave it out"
                )


def _require_patterns(section: AdapterSection, targets: Sequence[str]) -> None:
    """Refuses patterns that match no layer with an adapter."""
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(section, key):
            if not any(re.match(rf"(.*\.)?({pattern})$", x) for x in targets):
                raise ConfigurationError(
                    f"adapter.{key} names {pattern!r}, which is no layer that gets an adapter: correct it, "
                    "or leave it out"
                )
