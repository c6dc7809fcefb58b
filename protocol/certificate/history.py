"""K of each product, out of the largest c of the last sixteen steps that it was asked in.

Within a step K stands still, however many operands are under way at once: what they show counts from the next
step on, as a maximum, which does not depend on their order.
"""

import threading
from collections.abc import Mapping
from typing import Any, NoReturn

from blindtune.errors import CheckpointError
from blindtune.protocol.certificate.scales import first_level, level_above
from blindtune.protocol.products import Product

__all__ = ["REASKS", "WINDOW", "ScaleHistory"]

WINDOW = 16
"""Steps that decide on K."""

REASKS = 8
"""Rows that may be asked for again in a step, unless told otherwise."""


class ScaleHistory:
    """Levels of K, for each product. They tell of private data: no ``repr``, and no pickle."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._levels: dict[str, int] = {}
        self._steps: dict[str, list[float]] = {}
        self._open: dict[str, float] = {}

    def level(self, product: Product) -> int:
        """The level in this step."""
        with self._lock:
            return self._levels.get(product.label, first_level(product.contraction))

    def add(self, product: Product, part: float) -> None:
        """Takes the largest c of an operand. Rows of zeros have none, and nothing to add."""
        with self._lock:
            self._open[product.label] = max(min(part, 1.0), self._open.get(product.label, 0.0))

    def step(self) -> None:
        """A step ended: K of all products that were asked for in it is made anew."""
        with self._lock:
            for label, part in self._open.items():
                steps = [*self._steps.get(label, ()), part][-WINDOW:]
                self._steps[label], self._levels[label] = steps, level_above(max(steps))
            self._open = {}

    def state(self) -> dict[str, Any]:
        """All of it, for a checkpoint of the run."""
        with self._lock:
            return {
                "window": WINDOW,
                "steps": {label: list(x) for label, x in self._steps.items()},
                "open": dict(self._open),
            }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state`.

        Raises:
            CheckpointError: it is none.
        """
        try:
            if state.keys() != {"window", "steps", "open"} or state["window"] != WINDOW:
                raise ValueError("other keys, or another window")
            steps = {str(label): [_part(x) for x in parts] for label, parts in state["steps"].items()}
            unfinished = {str(label): _part(x) for label, x in state["open"].items()}
            if not all(0 < len(parts) <= WINDOW for parts in steps.values()):
                raise ValueError("more or fewer steps than count")
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the scales of the certified fixed point are damaged: {error}") from None
        with self._lock:
            self._steps, self._open = steps, unfinished
            self._levels = {label: level_above(max(parts)) for label, parts in steps.items()}

    def __reduce__(self) -> NoReturn:
        raise TypeError("scales cannot be pickled: they are private")


def _part(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, float | int) or not 0 <= value <= 1:
        raise ValueError("a part of the bound is a number between 0 and 1")
    return float(value)
