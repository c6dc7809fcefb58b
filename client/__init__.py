"""The client: everything private happens here.

From the ground up; a room imports only what stands above it:

    process, tls         this process, and certificates
    kit                  what is known of layers that are elsewhere
    config               what users write
    operators            workers: asked, verified, and asked again
    rounds               masked products
    model                a Hugging Face model that asks for them
    recipe, data         what a run is, and its tokens
    trust                whose word counts
    record               the signed record of a run
    training             the trainer, and all that decides what a step computes
    plan                 what it will cost
    preflight            what would go wrong
    runs                 from a recipe to an adapter
    merge, audit, demo   an adapter in its base model; attacks; the demonstration
    cli                  the command
"""

# Loaded twice, every class and every stock of masks would be there twice.
if not __name__.startswith("blindtune."):
    raise ImportError(f"import this as blindtune.{__name__}")

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blindtune.client.config.blind_config import BlindConfig, Operator
    from blindtune.client.model.quantizer import BlindQuantizer, multiplier_of

__all__ = ["BlindConfig", "BlindQuantizer", "Operator", "multiplier_of"]


def __getattr__(name: str) -> Any:
    # Looked up at first use, so that the command starts fast and sets its environment before libraries load.
    # All of them come with the quantizer, since a configuration is of no use before that is registered.
    if name in __all__:
        return getattr(import_module("blindtune.client.model.quantizer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
