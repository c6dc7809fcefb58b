"""Bugs that show where rows are split, requests repeated early or asked ahead, or memory used again."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import pytest

from blindtune.client.operators import asking, lanes
from blindtune.client.operators.asking import Asking, Question
from blindtune.client.operators.buffers import Buffers
from blindtune.client.operators.decisions import Attempt, Failure
from blindtune.client.operators.operator import OperatorClient
from blindtune.client.operators.policy import WorkerPolicy
from blindtune.client.rounds import multiplier
from blindtune.client.rounds.answers_ahead import AnswersAhead
from blindtune.protocol.verification import CheckVectors
from simulation.chosen import SPLIT, shape, wrong_row
from simulation.planting import Plant
from simulation.schedules import Fault, Schedule
from simulation.training import Job

__all__ = ["PLANTS"]


class _Unchecked(CheckVectors):
    def _compare(self, *arguments: Any) -> None:
        pass


def _unchecked(question: Question) -> Question:
    return replace(question, check=_Unchecked(question.check.s, question.check.v, question.check.parameters))


def _first_block_verified_only(patch: pytest.MonkeyPatch) -> None:
    real = Question.rows

    def rows(self: Question, first: int, stop: int) -> Question:
        part = real(self, first, stop)
        return _unchecked(part) if first else part

    patch.setattr(Question, "rows", rows)


def _first_message_verified_only(patch: pytest.MonkeyPatch) -> None:
    real = asking._verify

    def verify(check: Any, share: Any, answer: Any, rows: slice, vectors: Any) -> None:
        if not rows.start:
            real(check, share, answer, rows, vectors)

    patch.setattr(asking, "_verify", verify)


def _a_liar_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    real = WorkerPolicy.failed

    def failed(self: WorkerPolicy, request: Any, attempt: Attempt, failure: Failure, *rest: Any) -> Any:
        found = real(self, request, attempt, failure, *rest)
        if failure is not Failure.LIED:
            self._workers[attempt.worker].excluded = None
        return found

    patch.setattr(WorkerPolicy, "failed", failed)


def _hedges_unverified(patch: pytest.MonkeyPatch) -> None:
    real = Asking._run_hedge

    def run_hedge(self: Asking, race: Any, hedge: Any) -> None:
        race.question = _unchecked(race.question)
        real(self, race, hedge)

    patch.setattr(Asking, "_run_hedge", run_hedge)


def _hedges_share_memory(patch: pytest.MonkeyPatch) -> None:
    real = Asking._run

    def run(self: Asking, race: Any, answer: Any) -> bool:
        race.first.memory = answer
        return real(self, race, answer)

    def run_hedge(self: Asking, race: Any, hedge: Any) -> None:
        hedge.answered = self._try(race, hedge, race.first.memory)
        if hedge.answered:
            race.first.overtaken = not race.first.has_ended
            race.first.stop()

    patch.setattr(Asking, "_run", run)
    patch.setattr(Asking, "_run_hedge", run_hedge)


def _losers_go_on(patch: pytest.MonkeyPatch) -> None:
    real = Asking._join

    def join(self: Asking, race: Any, answered: bool) -> Any:
        if answered:
            self._end(race.first)
            return None
        return real(self, race, answered)

    patch.setattr(Asking, "_join", join)


def _hedges_may_lie(patch: pytest.MonkeyPatch) -> None:
    real = WorkerPolicy.failed

    def failed(self: WorkerPolicy, request: Any, attempt: Attempt, failure: Failure, *rest: Any) -> Any:
        is_lie = failure is Failure.LIED and attempt.is_hedge
        return real(self, request, attempt, Failure.BUSY if is_lie else failure, *rest)

    patch.setattr(WorkerPolicy, "failed", failed)


def _hedges_go_elsewhere(patch: pytest.MonkeyPatch) -> None:
    real = Asking._exchange
    everyone: dict[str, dict[str, Asking]] = {}

    def exchange(self: Asking, question: Any, running: Any, answer: Any) -> None:
        own = everyone.setdefault(self._transports[0]._client, {})  # type: ignore[attr-defined]
        own[self._name] = self
        others = [asking for name, asking in own.items() if name != self._name]
        real(others[0] if others and running.attempt.is_hedge else self, question, running, answer)

    patch.setattr(Asking, "_exchange", exchange)


def _rest_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lanes._Queue, "put", lambda self, block: None)


def _lanes_take_the_same_block(patch: pytest.MonkeyPatch) -> None:
    real = lanes._Queue.__init__

    def init(self: Any, blocks: Any) -> None:
        real(self, blocks[:1] * len(blocks))

    patch.setattr(lanes._Queue, "__init__", init)


def _errors_of_other_lanes_are_lost(patch: pytest.MonkeyPatch) -> None:
    real = lanes.UnderWay.exception

    def exception(self: lanes.UnderWay) -> Any:
        real(self)
        return self.lanes[0].exception()

    patch.setattr(lanes.UnderWay, "exception", exception)


def _memory_handed_back_while_asked_for(patch: pytest.MonkeyPatch) -> None:
    real = OperatorClient.start

    def start(self: OperatorClient, *arguments: Any) -> Any:
        pending = real(self, *arguments)
        pending.release()
        return pending

    patch.setattr(OperatorClient, "start", start)


def _memory_handed_back_before_it_is_decoded(patch: pytest.MonkeyPatch) -> None:
    real = multiplier.Pending.result

    def result(self: multiplier.Pending) -> Any:
        answer = real(self)
        self.release()
        return answer

    patch.setattr(multiplier.Pending, "result", result)


def _losers_hand_memory_back_at_once(patch: pytest.MonkeyPatch) -> None:
    real = Asking._join

    def join(self: Asking, race: Any, answered: bool) -> Any:
        hedge = race.hedge
        if hedge is None or not answered or hedge.answer is None:
            return real(self, race, answered)
        self._buffers.give(hedge.answer)
        hedge = real(self, race, answered)
        hedge.answer = None
        return hedge

    patch.setattr(Asking, "_join", join)


def _memory_taken_by_two(patch: pytest.MonkeyPatch) -> None:
    def take(self: Buffers, rows: int, columns: int) -> Any:
        import numpy as np

        found = next((x for x in self._kept if x.shape == (rows, columns)), None)
        return np.empty((rows, columns), np.uint32) if found is None else found

    patch.setattr(Buffers, "take", take)


def _failed_answers_ahead_are_read(patch: pytest.MonkeyPatch) -> None:
    real = multiplier.Pending.exception

    def exception(self: Any) -> Any:
        error = real(self)
        return None if error is not None and getattr(self, "ahead", False) else error

    def put(self: AnswersAhead, share: Any, pending: Any) -> None:
        pending.ahead = True
        self._pending[share] = pending

    patch.setattr(multiplier.Pending, "exception", exception)
    patch.setattr(AnswersAhead, "put", put)


def _of(schedules: Sequence[Schedule]) -> Callable[[int], Schedule]:
    return lambda number: next(islice(cycle(schedules), number, None))


_SMALLER = shape("an operand larger than a block")
_AHEAD = shape("answers asked for ahead")
_GONE = shape("all replicas of an operator gone at once")
_IN_FLIGHT = shape("micro-batches in flight")
_HANGING = shape("a worker that hangs while replicas are free")
# The first worker is slow, and another one lies; or it comes back, and the other one never answers.
_SLOW_AND_LYING = tuple(
    replace(
        SPLIT,
        seed=seed,
        job=Job(3, 1, rows, 2),
        workers=(3, 3),
        max_concurrent=8,
        protected=False,
        acknowledges=False,
        faults=(
            Fault(at, "slow network", 1, 1, slower),
            Fault(at, "slow network", 1, 0, slow),
            Fault(at, "slow network", 1, 2, slow),
            Fault(at + later, "wrong row", 1, 0, row=3),
            Fault(at + later, "wrong row", 1, 2, row=3),
        ),
    )
    for seed, rows, at, slower, slow, later in (
        (301, 9, 0.08, 2.0, 2.0, 0.0),
        (372, 6, 0.01, 6.0, 3.0, 0.02),
        *((seed, 6, 0.01, 6.0, 3.0, 0.02) for seed in range(40)),
    )
)
_LATE_AND_SILENT = tuple(
    replace(
        SPLIT,
        seed=seed,
        job=Job(3, 1, 6, 2),
        workers=(3, 3),
        faults=(
            Fault(0.03, "hang", 1, 1, 2.5),
            Fault(0.04, "hang", 1, 0, 400.0),
            Fault(0.04, "hang", 1, 2, 400.0),
        ),
    )
    for seed in range(10)
)

PLANTS: tuple[Plant, ...] = (
    Plant("blocks over replicas", "only the first block is verified", "verified",
          _first_block_verified_only, _of((SPLIT,))),
    Plant("blocks over replicas", "only the first block is verified, and one lies", "result",
          _first_block_verified_only, _of([wrong_row(SPLIT, 1, row) for row in range(18)])),
    Plant("blocks over replicas", "of a block only the first message is verified", "verified",
          _first_message_verified_only, _of(_SMALLER)),
    Plant("blocks over replicas", "two lanes take the same block", "verified",
          _lanes_take_the_same_block, _of((SPLIT,))),
    Plant("blocks over replicas", "what fails in another lane than the first is forgotten", "verified",
          _errors_of_other_lanes_are_lost, _of(_GONE)),
    Plant("smaller limits", "rows that a worker does not take are forgotten", "verified",
          _rest_is_forgotten, _of(_SMALLER)),
    Plant("micro-batches in flight", "a liar is forgotten when another request at it fails", "quarantine",
          _a_liar_is_forgotten, _of(_IN_FLIGHT)),
    Plant("micro-batches in flight", "memory is used again while it is read", "result",
          _memory_handed_back_while_asked_for, _of(_IN_FLIGHT)),
    Plant("micro-batches in flight", "memory that was handed back serves two", "result",
          _memory_taken_by_two, _of(_IN_FLIGHT)),
    Plant("micro-batches in flight", "memory of answers is handed back before they are decoded", "result",
          _memory_handed_back_before_it_is_decoded, _of(_IN_FLIGHT)),
    Plant("hanging workers", "who lost hands its memory back while it still writes", "handed back",
          _losers_hand_memory_back_at_once, _of(_LATE_AND_SILENT)),
    Plant("hanging workers", "who answers a hedge is not verified", "verified", _hedges_unverified,
          _of(_HANGING)),
    Plant("hanging workers", "who lies in a hedge is asked again", "quarantine", _hedges_may_lie,
          _of(_HANGING)),
    Plant("hanging workers", "a hedge goes to another operator", "recipient", _hedges_go_elsewhere,
          _of(_HANGING)),
    Plant("hanging workers", "a hedge writes where the first worker's answer goes", "verified",
          _hedges_share_memory, _of(_SLOW_AND_LYING)),
    Plant("hanging workers", "who lost goes on", "bounded memory", _losers_go_on, _of(_LATE_AND_SILENT)),
    Plant("answers ahead", "an answer that failed is read", "verified", _failed_answers_ahead_are_read,
          _of(tuple(replace(x, workers=(1, 1), protected=False,
                            faults=tuple(replace(f, worker=0) for f in x.faults)) for x in _AHEAD))),
)  # fmt: skip
