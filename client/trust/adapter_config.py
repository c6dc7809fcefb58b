"""What ``adapter_config.json`` may say in a folder that came from elsewhere.

PEFT acts on many settings: other kinds of adapters load files of other names, and some settings name modules
to import. Those of plain LoRA may have any value here; every other one must be as LoRA's default has it.
"""

import json
from pathlib import Path
from typing import Any

from peft import LoraConfig

from blindtune.errors import CheckpointError, UnsupportedError

__all__ = ["CONFIG", "read_plain_lora", "require_plain_lora"]

CONFIG = "adapter_config.json"
_ANY_VALUE = {
    "alpha_pattern",
    "auto_mapping",  # followed by AutoPeftModel alone, which is not used here
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "modules_to_save",
    "peft_version",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}
# Each of these initialises the adapter alone, and is loaded over; others change the base weights as well.
_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")


def read_plain_lora(folder: Path) -> dict[str, Any]:
    """The settings of an adapter's folder.

    Raises:
        CheckpointError: the file is missing or damaged.
        UnsupportedError: it is no plain LoRA adapter.
    """
    path = folder / CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = settings["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}): restore it") from None
    if kind != "LORA":
        raise UnsupportedError(f"{path} is of a {str(kind)[:40]} adapter, and only plain LoRA is used here")
    default = LoraConfig().to_dict()
    for name, value in settings.items():
        if name in _ANY_VALUE or name == "peft_type":
            continue
        plain = (
            value in _INITIALISATIONS if name == "init_lora_weights" else _is_off(value, default.get(name))
        )
        if not plain:
            raise UnsupportedError(
                f"{path} sets {name[:60]}, which is more than plain LoRA: use an adapter without it"
            )
    return dict(settings)


def require_plain_lora(folder: Path) -> None:
    """Checks that a folder's adapter, if it has one, is plain LoRA; see `read_plain_lora`."""
    if (folder / CONFIG).exists():
        read_plain_lora(folder)


def _is_off(value: Any, default: Any) -> bool:
    """Whether a setting is as without it; one that this PEFT does not know must be empty."""
    return bool(value == default) or value is None or value is False or value in ({}, [])
