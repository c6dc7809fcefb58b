"""The section ``training``: Hugging Face's own `TrainingArguments`, checked before anything is loaded.

The model of the section is made from the fields of the installed release, so that a misspelt name is found
and the allowed values of a choice are known. What each field does in a run here was tried: one that would do
something else than its name says is left out, for a reason that the error message gives, and so is one
that a release of transformers adds, until somebody tried it.
"""

import dataclasses
import enum
import re
import types
import typing
from typing import Annotated, Any, Literal, Union

import transformers
from pydantic import AfterValidator, ConfigDict, Field, create_model, model_validator
from transformers import TrainingArguments

__all__ = ["DEFAULTS", "OFFERED", "REFUSED", "REFUSED_VALUES", "TrainingSection", "refused"]

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

OFFERED = frozenset(
    (
        *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        *("num_train_epochs", "max_steps", "seed", "data_seed", "full_determinism"),
        *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay"),
        *("optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon"),
        *("max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices"),
        *("bf16", "bf16_full_eval", "tf32", "use_cpu", "use_cache", "torch_empty_cache_steps"),
        *("activation_checkpointing", "gradient_checkpointing", "skip_memory_metrics"),
        *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter"),
        *("include_num_input_tokens_seen", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start"),
        *("eval_accumulation_steps", "save_strategy", "save_steps", "save_total_limit"),
        *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
        *("dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_in_order"),
        *("dataloader_persistent_workers", "dataloader_prefetch_factor"),
        *("dataloader_multiprocessing_context",),
    )
)
"""Fields of which it is known what they do here; `blindtune.client.training.effects` tries combinations."""

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

# Fields of which one value would make of a run something else than its recipe says.
REFUSED_VALUES: dict[str, tuple[Any, str]] = {
    "bf16_full_eval": (
        True,
        "the first measurement would turn the adapter itself into bf16: write training.bf16 or model.dtype",
    ),
    "dataloader_in_order": (
        False,
        "batches would come as they are ready, and the run could not be repeated: leave it out",
    ),
}
# name=value pairs, as Hugging Face takes them apart.
_PAIRS = re.compile(r"\s*\w+\s*=[^=,]+(,\s*\w+\s*=[^=,]+)*")


def _reason(name: str) -> str | None:
    known = REFUSED.get(name) or next(
        (why for start, why in _REFUSED_FAMILIES.items() if name.startswith(start)), None
    )
    if known is None and name not in OFFERED:
        return f"it is new in transformers {transformers.__version__}, and untried here: leave it out"
    return known


def _pairs(value: str | None) -> str | None:
    if value is not None and not _PAIRS.fullmatch(value):
        raise ValueError("expected name=value, with commas between several")
    return value


def _expression(value: Any) -> Any:
    if isinstance(value, str):
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{value[:100]!r} is no regular expression: {error}") from None
    return value


def _not(refused: Any, why: str) -> AfterValidator:
    def check(value: Any) -> Any:
        if value == refused:
            raise ValueError(f"{str(value).lower()} can't be set: {why}")
        return value

    return AfterValidator(check)


_VALIDATORS = {
    "optim_args": AfterValidator(_pairs),
    "optim_target_modules": AfterValidator(_expression),
    **{name: _not(*refusal) for name, refusal in REFUSED_VALUES.items()},
}


def _one_value(section: Any) -> Any:
    older, newer = (getattr(section, f"{x}_checkpointing", None) for x in ("gradient", "activation"))
    if older is not None and newer is not None and older != newer:
        raise ValueError(
            "training.gradient_checkpointing and training.activation_checkpointing are two names of one "
            "setting, with two values: leave one out"
        )
    return section


_COMBINATIONS: dict[str, Any] = {"one_value": model_validator(mode="after")(_one_value)}


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
        accepted = _accepted(hints[field.name])
        if field.name in _VALIDATORS:
            accepted = Annotated[accepted, _VALIDATORS[field.name]]
        fields[field.name] = (accepted, value)
    return fields


def refused(name: str) -> str | None:
    """Why a field of `TrainingArguments` can't be set here; None where it can."""
    return _reason(name) if name in {x.name for x in dataclasses.fields(TrainingArguments)} else None


TrainingSection = create_model(
    "TrainingSection",
    __config__=ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False),
    __validators__=_COMBINATIONS,
    __doc__="How to train: the arguments of Hugging Face's TrainingArguments, under their own names.",
    **_fields(),
)
