"""Reading the public base model, the same way on both sides."""

from blindtune.checkpoint.frozen import Checkpoint
from blindtune.checkpoint.skeleton import FrozenLayer

__all__ = ["Checkpoint", "FrozenLayer"]
