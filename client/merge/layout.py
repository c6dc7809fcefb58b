"""Which tensors a merged checkpoint holds, and what each of them starts from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from blindtune.checkpoint.files import TensorFiles
from blindtune.checkpoint.joined import Rows
from blindtune.checkpoint.skeleton import absent_parameters, converted_parameters, row_ranges
from blindtune.client.merge.adapter import Changes
from blindtune.errors import CheckpointError, UnsupportedError

__all__ = ["Output", "check_complete", "layout", "untied_parameters"]

_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Output:
    """A tensor to be written.

    Attributes:
        key: its name in the merged checkpoint.
        source: the key in the base checkpoint that it starts from; None for one that the base lacks.
        parameter: its name in the model.
        parts: the parameters whose rows it is instead, in their order.
    """

    key: str
    source: str | None
    parameter: str
    parts: Mapping[str, Rows] = field(default_factory=dict)


def untied_parameters(model: PreTrainedModel, changes: Changes, stored: dict[str, str]) -> dict[str, str]:
    """Parameters that are another one's alias in the base and no longer are: alias -> base's parameter.

    Aliases that remain are struck from the changes and from what is stored: the other one says it all.

    Raises:
        UnsupportedError: they are no embedding and output head, and can't be stored apart.
    """
    untied = {}
    head = model.get_output_embeddings()
    heads = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    for alias, parameter in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        if alias not in changes and parameter not in changes:
            continue
        if changes.keep_ties or _equal(changes, alias, parameter):
            changes.drop(alias)
            stored.pop(alias, None)
            continue
        if alias not in heads or parameter not in stored:
            raise UnsupportedError(
                f"the adapter changes {alias} or {parameter}, which are one tensor in {type(model).__name__} "
                "and cannot be stored apart: train without them"
            )
        untied[alias] = parameter
    return untied


def _equal(changes: Changes, alias: str, parameter: str) -> bool:
    """Whether two parameters are replaced by the same values."""
    one, other = changes.replaced.get(alias), changes.replaced.get(parameter)
    if one is None or other is None or {alias, parameter} & changes.deltas.keys():
        return False
    return torch.equal(one, other)


def check_complete(
    tensors: TensorFiles,
    model: PreTrainedModel,
    changes: Changes,
    stored: dict[str, str],
    untied: dict[str, str],
) -> None:
    """Refuses a merged model with parameters that loading would have to make up.

    Raises:
        CheckpointError: neither base nor adapter holds a parameter.
        UnsupportedError: the base stores a changed parameter in a form that is not known here.
    """
    base = tensors.folder
    if converted := converted_parameters(model, tensors) & (changes.deltas.keys() | changes.replaced.keys()):
        raise UnsupportedError(
            f"the adapter changes {min(converted)}, which {base} stores in another form than the model has "
            "it: merge it with merge_and_unload of PEFT, on a machine that holds the whole model"
        )
    known = stored.keys() | row_ranges(model, tensors).keys() | changes.replaced.keys() | untied.keys()
    for name in changes.deltas:
        if name not in known:
            raise CheckpointError(
                f"the adapter adds to {name}, but {base} does not store it: name the checkpoint that the "
                "adapter was trained on"
            )
    if model.base_model is model:
        return  # its outputs are features, and what it lacks, such as a pooler, is not among them as a rule
    for name in absent_parameters(model, tensors):
        if name not in known:
            raise CheckpointError(
                f"neither {base} nor the adapter holds {name}, which was random while the adapter was "
                "trained: train again with its module in modules_to_save"
            )


def layout(
    model: PreTrainedModel,
    changes: Changes,
    tensors: TensorFiles,
    stored: dict[str, str],
    untied: dict[str, str],
    left_out: set[str],
) -> dict[str, list[Output]]:
    """What goes into each weight file, by its name.

    Args:
        model: the model that the adapter belongs to.
        changes: what the adapter makes of its parameters.
        tensors: of the base checkpoint.
        stored: parameter -> key in the base checkpoint.
        untied: the result of `untied_parameters`.
        left_out: keys of the base that the model has no place for.
    """
    parameters = {key: name for name, key in stored.items()}
    joined = row_ranges(model, tensors)
    parts: dict[str, dict[str, Rows]] = {}
    for name, rows in sorted(joined.items(), key=lambda item: item[1].start):
        parts.setdefault(rows.key, {})[name] = rows
    shards: dict[str, list[Output]] = {}
    for path in tensors.paths():
        outputs = []
        for key in tensors.keys_of(path):
            name = parameters.get(key, key)
            # A checkpoint of the bare base model lacks this prefix; beside a head, loading wants it.
            prefixed = name == f"{model.base_model_prefix}.{key}"
            if key not in left_out:
                outputs.append(Output(name if prefixed else key, key, name, parts.get(key, {})))
            outputs += [
                Output(alias, key, alias)
                for alias, parameter in untied.items()
                if alias not in stored and stored[parameter] == key
            ]
        if outputs:
            shards[_file_name(path)] = outputs
    added = sorted(changes.replaced.keys() - stored.keys() - joined.keys() - untied.keys())
    shards[list(shards)[-1]] += [Output(name, None, name) for name in added]
    return shards if len(shards) > 1 else dict(zip([_SINGLE], shards.values(), strict=True))


def _file_name(path: Path) -> str:
    if path.suffix != ".bin":
        return path.name
    return f"{path.stem.replace('pytorch_model', 'model')}.safetensors"
