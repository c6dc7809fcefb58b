"""The section ``training``: Hugging Face's own `TrainingArguments`, checked before anything is loaded.

The model of the section is made from the fields of the installed release, so that whatever it offers can
be written, a misspelt name is found, and the allowed values of a choice are known. A few fields are left
out, each for a reason that the error message gives.
"""

import dataclasses
import enum
import types
import typing
from typing import Any, Literal, Union

from pydantic import ConfigDict, Field, create_model
from transformers import TrainingArguments

__all__ = ["DEFAULTS", "REFUSED", "TrainingSection"]

_HERE = "nothing is sent to anyone but the workers, so runs are not reported or uploaded"
_ONE_DEVICE = "the client's part of the model runs on one device"
_OURS = "the command decides it"
_PRECISION = "fp16 scales losses by infinities, which masks can't carry: use bf16"

REFUSED: dict[str, str] = {
    "output_dir": "write output.dir instead",
    "resume_from_checkpoint": "use the option --resume instead",
    "train_sampling_strategy": "write data.group_by_length instead",
    "ignore_data_skip": "a resumed run would see other data than one that was never interrupted",
    "save_only_model": "a checkpoint without the optimizer could not be resumed",
    "auto_find_batch_size": "the batch size is part of what makes a run repeatable: set it",
    "gradient_checkpointing_kwargs": "write gradient_checkpointing alone",
    **dict.fromkeys(("report_to", "project", "run_name", "push_to_hub"), _HERE),
    **dict.fromkeys(("fp16", "fp16_full_eval"), _PRECISION),
    **dict.fromkeys(
        ("fsdp", "fsdp_config", "deepspeed", "parallelism_config", "accelerator_config"), _ONE_DEVICE
    ),
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "local_rank", "disable_tqdm", "log_level"), _OURS),
    **dict.fromkeys(("remove_unused_columns", "label_names", "length_column_name", "debug"), _OURS),
    **dict.fromkeys(("batch_eval_metrics", "include_for_metrics", "prediction_loss_only"), _OURS),
    **dict.fromkeys(("eval_do_concat_batches", "eval_use_gather_object", "log_level_replica"), _OURS),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), _OURS),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), _OURS),
    **dict.fromkeys(("activation_checkpointing_kwargs", "restore_callback_states_from_checkpoint"), _OURS),
    **dict.fromkeys(("log_on_each_node", "save_on_each_node", "enable_jit_checkpoint"), _ONE_DEVICE),
}
_REFUSED_FAMILIES = {"hub_": _HERE, "trackio_": _HERE, "ddp_": _ONE_DEVICE}

# Where Hugging Face's default would surprise in a private run.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4,
    "logging_steps": 1,
    "save_steps": 50,
    "save_total_limit": 2,
    "dataloader_pin_memory": False,
}
# Numbers with which a run would fail later, or never end.
_AT_LEAST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 1),
    **dict.fromkeys(("gradient_accumulation_steps", "save_total_limit"), 1),
    **dict.fromkeys(("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "eval_delay"), 0),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor", "dataloader_num_workers"), 0),
    "seed": 0,
    "max_steps": -1,
}
_ABOVE = dict.fromkeys(("num_train_epochs", "adam_epsilon", "eval_steps"), 0)
_BELOW = {**dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), 1), "seed": 2**32}


def _reason(name: str) -> str | None:
    return REFUSED.get(name) or next(
        (why for start, why in _REFUSED_FAMILIES.items() if name.startswith(start)), None
    )


def _accepted(annotation: Any) -> Any:
    """A type as pydantic should check it: of an enumeration or any text, only the enumeration's values."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        members = typing.get_args(annotation)
        choices = [x for x in members if isinstance(x, type) and issubclass(x, enum.Enum)]
        if choices:
            kept = [x for x in members if x is not str and x not in choices]
            values = Literal[tuple(value.value for choice in choices for value in choice)]  # type: ignore[valid-type]
            return Union[(values, *kept)]
    return annotation


def _fields() -> dict[str, Any]:
    hints = typing.get_type_hints(TrainingArguments)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(TrainingArguments):
        if not field.init or _reason(field.name):
            continue
        options: dict[str, Any] = {
            "description": " ".join(str(field.metadata.get("help", "")).split()),
            "ge": _AT_LEAST.get(field.name),
            "gt": _ABOVE.get(field.name),
            "lt": _BELOW.get(field.name),
        }
        if field.name in DEFAULTS:
            value = Field(DEFAULTS[field.name], **options)
        elif field.default is not dataclasses.MISSING:
            default = field.default.value if isinstance(field.default, enum.Enum) else field.default
            value = Field(default, **options)
        else:
            value = Field(default_factory=typing.cast(Any, field.default_factory), **options)
        fields[field.name] = (_accepted(hints[field.name]), value)
    return fields


def refused(name: str) -> str | None:
    """Why a field of `TrainingArguments` can't be set here; None where it can."""
    return _reason(name) if name in {x.name for x in dataclasses.fields(TrainingArguments)} else None


TrainingSection = create_model(
    "TrainingSection",
    __config__=ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False),
    __doc__="How to train: the arguments of Hugging Face's TrainingArguments, under their own names.",
    **_fields(),
)
