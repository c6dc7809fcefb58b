"""operand . M for the client: privately through operators, or in this process as the reference."""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import NoReturn, Self, TypeVar

from blindtune.checkpoint import Checkpoint
from blindtune.client.kit.kit import Kit
from blindtune.client.operators.messages import WorkRequest
from blindtune.client.operators.operator import OperatorClient, OperatorStatistics, Pending
from blindtune.client.rounds.answers_ahead import AnswersAhead, ProductOrder
from blindtune.client.rounds.certified import CertifiedProducts
from blindtune.client.rounds.overlap import waiting
from blindtune.errors import BlindtuneError
from blindtune.protocol.certificate.history import REASKS
from blindtune.protocol.fixed_point import Float32
from blindtune.protocol.masks import MaskedOperand, MaskSource, Share
from blindtune.protocol.multiplication.exactness import exact_method
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.products import Product, contraction_lengths
from blindtune.protocol.residues import Centred, Residues
from blindtune.protocol.shares.unmasked import UnmaskedSource

__all__ = ["PrivateMultiplier", "ReferenceMultiplier", "RemoteMultiplier", "Rounds"]

_logger = logging.getLogger(__name__)
Decoded = TypeVar("Decoded")


@dataclass(frozen=True)
class Rounds:
    """Round trips of a multiplier.

    Attributes:
        count: products that were asked for, each of all operators at once.
        seconds: time in which a round was under way, from asking to the last verified answer. While several
            are, it counts once.
    """

    count: int = 0
    seconds: float = 0.0


class _RoundClock:
    """Takes the time of rounds, which may overlap."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done = Rounds()
        self._under_way = 0
        self._since = 0.0

    @contextmanager
    def round(self) -> Iterator[None]:
        """The block is a round; one that fails takes its time, and does not count."""
        with self._lock:
            if not self._under_way:
                self._since = time.monotonic()
            self._under_way += 1
        count = 0
        try:
            yield
            count = 1
        finally:
            with self._lock:
                self._under_way -= 1
                seconds = 0.0 if self._under_way else time.monotonic() - self._since
                self._done = Rounds(self._done.count + count, self._done.seconds + seconds)

    def only_one(self) -> bool:
        """Whether a single round is under way."""
        with self._lock:
            return self._under_way == 1

    def rounds(self) -> Rounds:
        """Those so far, and the time of those that are under way."""
        with self._lock:
            under_way = time.monotonic() - self._since if self._under_way else 0.0
            return Rounds(self._done.count, self._done.seconds + under_way)


class PrivateMultiplier(ABC):
    """Multiplies integer operands by frozen layers.

    Attributes:
        source: draws the masks.
        certified: multiplies by a certified parameter set; None for any other.
    """

    source: MaskSource
    certified: CertifiedProducts | None = None

    def multiply_integers(self, operand: Centred, product: Product) -> Centred:
        """operand . M, exact but for the noise of the mask source.

        Args:
            operand: int32 [rows, product.contraction], within the product's budget.

        Returns:
            int32 [rows, outputs].
        """
        masked = self.source.hide_integers(operand, product)
        return self._ask(masked, product, masked.reveal_integers)

    def multiply_reals(
        self,
        x: Float32,
        product: Product,
        budget: int,
        column_scale: Float32 | None = None,
        output_scale: Float32 | None = None,
    ) -> Float32:
        """(x . column scale) M . output scale, by way of the integers that `quantize_rows` makes of x.

        Args:
            x: float32 [rows, product.contraction].
            budget: of a row's sum of squares, for the product and the noise of the mask source.
            column_scale: float32 [product.contraction], ones by default.
            output_scale: float32 [outputs], likewise.

        Returns:
            float32 [rows, outputs].

        Raises:
            UnsupportedError: a value is not finite, or the rows are too wide for the budget.
        """
        v = self._vector(product)
        masked, scales = self.source.hide_reals(x, product, budget, column_scale, v)
        return self._ask(masked, product, lambda answers: masked.reveal_reals(answers, scales, output_scale))

    def multiply_certified(
        self,
        x: Float32,
        product: Product,
        column_scale: Float32 | None,
        output_scale: Float32 | None,
        counted: bool,
    ) -> Float32:
        """`multiply_reals` by a certified parameter set, whose budgets follow from recent results.

        Args:
            x, product, column_scale, output_scale: as there.
            counted: whether scales of later steps follow from this result, too: those of training do.

        Raises:
            UnsupportedError: as there.
            FixedPointError: a verified result is damaged, or too many wrap around the modulus.
        """
        if self.certified is None:
            raise ValueError(f"results in parameter set {self.source.parameters.name} are not certified")
        vector = self._vector(product)
        return self.certified.multiply_reals(
            self.source, x, product, column_scale, output_scale, vector, counted, self._ask
        )

    def _vector(self, product: Product) -> Residues | None:
        """The product's first verification vector, where answers are verified."""
        return None

    @abstractmethod
    def _ask(
        self, masked: MaskedOperand, product: Product, decode: Callable[[Sequence[Residues]], Decoded]
    ) -> Decoded:
        """Has a masked operand multiplied, and decodes what came back once all of it is verified."""

    def ready(self, products: Sequence[Product]) -> None:  # noqa: B027 - most need nothing
        """Obtains whatever these products need before the first of them is asked for."""

    def statistics(self) -> dict[str, OperatorStatistics]:
        """Figures for each operator by name."""
        return {}

    def rounds(self) -> Rounds:
        """How often workers were asked, and how long for."""
        return Rounds()

    def close(self) -> None:  # noqa: B027 - not every multiplier has connections
        """Lets go of all connections."""

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a model with remote layers cannot be pickled: save its adapter with save_pretrained instead"
        )


