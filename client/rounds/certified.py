"""A certified product: rows scaled by what recent results took, each result certified, wraps taken back.

What cannot be decoded is asked for again: as a new operand, under a fresh mask, after every answer to the
old one was verified, and at the scale that is proven never to wrap. As two rows, of which the second carries
what rounding left of the first, it is as precise as the rest. A row that is not certified there was damaged
on this machine.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import isqrt, log2, sqrt

import numpy as np

from blindtune.client.kit.kit import Kit
from blindtune.client.rounds.steps import at_each_step
from blindtune.errors import FixedPointError
from blindtune.protocol.certificate.certified import Certified, correct, reveal_certified
from blindtune.protocol.certificate.history import REASKS, ScaleHistory
from blindtune.protocol.certificate.scales import certified_budget, part_of, precision, proven_noise
from blindtune.protocol.certificate.words import CertificateWords
from blindtune.protocol.fixed_point import Float32, Float64, square_budget
from blindtune.protocol.masks import MaskedOperand, MaskSource
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Residues

__all__ = ["Ask", "Certificates", "CertifiedProducts", "Scale"]

_logger = logging.getLogger(__name__)

_BFLOAT16 = 2.0**-9.2
"""Relative error of a product whose inputs are rounded to bfloat16."""

Ask = Callable[[MaskedOperand, Product, Callable[[Sequence[Residues]], Certified]], Certified]
"""Has a masked operand multiplied, verifies all answers, and decodes them then."""


@dataclass(frozen=True)
class Scale:
    """How finely a product's rows are scaled.

    Attributes:
        part: K, the part of the proven bound that results are expected to take.
        precision: the relative error to be expected of a result.
    """

    part: float
    precision: float


@dataclass(frozen=True)
class Certificates:
    """What a multiplier's certificates found.

    Attributes:
        wraps: rows whose results wrapped around the modulus, and were corrected.
        reasks: rows that had to be asked for again.
        decoding_seconds: what finding wraps took.
        scales: by product, as of the last step.
    """

    wraps: int = 0
    reasks: int = 0
    decoding_seconds: float = 0.0
    scales: dict[str, Scale] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, eq=False)
class _Bounds:
    """Of a product: q, nu^2, the proven budget of a row's squares, and its words."""

    modulus: int
    column_square_sum: int
    proven: int
    words: CertificateWords = field(repr=False)


