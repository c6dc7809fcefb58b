"""What a record says of a configuration in the open: chosen key by key, so that a new key stays out.

Left out are all paths, the labels, the system message, and every text that is not one of a few known words.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from blindtune.client.config.blind_config import BlindConfig, Operator
from blindtune.client.data.prepared import PreparedData, Split
from blindtune.client.recipe import Recipe
from blindtune.client.record.canonical import LARGEST
from blindtune.proto import PROTOCOL_VERSION

__all__ = ["described_operators", "described_run", "described_split"]

_DATA = ("task", "max_length", "train_examples", "validation_examples", "group_by_length")
_MASKING = ("mode", "insecure", "allow_one_machine")
# Arguments whose texts are words of Hugging Face's, and not the user's.
_WORDS = ("optim", "lr_scheduler_type", "eval_strategy", "save_strategy")


def described_run(
    recipe: Recipe, data: PreparedData, config: BlindConfig, fingerprint: str
) -> dict[str, Any]:
    """What the entry ``start`` says of a configuration, its model and its operators."""
    local = Path(recipe.model.name).is_dir()
    said: dict[str, Any] = {
        "protocol": PROTOCOL_VERSION,
        "model": {
            "name": None if local else recipe.model.name,
            "revision": None if local else recipe.model.revision,
            "fingerprint": fingerprint,
            "dtype": recipe.model.dtype,
            **recipe.quantization.model_dump(mode="json", include={"scheme", "head"}),
        },
        "masking": {
            **recipe.masking.model_dump(mode="json", include=set(_MASKING)),
            "parameter_set": recipe.masking.chosen_set,
        },
        "operators": described_operators(config),
        "configuration": {
            "adapter": recipe.adapter.model_dump(mode="json"),
            "data": {
                **recipe.data.model_dump(mode="json", include=set(_DATA)),
                "classes": len(data.labels),
            },
            "training": {
                name: value
                for name, value in recipe.training.model_dump(mode="json").items()
                if isinstance(value, bool | int | float) or (name in _WORDS and isinstance(value, str))
            },
        },
    }
    return {name: _plain(x) for name, x in said.items()}


def described_operators(config: BlindConfig) -> list[dict[str, Any]]:
    """Names and addresses, with the SHA-256 fingerprints of the certificates; none for ``reference``."""
    return [
        {
            "name": _plain(x.name),
            "workers": _plain(list(x.workers)),
            "ca": _certificates(x, "ca"),
            "certificate": _certificates(x, "cert"),
        }
        for x in config.operators
    ]


def described_split(split: Split) -> dict[str, Any]:
    """Counts of a file; how many records it has stands with its commitment."""
    return {
        "format": split.layout,
        "used": len(split.rows),
        "cut_off": split.cut,
        "without_loss": split.dropped,
    }


def _certificates(operator: Operator, kind: str) -> list[str]:
    path = getattr(operator, kind)
    if path is None:
        return []
    found = x509.load_pem_x509_certificates(Path(path).read_bytes())  # `BlindConfig` has read it before
    return [x.fingerprint(hashes.SHA256()).hex() for x in found]


def _plain(value: Any) -> Any:
    """A value that has a canonical form: numbers that have none become texts, and odd characters escapes."""
    if isinstance(value, Mapping):
        return {name.encode("ascii", "backslashreplace").decode(): _plain(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_plain(x) for x in value]
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    too_large = isinstance(value, int) and abs(value) > LARGEST
    return repr(value) if isinstance(value, float) or too_large else value
