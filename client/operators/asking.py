"""Asks an operator's workers for a block of rows until one has answered it.

Each attempt sends the same bytes. One that takes long may be repeated at a replica while it goes on (a hedge,
`blindtune.client.operators.policy`): that one has memory of its own, and nothing of it is used before all of
its rows are verified. Whichever is answered first ends the other, and nothing goes on before both have ended,
so that no late row can touch an answer that was accepted.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from blindtune.client.operators.buffers import Buffers
from blindtune.client.operators.decisions import Ask, Attempt, Failure, GiveUp, Keep, Request
from blindtune.client.operators.figures import Exclusion, OperatorStatistics
from blindtune.client.operators.messages import WorkRequest
from blindtune.client.operators.policy import WorkerPolicy
from blindtune.client.operators.threads import Threads
from blindtune.client.operators.timers import Cancel, Later
from blindtune.client.operators.transport import StopRequest, Transport, TransportError
from blindtune.errors import (
    BlindtuneError,
    OperatorUnavailableError,
    UntrustworthyOperatorError,
    VerificationError,
)
from blindtune.protocol.masks import Share
from blindtune.protocol.residues import Residues
from blindtune.protocol.verification import CheckVectors

__all__ = ["Asking", "Question"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """Rows of a product that are asked for, the same bytes at every attempt.

    Attributes:
        request: the rows.
        check, vectors: the product's secret vectors, and how many of them to check with, if not as every day.
    """

    request: WorkRequest
    check: CheckVectors
    vectors: int | None

    def rows(self, first: int, stop: int) -> "Question":
        """The same for some rows of it."""
        if stop - first == self.request.share.shape[0]:
            return self
        return replace(self, request=replace(self.request, share=self.request.share.rows(first, stop)))


@dataclass(eq=False)
class _Running:
    """An attempt under way."""

    attempt: Attempt
    stop: StopRequest = field(default_factory=StopRequest)
    overtaken: bool = False
    silent: str = ""
    has_ended: bool = False
    unwatch: Cancel = lambda: None


@dataclass(eq=False)
class _Hedge(_Running):
    answer: Residues | None = None
    answered: bool = False
    future: Any = None


@dataclass(eq=False)
class _Race:
    """An attempt, and the one that repeats it, if any."""

    question: Question
    wanted: Request
    first: _Running
    hedge: _Hedge | None = None


class Asking:
    """Asks the workers of one operator.

    Args:
        name: the operator's, for messages.
        workers: address and transport of each replica.
        policy: decides who is asked, and for how long.
        timeout: seconds that an attempt takes at most.
        clock, pause, later: monotonic seconds, waiting for some, and calling something after some.
        hedges: threads for attempts that repeat others.
        buffers: memory for their answers.
        closed: says that nobody waits any more.
    """

    def __init__(
        self,
        name: str,
        workers: Sequence[tuple[str, Transport]],
        policy: WorkerPolicy,
        timeout: float,
        clock: Callable[[], float],
        pause: Callable[[float], object],
        later: Later,
        hedges: Threads,
        buffers: Buffers,
        closed: threading.Event,
    ) -> None:
        self._name = name
        self._addresses = [address for address, _ in workers]
        self._transports = [transport for _, transport in workers]
        self._policy = policy
        self._timeout = timeout
        self._clock, self._pause, self._later = clock, pause, later
        self._hedges = hedges
        self._buffers = buffers
        self._closed = closed
        self._lock = threading.Lock()
        self._statistics = OperatorStatistics()

    @property
    def statistics(self) -> OperatorStatistics:
        """A copy of the figures so far."""
        with self._lock:
            return replace(self._statistics, failures=self._statistics.failures.copy())

    def ready(self) -> list[int]:
        """Workers that could be asked at this moment."""
        with self._lock:
            return self._policy.ready(self._clock())

    def who(self, worker: int) -> str:
        """A worker, for messages."""
        return f"worker {self._addresses[worker]} of operator {self._name}"

    def was_closed(self) -> OperatorUnavailableError:
        """What is told to whom still waits when the client is closed."""
        return OperatorUnavailableError(f"the connection to operator {self._name} was closed")

    def ask(self, question: Question, most: Sequence[int], answer: Residues) -> int:
        """Awaits the verified answer to the first rows of a block.

        Args:
            question: for the block.
            most: rows that each worker takes.
            answer: uint32 [rows, outputs], where it goes.

        Returns:
            How many rows were answered: as many as the worker takes that was chosen.

        Raises:
            OperatorUnavailableError: no worker answers, or the client was closed.
            UntrustworthyOperatorError: none is left, since they gave wrong answers.
        """
        request = question.request
        rows, columns = request.share.shape
        row_bytes = request.parameters.word_bytes * (
            request.outputs + (columns if request.share.seed is None else 0)
        )
        with self._lock:
            wanted = self._policy.request(self._clock(), rows, row_bytes, most)
        while True:
            if self._closed.is_set():
                raise self.was_closed()
            with self._lock:
                decision = self._policy.choose(wanted, self._clock())
            if isinstance(decision, GiveUp):
                error_class = UntrustworthyOperatorError if decision.lied else OperatorUnavailableError
                raise error_class(self._explain(decision.reason))
            if not isinstance(decision, Ask):
                self._pause(decision.seconds)
                continue
            with self._lock:
                self._statistics.retries += bool(wanted.failed)
            attempt = decision.attempt
            race = _Race(question.rows(0, attempt.rows), wanted, _Running(attempt))
            if self._run(race, answer[: attempt.rows]):
                return attempt.rows

    def _run(self, race: _Race, answer: Residues) -> bool:
        """Makes an attempt, and the hedge that the policy may want; whether one of them was answered."""
        self._watch(race, race.first, race.first.attempt.look - race.first.attempt.started)
        answered = True  # so that a hedge is of no use either to whom is interrupted
        try:
            answered = self._try(race, race.first, answer)
        finally:
            hedge = self._join(race, answered)
        if hedge is not None and hedge.answer is not None:
            if not answered and hedge.answered:
                np.copyto(answer, hedge.answer)
                answered = True
                with self._lock:
                    self._statistics.hedges_won += 1
            self._buffers.give(hedge.answer)
        return answered

    def _join(self, race: _Race, answered: bool) -> _Hedge | None:
        """Lets no hedge begin any more, and waits for the one that did; it is of no use once answered."""
        self._end(race.first)
        hedge = race.hedge
        if hedge is None:
            return None
        if answered:
            hedge.overtaken = True
            hedge.stop()
        error = None
        if hedge.future.cancel():  # it has not begun
            with self._lock:
                self._policy.abandoned(hedge.attempt)
        else:
            error = hedge.future.exception()
        self._end(hedge)
        if error is not None and not isinstance(error, BlindtuneError):
            raise error
        return hedge

    def _end(self, running: _Running) -> None:
        with self._lock:
            running.has_ended = True
        running.unwatch()

    def _watch(self, race: _Race, running: _Running, seconds: float) -> None:
        running.unwatch = self._later(seconds, lambda: self._look(race, running))

    def _look(self, race: _Race, running: _Running) -> None:
        """Asks the policy about an attempt under way; called when it said that this is due."""
        with self._lock:
            if running.has_ended:
                return
            decision = self._policy.look(race.wanted, running.attempt, self._clock())
            if isinstance(decision, Keep):
                self._watch(race, running, decision.seconds)
                if decision.hedge is not None:
                    self._begin(race, decision.hedge)
            else:
                running.silent = decision.reason
        if running.silent:
            running.stop()

    def _begin(self, race: _Race, attempt: Attempt) -> None:
        """Starts a hedge."""
        hedge = _Hedge(attempt)
        try:
            hedge.future = self._hedges.get().submit(self._run_hedge, race, hedge)
        except RuntimeError:  # they are being shut down
            self._policy.abandoned(attempt)
            return
        race.hedge = hedge
        self._statistics.hedges += 1
        self._watch(race, hedge, attempt.look - attempt.started)

    def _run_hedge(self, race: _Race, hedge: _Hedge) -> None:
        request = race.question.request
        hedge.answer = self._buffers.take(request.share.shape[0], request.outputs)
        hedge.answered = self._try(race, hedge, hedge.answer)
        if hedge.answered:
            with self._lock:
                race.first.overtaken = not race.first.has_ended
            if race.first.overtaken:
                race.first.stop()

    def _try(self, race: _Race, running: _Running, answer: Residues) -> bool:
        """Makes one attempt, and tells the policy what came of it; whether it was answered."""
        attempt = running.attempt
        try:
            self._exchange(race.question, running, answer)
        except TransportError as error:
            failure, detail = error.failure, str(error)
        except VerificationError as error:
            failure, detail = Failure.LIED, str(error)
        except BaseException:
            # Interrupted: the worker did nothing wrong, but the request is no longer in flight.
            with self._lock:
                self._policy.abandoned(attempt)
            raise
        else:
            with self._lock:
                self._policy.succeeded(attempt, self._clock())
                self._statistics.verified_responses += 1
            return True
        label = race.question.request.product.label
        if failure is not Failure.LIED and running.stop.called:
            if running.overtaken:
                with self._lock:
                    aside = self._policy.overtaken(attempt, self._clock())
                self._note_set_aside(attempt.worker, label, aside)
                return False
            failure, detail = Failure.SILENT, running.silent
        if failure is Failure.UNREACHABLE and self._closed.is_set():
            # The worker did nothing wrong, and nobody waits for it.
            with self._lock:
                self._policy.abandoned(attempt)
            raise self.was_closed()
        self._note_failure(attempt.worker, label, failure, detail)
        with self._lock:
            aside = self._policy.failed(race.wanted, attempt, failure, detail, self._clock())
        self._note_set_aside(attempt.worker, label, aside)
        return False

    def _exchange(self, question: Question, running: _Running, answer: Residues) -> None:
        """Sends the request to the attempt's worker, and verifies its answer as it comes."""
        request, check, vectors = question.request, question.check, question.vectors
        attempt = running.attempt
        rows, _ = request.share.shape
        with self._lock:
            self._statistics.requests += 1
            self._statistics.rows += rows
            self._statistics.bytes_sent += request.payload_bytes
        arrived, verified, seconds = 0, 0, 0.0
        arrivals = self._transports[attempt.worker].multiply(request, self._timeout, answer, running.stop)
        try:
            with closing(arrivals):
                for more in arrivals:
                    if not verified <= more <= rows:
                        raise VerificationError(f"the response went from {verified} to {more} of {rows} rows")
                    arrived = more
                    started = self._clock()
                    self._policy.heard(attempt, arrived, started)
                    if arrived == verified:
                        continue
                    try:
                        _verify(check, request.share, answer, slice(verified, arrived), vectors)
                    finally:
                        seconds += self._clock() - started
                    verified = arrived
        finally:
            with self._lock:
                self._statistics.bytes_received += request.parameters.word_bytes * answer[:arrived].size
                self._statistics.verification_seconds += seconds
        if verified != rows:
            raise VerificationError(f"the response ended after {verified} of {rows} rows")

    def _note_failure(self, worker: int, label: str, failure: Failure, detail: str) -> None:
        address = self._addresses[worker]
        with self._lock:
            self._statistics.failures[failure] += 1
            if failure in (Failure.LIED, Failure.INCOMPATIBLE):
                self._statistics.excluded += (Exclusion(address, failure, label),)
            if failure is Failure.LIED:
                self._statistics.lies += (address,)
        if failure is Failure.LIED:
            _logger.error(
                "%s gave a wrong answer and is not asked again in this run (%s; %s)",
                self.who(worker),
                label,
                detail,
            )
        else:
            _logger.warning("%s %s: %s", self.who(worker), failure.value, detail)

    def _note_set_aside(self, worker: int, label: str, seconds: float | None) -> None:
        if seconds is None:
            return
        with self._lock:
            found = Exclusion(self._addresses[worker], Failure.SILENT, label)
            self._statistics.set_aside += (found,)
        _logger.warning(
            "%s was silent again and again: for %g s it is asked only if all others fail",
            self.who(worker),
            seconds,
        )

    def _explain(self, reason: str) -> str:
        workers = "; ".join(
            f"{address}: {self._policy.describe(i)}" for i, address in enumerate(self._addresses)
        )
        return (
            f"operator {self._name}: {reason} ({workers}). Nothing was lost: restart or replace its workers "
            "and resume from the last checkpoint"
        )


def _verify(check: CheckVectors, share: Share, answer: Residues, rows: slice, vectors: int | None) -> None:
    try:
        if share.expected is not None and vectors in (None, len(share.expected)):
            check.verify_expected(share.expected[:, rows], answer[rows])
        else:
            check.verify(share.residues[rows], answer[rows], vectors)
    except VerificationError as error:
        raise VerificationError(
            f"{error} (of those from row {rows.start} on)" if rows.start else str(error)
        ) from None
