"""Reading the public base model, the same way on both sides."""

# Loaded twice, every class and every stock of masks would be there twice.
if not __name__.startswith("blindtune."):
    raise ImportError(f"import this as blindtune.{__name__}")

from blindtune.checkpoint.frozen import Checkpoint
from blindtune.checkpoint.skeleton import FrozenLayer

__all__ = ["Checkpoint", "FrozenLayer"]
