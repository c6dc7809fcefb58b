"""A training run small enough to be simulated thousands of times.

An adapter A in front of two layer groups, and the squared error of all their outputs. Micro-batches may
run side by side, as they do in a real run. The state after each step is all that a checkpoint holds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blindtune.client.kit.kit import Kit
from blindtune.client.model.layer_group import LayerGroup
from blindtune.client.rounds.multiplier import PrivateMultiplier

__all__ = ["GROUPS", "Job", "State", "train"]

GROUPS = (
    tuple(f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"),
    tuple(f"model.layers.0.mlp.{x}_proj.weight" for x in ("gate", "up")),
)
_WIDTH = 32
_RATE = np.float32(0.01)

Float32 = NDArray[np.float32]
Together = Callable[[Sequence[Callable[[], Any]]], list[Any]]
"""Runs functions, at the same time or not, and returns their values in order."""


@dataclass(frozen=True)
class Job:
    """What is trained.

    Attributes:
        steps: how many.
        micro_batches: of each step.
        rows: of each micro-batch.
        data: seed of the data.
    """

    steps: int
    micro_batches: int
    rows: int
    data: int

    def batch(self, step: int, part: int) -> tuple[Float32, Float32]:
        """Inputs [rows, 32] and the targets' constant [1]."""
        generator = np.random.default_rng((self.data, step, part))
        x = generator.standard_normal((self.rows, _WIDTH)).astype(np.float32)
        if not generator.integers(4):
            x[0] = 0.0  # a padding token's gradient
        return x, generator.standard_normal(1).astype(np.float32)


@dataclass(frozen=True)
class State:
    """A checkpoint.

    Attributes:
        step: how many were done.
        adapter: bytes of the adapter.
    """

    step: int
    adapter: bytes

    @classmethod
    def first(cls) -> "State":
        """Before the first step."""
        return cls(0, (np.eye(_WIDTH, dtype=np.float32) / 2).tobytes())


def train(
    job: Job,
    kit: Kit,
    multiplier: PrivateMultiplier,
    state: State,
    save: Callable[[State], None],
    together: Together = lambda functions: [function() for function in functions],
) -> None:
    """Goes on from a state to the end."""
    groups = [LayerGroup(names, kit, multiplier) for names in GROUPS]
    adapter = np.frombuffer(state.adapter, np.float32).reshape(_WIDTH, _WIDTH).copy()
    for step in range(state.step, job.steps):

        def gradient(part: int, step: int = step, adapter: Float32 = adapter) -> Float32:
            x, target = job.batch(step, part)
            hidden = x @ adapter
            back = np.zeros_like(x)
            for number, group in enumerate(groups):
                outputs = group.forward(hidden)
                errors: list[Float32 | None] = [(y - target) * np.float32(0.1) for y in outputs]
                if number == 0 and job.rows % 2:
                    errors[1] = None  # as where an output is not used
                back += group.backward(errors)
            return x.T @ back

        parts = together([lambda part=part: gradient(part) for part in range(job.micro_batches)])
        adapter = adapter - _RATE * sum(parts[1:], parts[0])
        save(State(step + 1, adapter.tobytes()))
