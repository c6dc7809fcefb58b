"""Reading the public base model, the same way on both sides."""

if not __name__.startswith("blindtune."):  # loaded twice, there would be two stocks of masks
    raise ImportError(f"import this as blindtune.{__name__}")

from blindtune.checkpoint.frozen import Checkpoint
from blindtune.checkpoint.skeleton import FrozenLayer

__all__ = ["Checkpoint", "FrozenLayer"]
