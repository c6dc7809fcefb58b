"""Models and tokenizers of a recipe, and the adapter that a run wrote."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    set_seed,
)

from blindtune.checkpoint import Checkpoint
from blindtune.checkpoint.decoders import decoder_of
from blindtune.checkpoint.files import TensorFiles, require_no_pointer, resolve
from blindtune.checkpoint.joined import tensor_keys
from blindtune.checkpoint.skeleton import supported_config
from blindtune.client import BlindConfig, Operator
from blindtune.client.kit.kit import Kit, is_kit
from blindtune.client.kit.prepare import cached_whole_kit, kit_of
from blindtune.client.model.quantizer import preparing
from blindtune.client.recipe.schema import Recipe
from blindtune.client.training.checkpoints import damage_is_clear
from blindtune.client.trust.adapter_config import CONFIG
from blindtune.errors import CheckpointError, ConfigurationError
from blindtune.protocol.weights import SCHEMES

__all__ = [
    "BaseModel",
    "blind_config",
    "load_tokenizer",
    "require_fitting_head",
    "stored_keys",
    "trained_adapter",
]

_TOKENIZER = ("*.json", "*.model", "vocab*", "merges*", "*.jinja")


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
        precision=masking.precision,
        quantization=recipe.quantization.scheme,
        head=recipe.quantization.head,
        insecure=masking.insecure,
        allow_one_machine=masking.allow_one_machine,
        request_timeout=masking.request_timeout,
        ask_ahead=masking.ask_ahead,
        most_reasks=masking.most_reasks,
        retry_seconds=masking.retry_seconds,
    )


class BaseModel:
    """The base model that a recipe names, from where it was found.

    Attributes:
        folder: of its checkpoint, or its kit.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._recipe = recipe
        self.folder = folder

    @classmethod
    def found(cls, recipe: Recipe) -> Self:
        """Looks for it. Ask once in a run: a branch on the hub may move in between.

        For a quantized checkpoint it is a kit that is made of it at first use.

        Raises:
            CheckpointError: there is no such model.
            ConfigurationError: it has an adapter beside it, or is a kit that someone published.
        """
        folder = resolve(recipe.model.name, recipe.model.revision)
        if os.path.lexists(folder / CONFIG):
            # Loading would put it on the model unasked, or load the model that it names instead of this one.
            raise ConfigurationError(
                f"model.name: {folder} holds an adapter ({CONFIG}): name the base model alone, or what "
                "blindtune merge makes of the two"
            )
        if is_kit(folder) and not Path(recipe.model.name).is_dir():
            raise ConfigurationError(
                f"model.name: {recipe.model.name} is a client kit from the hub, and whoever made it could "
                "have wrong answers pass: name the model that it was made from"
            )
        if not is_kit(folder) and decoder_of(folder) is not None:
            folder = _kit_of_quantized(recipe, folder)
        return cls(recipe, folder)

    def fingerprint(self) -> str:
        """The fingerprint of its frozen layers, from its kit, which is made at first use.

        Raises:
            CheckpointError, KitError, UnsupportedError: the model or its kit can't be read or served.
        """
        scheme = SCHEMES[self._recipe.quantization.scheme]
        return kit_of(self.folder, preparing(self._recipe.model.name), scheme).description.fingerprint

    def tokenizer(self) -> Any:
        """See `load_tokenizer`."""
        return load_tokenizer(self.folder)

    def keys(self) -> list[str]:
        """See `stored_keys`."""
        return stored_keys(self.folder)

    def load(self, labels: Sequence[str], tokenizer: Any, config: BlindConfig | None) -> PreTrainedModel:
        """The model with remote layers, or all of it in this process when there is no ``config``.

        Seeds all random number generators first, since a classification head starts at random.

        Args:
            labels: class names, for classification.

        Raises:
            ConfigurationError: it is a classifier of other classes.
            CheckpointError: the model can't be loaded, or a weight that stays here is not finite.
        """
        recipe = self._recipe
        # Left open, the stock loader asks whether to run a checkpoint's own code, and takes any "y" on stdin.
        options: dict[str, Any] = {"dtype": getattr(torch, recipe.model.dtype), "trust_remote_code": False}
        if config is not None:
            options["quantization_config"] = config
        set_seed(recipe.training.seed)
        if recipe.data.task == "classification":
            require_fitting_head(supported_config(self.folder), labels)
            options |= {
                "num_labels": len(labels),
                "id2label": dict(enumerate(labels)),
                "label2id": {label: i for i, label in enumerate(labels)},
            }
            loader: Any = AutoModelForSequenceClassification
        else:
            loader = AutoModelForCausalLM
        try:
            model: PreTrainedModel = loader.from_pretrained(self.folder, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{recipe.model.name} cannot be loaded for data.task: {recipe.data.task}: "
                f"{' '.join(str(error).split())[:500]}"
            ) from error
        _require_finite(model, recipe.model.name)
        # A classifier finds the last token of a text by it, and so must know what the tokenizer pads with.
        for settings in (
            model.config,
            model.config.get_text_config(),
            getattr(model, "generation_config", None),
        ):
            if settings is not None:
                settings.pad_token_id = tokenizer.pad_token_id
        if not Path(recipe.model.name).is_dir():
            # What the adapter will say that it belongs to: the public name, and not a folder of this machine.
            model.name_or_path = model.config._name_or_path = recipe.model.name
        return model


def _kit_of_quantized(recipe: Recipe, folder: Path) -> Path:
    """A kit that holds numbers where the checkpoint holds codes."""
    checkpoint = Checkpoint.open(folder, scheme=SCHEMES[recipe.quantization.scheme])
    progress = preparing(recipe.model.name)
    return cached_whole_kit(checkpoint, recipe.quantization.head, progress=progress).folder


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model, or of a run's output; it has a padding token.

    Raises:
        CheckpointError: there is none.
    """
    for pattern in _TOKENIZER:
        for path in folder.glob(pattern):
            require_no_pointer(path)
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


def require_fitting_head(config: PretrainedConfig, labels: Sequence[str]) -> None:
    """Refuses a model that was tuned for another number of classes than the data has.

    Raises:
        ConfigurationError: it was. Loading would make its head up, here and not where the adapter is used.
    """
    architecture = next(iter(config.architectures or []), None) or ""
    if architecture.endswith("ForSequenceClassification") and config.num_labels != len(labels):
        raise ConfigurationError(
            f"model.name is a classifier of {config.num_labels} classes, and the data has {len(labels)}: "
            "name the base model that it was tuned from, or data with the same classes"
        )


def _require_finite(model: PreTrainedModel, name: str) -> None:
    for parameter, values in model.named_parameters():
        # The extremes of anything with a NaN are NaN, and take no memory.
        if values.numel() and not all(x.isfinite() for x in values.detach().aminmax()):
            raise CheckpointError(
                f"{parameter} of {name} holds a value that is infinite or no number: the file is damaged; "
                "get the checkpoint again"
            )


def stored_keys(folder: Path) -> list[str]:
    """The keys of all tensors of a checkpoint, or of the one that a kit was made from.

    Raises:
        CheckpointError, KitError: it can't be read.
    """
    with TensorFiles(folder) as tensors:
        keys = list(tensors)
    if not is_kit(folder):
        return keys
    remote = tensor_keys(Kit.open(folder).layers)
    return [*remote, *(x for x in keys if x not in remote)]


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