class RemoteMultiplier(PrivateMultiplier):
    """Sends masked operands to operators, verifies each answer, and unmasks.

    Args:
        source: needs as many operators as are given.
        operators: in the order of the shares.
        kit: gives the verification vectors.
        ready: obtains what the source needs for some products.
        ask_ahead: whether to ask for shares before their operand is known, where the source can draw them.
        most_reasks: see `CertifiedProducts`.
    """

    def __init__(
        self,
        source: MaskSource,
        operators: Sequence[OperatorClient],
        kit: Kit,
        ready: Callable[[Sequence[Product]], None] = lambda products: None,
        *,
        ask_ahead: bool = False,
        most_reasks: int = REASKS,
    ) -> None:
        if isinstance(source, UnmaskedSource):
            raise ValueError("operands without a mask must not leave this process")
        if [x.index for x in operators] != list(range(source.operators)):
            raise ValueError(f"the mask source needs operators 0 ... {source.operators - 1} in order")
        self.source = source
        self._operators = operators
        self._kit = kit
        self._check_vectors = cache(partial(kit.check_vectors, parameters=source.parameters))
        if source.parameters.certified:
            self.certified = CertifiedProducts(kit, most_reasks)
        self._ready = ready
        self._clock = _RoundClock()
        self._order = ProductOrder()
        self._ahead = AnswersAhead() if ask_ahead else None

    def ready(self, products: Sequence[Product]) -> None:
        self._ready(products)

    def _ask(
        self, masked: MaskedOperand, product: Product, decode: Callable[[Sequence[Residues]], Decoded]
    ) -> Decoded:
        """Sends a masked operand to the operators, and decodes their verified answers."""
        with waiting(), self._clock.round():
            early = [self._ahead.take(share) if self._ahead else None for share in masked.shares]
            answers: list[Pending] = []
            try:
                for share, asked in zip(masked.shares, early, strict=True):
                    answers.append(asked or self._start(product, share))
                self._start_next(product, masked.shares[-1].shape[0])
                # What failed before anybody waited for it is asked for again, and tried for as long as any.
                for place, (share, asked) in enumerate(zip(masked.shares, early, strict=True)):
                    if asked is not None and asked.exception():
                        answers[place] = self._start(product, share)
            finally:
                # Verified answers only. All are awaited before any error is raised, so that no request of
                # this operand is still under way when the caller goes on.
                errors = [error for answer in answers if (error := answer.exception())]
            if errors:
                raise errors[0]
        result = decode([answer.result() for answer in answers])
        for answer in answers:
            answer.release()
        return result

    def _vector(self, product: Product) -> Residues:
        return self._check_vectors(product).everyday

    def _start(self, product: Product, share: Share) -> Pending:
        """Asks the share's operator."""
        check = self._check_vectors(product)
        request = WorkRequest(
            self._kit.description.fingerprint,
            self.source.parameters.name,
            product,
            share,
            outputs=check.s.shape[1],
        )
        return self._operators[share.recipient].start(request, check)

    def _start_next(self, product: Product, rows: int) -> None:
        """Asks for the shares of the next operand that do not depend on it, if that is wanted."""
        if self._ahead is None:
            return
        following = self._order.following(product, rows)
        # Next to other rounds it would take bandwidth from answers that somebody waits for.
        if following is None or not self._clock.only_one():
            return
        try:
            v = self._check_vectors(following).everyday
            for share in self.source.draw_ahead(following, rows, v):
                self._ahead.put(share, self._start(following, share))
        except (MemoryError, BlindtuneError) as error:
            # It is for the next operand to fail, if it must.
            _logger.debug("nothing was asked ahead for %s: %s", following.label, error)

    def statistics(self) -> dict[str, OperatorStatistics]:
        return {operator.name: operator.statistics for operator in self._operators}

    def rounds(self) -> Rounds:
        return self._clock.rounds()

    def close(self) -> None:
        for operator in self._operators:
            operator.close()
        if self._ahead is not None:
            self._ahead.clear()


class ReferenceMultiplier(PrivateMultiplier):
    """The same integers, in this process: no mask, no network, and the whole model in memory.

    What `RemoteMultiplier` with shares must equal bit for bit.

    Args:
        checkpoint: of the model.
        parameters: the modulus and what goes with it.
        kit: of the checkpoint, which certified parameter sets need.
        most_reasks: see `CertifiedProducts`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        parameters: ParameterSet,
        kit: Kit | None = None,
        most_reasks: int = REASKS,
    ) -> None:
        self.source = UnmaskedSource(parameters)
        if parameters.certified:
            if kit is None:
                raise ValueError(f"parameter set {parameters.name} needs the words of a kit")
            self.certified = CertifiedProducts(kit, most_reasks)
        with checkpoint.reader() as reader:
            layers = {layer.name: reader.read(layer).integers for layer in checkpoint.layers}
        lengths = contraction_lengths((x.shape[0], x.shape[1]) for x in layers.values())
        self._multiplier = Multiplier(layers, exact_method(lengths, parameters, log=_logger.warning))

    def _ask(
        self, masked: MaskedOperand, product: Product, decode: Callable[[Sequence[Residues]], Decoded]
    ) -> Decoded:
        residues = masked.shares[0].residues
        return decode([self._multiplier.multiply(product, residues, self.source.parameters)])