class CertifiedProducts:
    """Multiplies with certificates.

    Args:
        kit: gives words and bounds.
        most_reasks: rows that may be asked for again between two steps of an optimizer.
    """

    def __init__(self, kit: Kit, most_reasks: int = REASKS) -> None:
        self._kit, self._most_reasks = kit, most_reasks
        self._bounds = cache(self._bounds_of)
        self._lock = threading.Lock()
        self._found = Certificates()
        self._scales: dict[str, Scale] = {}
        self._reasks = 0
        self._warned = False
        self.history = ScaleHistory()
        at_each_step(self)

    def step(self) -> None:
        """An optimizer took a step."""
        self.history.step()
        with self._lock:
            self._reasks = 0

    def certificates(self) -> Certificates:
        """What was found so far."""
        with self._lock:
            found = self._found
            return Certificates(found.wraps, found.reasks, found.decoding_seconds, dict(self._scales))

    def multiply_reals(
        self,
        source: MaskSource,
        x: Float32,
        product: Product,
        column_scale: Float32 | None,
        output_scale: Float32 | None,
        v: Residues | None,
        counted: bool,
        ask: Ask,
    ) -> Float32:
        """As `PrivateMultiplier.multiply_reals`.

        Args:
            source: hides operands.
            x, product, column_scale, output_scale: as there.
            v: the product's first verification vector, where operands are verified.
            counted: whether K of later steps follows from this result, too.
            ask: has a masked operand multiplied.

        Raises:
            FixedPointError: a verified result was damaged, or too many wrap.
        """
        bounds, level = self._bounds(source, product), self.history.level(product)
        square, noise = bounds.column_square_sum, source.largest_noise
        budget = certified_budget(source.parameters, square, level, noise)
        self._note(product, part_of(level), budget, source.noise_variance)
        masked, scales = source.hide_reals(x, product, budget, column_scale, v, bounds.words.image)
        found = self._certified(masked, scales, product, output_scale, bounds, ask)
        part = _part(found, budget, square, product)
        if found.flagged.size:
            if budget <= bounds.proven:
                raise _damaged(product, len(found.flagged), len(x))
            again = self._ask_again(source, x, product, column_scale, output_scale, found, bounds, ask)
            part = max(part, _part(again, bounds.proven, square, product))
        if counted and part > 0:
            self.history.add(product, part)
        return found.values

    def _ask_again(
        self,
        source: MaskSource,
        x: Float32,
        product: Product,
        column_scale: Float32 | None,
        output_scale: Float32 | None,
        found: Certified,
        bounds: _Bounds,
        ask: Ask,
    ) -> Certified:
        """Replaces the flagged rows."""
        rows = found.flagged
        self._count_reasks(len(rows))
        masked, scales = source.hide_reals_twice(
            np.ascontiguousarray(x[rows]), product, bounds.proven, column_scale, bounds.words.image
        )
        again = self._certified(masked, scales, product, output_scale, bounds, ask, repair=False)
        if again.flagged.size:
            raise _damaged(product, len(np.unique(again.flagged % len(rows))), len(x))
        found.values[rows] = again.values[: len(rows)] + again.values[len(rows) :]
        again.peaks[len(rows) :] = 0  # of what rounding left
        return again

    def _certified(
        self,
        masked: MaskedOperand,
        scales: Float64,
        product: Product,
        output_scale: Float32 | None,
        bounds: _Bounds,
        ask: Ask,
        repair: bool = True,
    ) -> Certified:
        def decoded(answers: Sequence[Residues]) -> Certified:
            found = reveal_certified(masked, answers, scales, output_scale, bounds.words, bounds.modulus)
            if found.flagged.size and repair:
                begun = time.perf_counter()
                of_product, most = (bounds.words, bounds.modulus), self._most_reasks
                correct(found, masked, answers, scales, output_scale, *of_product, most)
                self._count_wraps(found.wraps, time.perf_counter() - begun)
            return found

        return ask(masked, product, decoded)

    def _bounds_of(self, source: MaskSource, product: Product) -> _Bounds:
        words, square = self._kit.certificate(product), self._kit.column_square_sum(product)
        unconditional = source.noise(self._kit.column_absolute_sum(product))
        noise = min(unconditional, proven_noise(square, source.noise_variance)) if unconditional else 0
        proven = square_budget(source.parameters, square, noise)
        return _Bounds(source.parameters.modulus, square, proven, words)

    def _note(self, product: Product, part: float, budget: int, variance: float) -> None:
        """Keeps figures, and warns once."""
        error = precision(budget, product.contraction, product.diffused, variance)
        with self._lock:
            self._scales[product.label] = Scale(part, error)
            if error <= _BFLOAT16 or self._warned:
                return
            self._warned = True
        _logger.warning(
            "products of %d columns are computed to 2^%.1f, less precisely than with bfloat16 (2^-9.2): for "
            "more, choose precision full",
            product.contraction,
            log2(error),
        )

    def _count_wraps(self, wraps: int, seconds: float) -> None:
        with self._lock:
            old = self._found
            self._found = Certificates(old.wraps + wraps, old.reasks, old.decoding_seconds + seconds)
        _logger.info("took back what wrapped around the modulus in %d rows, in %.2f s", wraps, seconds)

    def _count_reasks(self, rows: int) -> None:
        """Counts rows to be asked for again, before anybody sees them.

        Raises:
            FixedPointError: there are too many.
        """
        with self._lock:
            self._reasks += rows
            old, count = self._found, self._reasks
            if count <= self._most_reasks:
                self._found = Certificates(old.wraps, old.reasks + rows, old.decoding_seconds)
        if count > self._most_reasks:
            raise FixedPointError(
                f"{count} rows of this step wrap around the modulus so that it cannot be taken back, and "
                f"{self._most_reasks} may be asked for again: training diverges (lower the learning rate), "
                "memory or a hint is damaged, or these rows are unlike all before (choose precision full, "
                "or raise most_reasks: workers see how many there are)"
            )
        _logger.info("asking again for %d rows that wrapped around the modulus", rows)


def _part(found: Certified, budget: int, column_square_sum: int, product: Product) -> float:
    """c, the largest result as a part of the proven bound of its row."""
    largest = int(found.peaks.max(initial=0))
    # What a first attempt leaves to rounding, and rounding then takes at most: half a unit a column, or one.
    norm = max(1.0, isqrt(budget) - (2 if product.diffused else 1) * sqrt(product.contraction))
    return largest / (norm * sqrt(max(column_square_sum, 1)))


def _damaged(product: Product, count: int, rows: int) -> FixedPointError:
    return FixedPointError(
        f"{count} of {rows} rows of {product.label} are not what was multiplied, although the answers of the "
        "workers were verified: memory or a hint of this machine is damaged. Check both, and go on from the "
        "last checkpoint"
    )
