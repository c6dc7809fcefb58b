"""Private LoRA fine-tuning on GPUs that you don't trust.

    from blindtune import BlindConfig, Operator

    alpha = Operator("alpha", ["alpha.example:7100"], ca=..., cert=..., key=...)
    config = BlindConfig(operators=[alpha, beta])
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=config)

The rest of the script is that of any LoRA fine-tuning with peft and transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blindtune.client import BlindConfig, Operator, multiplier_of
    from blindtune.errors import BlindtuneError

__all__ = ["BlindConfig", "BlindtuneError", "Operator", "multiplier_of"]

_HOMES = {
    "BlindConfig": "blindtune.client",
    "BlindtuneError": "blindtune.errors",
    "Operator": "blindtune.client",
    "multiplier_of": "blindtune.client",
}


def __getattr__(name: str) -> Any:
    # Looked up at first use, so that a worker never imports the client.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
