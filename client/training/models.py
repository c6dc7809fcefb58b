"""Models, tokenizers and adapters of a recipe."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    set_seed,
)

from blindtune.checkpoint.files import resolve
from blindtune.client import BlindConfig, Operator
from blindtune.client.prepare import kit_of
from blindtune.client.quantizer import preparing
from blindtune.client.recipe.schema import Recipe
from blindtune.client.training.checkpoints import damage_is_clear
from blindtune.protocol.errors import CheckpointError, ConfigurationError

__all__ = [
    "base_fingerprint",
    "base_folder",
    "blind_config",
    "load_base",
    "load_tokenizer",
    "new_adapter",
    "trained_adapter",
]

_TASK_TYPES = {"instructions": "CAUSAL_LM", "classification": "SEQ_CLS"}


def blind_config(recipe: Recipe) -> BlindConfig:
    """How a recipe's operators are reached.

    Raises:
        ConfigurationError: they can't serve the chosen masking, or their TLS files are wrong.
    """
    masking = recipe.masking
    # With masking reference nobody is asked, and the same file may name operators for later.
    asked = [] if masking.mode == "reference" else recipe.operators
    return BlindConfig(
        operators=[Operator(x.name, x.workers, x.ca, x.cert, x.key, x.token) for x in asked],
        masking=masking.mode,
        parameter_set=masking.parameter_set,
        head=recipe.quantization.head,
        insecure=masking.insecure,
        allow_one_machine=masking.allow_one_machine,
        request_timeout=masking.request_timeout,
        ask_ahead=masking.ask_ahead,
        retry_seconds=masking.retry_seconds,
    )


def base_folder(recipe: Recipe) -> Path:
    """Where a recipe's base model is. Ask once in a run: a branch on the hub may move in between.

    Raises:
        CheckpointError: there is no such model.
    """
    return resolve(recipe.model.name, recipe.model.revision)


def base_fingerprint(recipe: Recipe, folder: Path) -> str:
    """The fingerprint of the base model's frozen layers, from its kit, which is made at first use.

    Args:
        folder: from `base_folder`.

    Raises:
        CheckpointError, KitError, UnsupportedError: the model or its kit can't be read or served.
    """
    return kit_of(folder, preparing(recipe.model.name)).description.fingerprint


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model, or of a run's output; it has a padding token.

    Raises:
        CheckpointError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} has no usable tokenizer: {' '.join(str(error).split())}") from None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise CheckpointError(
                f"the tokenizer in {folder} has no token to pad with and none that ends a text"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    recipe: Recipe, folder: Path, labels: Sequence[str], tokenizer: Any, config: BlindConfig | None
) -> PreTrainedModel:
    """The base model with remote layers, or all of it in this process when there is no ``config``.

    Seeds all random number generators first, since a classification head starts at random.

    Args:
        folder: from `base_folder`.
        labels: class names, for classification.
    """
    # Left open, the stock loader asks whether to run a checkpoint's own code, and takes any "y" on stdin.
    options: dict[str, Any] = {"dtype": getattr(torch, recipe.model.dtype), "trust_remote_code": False}
    if config is not None:
        options["quantization_config"] = config
    set_seed(recipe.training.seed)
    if recipe.data.task == "classification":
        options |= {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
        }
        loader: Any = AutoModelForSequenceClassification
    else:
        loader = AutoModelForCausalLM
    try:
        model: PreTrainedModel = loader.from_pretrained(folder, **options)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{recipe.model.name} cannot be loaded for data.task: {recipe.data.task}: "
            f"{' '.join(str(error).split())[:500]}"
        ) from error
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if not Path(recipe.model.name).is_dir():
        # What the adapter will say that it belongs to: the public name, and not a folder of this machine.
        model.name_or_path = model.config._name_or_path = recipe.model.name
    return model


def new_adapter(base: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """A fresh adapter on a base model, the same for the same seed.

    Raises:
        ConfigurationError: PEFT refuses the section.
    """
    section = recipe.adapter.model_dump()
    try:
        lora = LoraConfig(task_type=_TASK_TYPES[recipe.data.task], revision=recipe.model.revision, **section)
        set_seed(recipe.training.seed)
        model = get_peft_model(base, lora)
    except ValueError as error:
        raise ConfigurationError(f"adapter: {' '.join(str(error).split())}") from None
    for config in model.peft_config.values():
        _put_sets_in_order(config)
    return model


def _put_sets_in_order(config: PeftConfig) -> None:
    """Makes lists of a configuration's sets, whose order in its file would differ from process to process."""
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))


def trained_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """A base model with the adapter that a run wrote.

    Raises:
        ConfigurationError: the folder holds none.
        CheckpointError: it is damaged.
    """
    if not all((folder / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors")):
        raise ConfigurationError(
            f"{folder} holds no adapter: train one with blindtune train, or name another folder"
        )
    with damage_is_clear(folder):
        return PeftModel.from_pretrained(base, folder)
