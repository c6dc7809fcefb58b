"""Ways in which a worker can answer wrongly, or not at all."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Residues
from blindtune.server.admission.refusals import Busy, Draining
from blindtune.server.hooks import Multiplying

__all__ = ["FAULTS", "LIES", "Rogue"]

HANG_SECONDS = 600

Lie = Callable[["Rogue", Product, Residues, Residues, ParameterSet], Residues | None]
"""What to answer in place of the right answer; None when this lie can't be told here."""


def _one_residue(
    rogue: "Rogue", product: Product, operand: Residues, answer: Residues, parameters: ParameterSet
) -> Residues:
    answer[-1, -1] = (int(answer[-1, -1]) + 1) % parameters.modulus
    return answer


def _plus_modulus(
    rogue: "Rogue", product: Product, operand: Residues, answer: Residues, parameters: ParameterSet
) -> Residues:
    """No residue. In words with room for it it is congruent to the right answer: no check mod q notices."""
    room = (1 << 8 * parameters.word_bytes) - parameters.modulus
    answer[0, 0] = parameters.modulus + int(answer[0, 0]) % room
    return answer


def _plus_2_to_30(
    rogue: "Rogue", product: Product, operand: Residues, answer: Residues, parameters: ParameterSet
) -> Residues:
    answer[0, -1] = (int(answer[0, -1]) + 2**30) % parameters.modulus
    return answer


def _replayed(
    rogue: "Rogue", product: Product, operand: Residues, answer: Residues, parameters: ParameterSet
) -> Residues | None:
    """A right answer to an earlier operand of the same product."""
    return rogue.earlier.get((product, answer.shape))


def _other_layer(
    rogue: "Rogue", product: Product, operand: Residues, answer: Residues, parameters: ParameterSet
) -> Residues | None:
    """The right answer for the same layers of another block, which have the same shapes."""
    numbers = {"0": "1", "1": "0"}
    spans = tuple(
        replace(s, layer=re.sub(r"(?<=\.)[01](?=\.)", lambda m: numbers[m[0]], s.layer))
        for s in product.spans
    )
    other = replace(product, spans=spans)
    return None if other == product else rogue.honest.multiply(other, operand, parameters)


def _rows_swapped(
    rogue: "Rogue", product: Product, operand: Residues, answer: Residues, parameters: ParameterSet
) -> Residues | None:
    return answer[::-1].copy() if len(answer) > 1 else None


def _too_short(
    rogue: "Rogue", product: Product, operand: Residues, answer: Residues, parameters: ParameterSet
) -> Residues:
    return answer[:-1]


def _too_long(
    rogue: "Rogue", product: Product, operand: Residues, answer: Residues, parameters: ParameterSet
) -> Residues:
    return np.concatenate([answer, answer[-1:]])


def _refuse(
    rogue: "Rogue", product: Product, operand: Residues, answer: Residues, parameters: ParameterSet
) -> Residues:
    raise Draining("this worker is shutting down")


def _busy(
    rogue: "Rogue", product: Product, operand: Residues, answer: Residues, parameters: ParameterSet
) -> Residues:
    raise Busy("this worker is busy")


def _die(
    rogue: "Rogue", product: Product, operand: Residues, answer: Residues, parameters: ParameterSet
) -> Residues:
    os.kill(os.getpid(), signal.SIGKILL)
    return answer


def _hang(
    rogue: "Rogue", product: Product, operand: Residues, answer: Residues, parameters: ParameterSet
) -> Residues:
    time.sleep(HANG_SECONDS)
    return answer


LIES: dict[str, Lie] = {
    "one residue is off by one": _one_residue,
    "y + q": _plus_modulus,
    "y + 2^30": _plus_2_to_30,
    "an earlier answer": _replayed,
    "another layer's answer": _other_layer,
    "rows in another order": _rows_swapped,
    "a row too few": _too_short,
    "a row too many": _too_long,
}
FAULTS: dict[str, Lie] = {"unavailable": _refuse, "busy": _busy, "dies": _die, "hangs": _hang}


class Rogue:
    """Multiplies honestly until it is told otherwise.

    Attributes:
        honest: the multiplier that it wraps.
        earlier: its latest answer of each product and shape.
        told: how many wrong answers it gave.
    """

    def __init__(self, honest: Multiplying) -> None:
        self.honest = honest
        self.earlier: dict[tuple[Product, tuple[int, ...]], Residues] = {}
        self.told = 0
        self._lock = threading.Lock()
        self._lie: Lie | None = None
        self._left = 0
        self._wait = 0

    def plan(self, lie: str | None, at: int = 1, times: int = 1) -> None:
        """Lies at the ``at``-th answer from now, or the first after it where that lie is possible."""
        with self._lock:
            self._lie = None if lie is None else (LIES | FAULTS)[lie]
            self._wait, self._left, self.told = at - 1, times, 0

    def outputs(self, product: Product) -> int:
        return self.honest.outputs(product)

    def multiply(self, product: Product, operand: Residues, parameters: ParameterSet) -> Residues:
        answer = self.honest.multiply(product, operand, parameters)
        right = answer.copy()
        with self._lock:
            lie = self._lie if self._left and not self._wait else None
            self._wait = max(0, self._wait - 1)
            if lie in FAULTS.values():
                self._left -= 1
                self.told += 1
        if lie is not None:
            wrong = lie(self, product, operand, answer, parameters)
            if wrong is not None and not np.array_equal(wrong, right):
                answer = wrong
                with self._lock:
                    self._left -= 1
                    self.told += 1
        self.earlier[product, right.shape] = right
        return answer
