"""Bugs in the client and the worker that show with a fault of the network, a worker or the client."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest

from blindtune.client.operators import operator, policy, transport
from blindtune.client.operators.asking import Asking
from blindtune.client.operators.decisions import Attempt, Failure
from blindtune.client.operators.habits import Habits
from blindtune.client.operators.policy import WorkerPolicy
from blindtune.client.rounds import multiplier
from blindtune.errors import OperatorUnavailableError
from blindtune.proto import worker_pb2
from blindtune.protocol.lattice.stock import Stock
from blindtune.protocol.masks import Share
from blindtune.protocol.parameters import Q31
from blindtune.protocol.shares.masks_ahead import MasksAhead
from blindtune.protocol.shares.source import ShareSource
from blindtune.protocol.verification import CheckVectors
from blindtune.server import service
from blindtune.server.admission.places import Place, Places
from blindtune.server.admission.watchdog import Watchdog
from simulation.network import Damage
from simulation.planting import Plant
from simulation.schedules import Fault, Schedule
from simulation.training import Job
from simulation.transport import SimulatedTransport
from simulation.world import World

__all__ = ["PLANTS"]


def _schedule(
    *faults: Fault,
    workers: Sequence[int] = (1, 1),
    protected: bool = False,
    lattice: bool = False,
    job: Job = Job(steps=1, micro_batches=2, rows=5, data=0),  # noqa: B008 - frozen
    max_concurrent: int = 8,
    ahead: bool = False,
) -> Callable[[int], Schedule]:
    """A schedule whose faults strike a little later with each number."""

    def of(number: int) -> Schedule:
        moved = tuple(replace(fault, at=fault.at + 0.003 * number) for fault in faults)
        masking = "lattice" if lattice else "shares"
        return Schedule(
            number,
            masking,  # type: ignore[arg-type]
            (1,) if lattice else tuple(workers),
            job,
            1024,
            max_concurrent,
            protected,
            moved,
            ahead,
        )

    return of


def _attempts_without_deadline(patch: pytest.MonkeyPatch) -> None:
    real = operator.OperatorClient.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        self._asking._timeout = 1e12

    patch.setattr(operator.OperatorClient, "__init__", init)
    patch.setattr(Habits, "silence", lambda *arguments: 1e12)
    patch.setattr(policy, "_HEDGES", 0.0)


def _answers_go_to_who_asked_first(patch: pytest.MonkeyPatch) -> None:
    real = SimulatedTransport.multiply
    waiting: list[Any] = []
    parked: dict[int, Any] = {}

    def multiply(self: Any, request: Any, timeout: float, answer: Any, stop: Any) -> Any:
        waiting.append(request)
        try:
            for _ in real(self, request, timeout, answer, stop):
                pass
        finally:
            earlier = [x for x in waiting[: waiting.index(request)] if x.product == request.product]
            waiting.remove(request)
        if earlier:
            parked.setdefault(id(earlier[0]), answer.copy())
        answer[:] = parked.pop(id(request), answer)
        yield len(answer)

    patch.setattr(SimulatedTransport, "multiply", multiply)


def _no_second_attempt(patch: pytest.MonkeyPatch) -> None:
    real = WorkerPolicy.failed

    def failed(self: WorkerPolicy, request: Any, attempt: Attempt, failure: Failure, *rest: Any) -> None:
        real(self, request, attempt, failure, *rest)
        for state in self._workers:
            state.excluded = "one failure is enough"

    patch.setattr(WorkerPolicy, "failed", failed)


def _never_rejoined(patch: pytest.MonkeyPatch) -> None:
    real = WorkerPolicy.failed

    def failed(self: WorkerPolicy, request: Any, attempt: Attempt, failure: Failure, *rest: Any) -> None:
        real(self, request, attempt, failure, *rest)
        if failure is Failure.UNREACHABLE:
            self._workers[attempt.worker].excluded = "gone"

    patch.setattr(WorkerPolicy, "failed", failed)


def _liars_are_asked_again(patch: pytest.MonkeyPatch) -> None:
    real = WorkerPolicy.failed

    def failed(self: WorkerPolicy, request: Any, attempt: Attempt, failure: Failure, *rest: Any) -> None:
        real(self, request, attempt, Failure.BUSY if failure is Failure.LIED else failure, *rest)

    patch.setattr(WorkerPolicy, "failed", failed)


def _in_flight_forever(patch: pytest.MonkeyPatch) -> None:
    real = WorkerPolicy.succeeded

    def succeeded(self: WorkerPolicy, attempt: Attempt, now: float) -> None:
        real(self, attempt, now)
        self._workers[attempt.worker].in_flight += 1

    patch.setattr(WorkerPolicy, "succeeded", succeeded)


def _busy_is_final(patch: pytest.MonkeyPatch) -> None:
    codes = transport._FAILURES | {grpc.StatusCode.RESOURCE_EXHAUSTED: Failure.INCOMPATIBLE}
    patch.setattr(transport, "_FAILURES", codes)


def _no_verification(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CheckVectors, "_compare", lambda *arguments: None)


def _rows(messages: Any) -> bytes:
    return b"".join(worker_pb2.MultiplyResponse.FromString(message).residues for message in messages)


def _first_row_verified_only(patch: pytest.MonkeyPatch) -> None:
    real = CheckVectors._compare

    def read(request: Any, messages: Any, answer: Any) -> Any:
        whole = _rows(messages)[: answer.nbytes]
        answer.data.cast("B")[: len(whole)] = whole
        yield len(answer)

    patch.setattr("simulation.transport.read_rows", read)
    patch.setattr(
        CheckVectors,
        "_compare",
        lambda self, operand, v, expected, response: real(
            self, None if operand is None else operand[:1], v, expected[:, :1], response[:1]
        ),
    )


def _length_of_answers_unchecked(patch: pytest.MonkeyPatch) -> None:
    def read(request: Any, messages: Any, answer: Any) -> Any:
        answer[:] = np.frombuffer(_rows(messages), "<u4").reshape(answer.shape)
        yield len(answer)

    patch.setattr("simulation.transport.read_rows", read)


def _words_beyond_the_modulus_accepted(patch: pytest.MonkeyPatch) -> None:
    real = CheckVectors._compare
    patch.setattr(
        CheckVectors,
        "_compare",
        lambda self, *expected_and_response: real(
            self, *expected_and_response[:-1], expected_and_response[-1] % np.uint32(Q31.modulus)
        ),
    )


def _retried_with_a_new_mask(patch: pytest.MonkeyPatch) -> None:
    real = multiplier.RemoteMultiplier.multiply_reals

    def multiply(self: Any, *arguments: Any) -> Any:
        try:
            return real(self, *arguments)
        except OperatorUnavailableError:
            return real(self, *arguments)

    patch.setattr(multiplier.RemoteMultiplier, "multiply_reals", multiply)
    _no_second_attempt(patch)


def _retried_with_other_bytes(patch: pytest.MonkeyPatch) -> None:
    real = Asking._exchange
    seen: set[int] = set()

    def exchange(self: Any, question: Any, running: Any, answer: Any) -> Any:
        request = question.request
        if id(request) in seen and request.share.seed is None:
            share = Share(request.share.recipient, np.roll(request.share.residues, 1, axis=0))
            question = replace(question, request=replace(request, share=share))
        seen.add(id(request))
        return real(self, question, running, answer)

    patch.setattr(Asking, "_exchange", exchange)


def _any_operator_will_do(patch: pytest.MonkeyPatch) -> None:
    real = Asking._exchange
    everyone: dict[str, dict[str, Any]] = {}

    def exchange(self: Any, question: Any, running: Any, answer: Any) -> Any:
        own = everyone.setdefault(self._transports[0]._client, {})
        own[self._name] = self
        others = [asking for name, asking in own.items() if name != self._name]
        if others and self._policy.describe(running.attempt.worker) != "not asked yet":
            return real(others[0], question, running, answer)
        return real(self, question, running, answer)

    patch.setattr(Asking, "_exchange", exchange)


def _same_seeds_after_a_restart(patch: pytest.MonkeyPatch) -> None:
    real = World.source

    def source(self: World) -> Any:
        self._drawn = 0
        return real(self)

    patch.setattr(World, "source", source)


def _rows_handed_out_twice(patch: pytest.MonkeyPatch) -> None:
    real = Stock.draw

    def draw(self: Stock, product: Any, rows: int) -> Any:
        runs = real(self, product, rows)
        runs[-1].block.drawn -= 1
        return runs

    patch.setattr(Stock, "draw", draw)


def _mask_ahead_used_twice(patch: pytest.MonkeyPatch) -> None:
    def take(self: MasksAhead[Any], product: Any, rows: int) -> Any:
        return next((mask for *key, mask in self._waiting if key == [product, rows]), None)

    patch.setattr(MasksAhead, "take", take)


def _zero_rows_in_the_clear(patch: pytest.MonkeyPatch) -> None:
    real = ShareSource.hide_reals

    def hide_reals(self: Any, x: Any, *arguments: Any) -> Any:
        masked, scales = real(self, x, *arguments)
        rows = masked.shares[-1].residues.copy()
        rows[~x.any(axis=1)] = 0
        shares = (*masked.shares[:-1], Share(masked.shares[-1].recipient, rows))
        return replace(masked, shares=shares), scales

    patch.setattr(ShareSource, "hide_reals", hide_reals)


def _place_kept_by_those_who_left(patch: pytest.MonkeyPatch) -> None:
    real = Places.place
    kept: list[Any] = []

    @contextmanager
    def place(self: Places, *arguments: Any) -> Iterator[Place]:
        with contextlib.ExitStack() as stack:
            inside = stack.enter_context(real(self, *arguments))
            try:
                yield inside
            except BaseException:
                kept.append(stack.pop_all())
                raise

    patch.setattr(Places, "place", place)


def _no_watchdog(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Watchdog, "sweep", lambda self: 0)


def _slept_away(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(policy, "_JUMP_SECONDS", float("inf"))


def _memory_error_blames_the_client(patch: pytest.MonkeyPatch) -> None:
    real = service._status_of

    def status(error: Exception) -> Any:
        if isinstance(error, MemoryError):
            return grpc.StatusCode.INVALID_ARGUMENT, "too much"
        return real(error)

    patch.setattr(service, "_status_of", status)


def _a_lie_is_no_failure_of_ours(patch: pytest.MonkeyPatch) -> None:
    real = Asking._note_failure

    def note(self: Any, worker: int, label: str, failure: Failure, detail: str) -> None:
        real(self, worker, label, failure, detail)
        if failure is Failure.LIED:
            raise ValueError(detail)

    patch.setattr(Asking, "_note_failure", note)


def _checkpoint_ahead_of_its_adapter(patch: pytest.MonkeyPatch) -> None:
    real = World.save

    def save(self: World, state: Any) -> None:
        real(self, replace(state, adapter=self.saved.adapter) if self.lives == 1 else state)

    patch.setattr(World, "save", save)


def _at(kind: Any, seconds: float = 5.0, operator: int | None = 0, **more: Any) -> Fault:
    return Fault(0.001, kind, operator, None if operator is None else 0, seconds, **more)


_LIE = _at("lie", lie="one residue is off by one", operator=1)
_BEYOND = _at("lie", lie="y + q", operator=1)


def _damaged(kind: Any, side: str, operator: int = 1) -> Fault:
    return _at(f"damaged {side}", operator=operator, damage=Damage(kind, 1))


_LONG = Job(steps=1, micro_batches=1, rows=9, data=0)
_STEPS = Job(steps=2, micro_batches=1, rows=5, data=0)

PLANTS: tuple[Plant, ...] = (
    Plant("delays", "an attempt has no deadline", "finite", _attempts_without_deadline,
          _schedule(_at("slow network", 1e5))),
    Plant("reordering", "answers go to whoever asked first", "honest workers",
          _answers_go_to_who_asked_first, _schedule(_at("reordering", operator=1), protected=True)),
    Plant("drops", "a request is not repeated", "alive", _no_second_attempt,
          _schedule(_damaged("drop", "request"), protected=True)),
    Plant("drops", "a repeated request gets a new mask", "one mask", _retried_with_a_new_mask,
          _schedule(_damaged("drop", "answer"))),
    Plant("half-open connections", "an attempt has no deadline", "finite", _attempts_without_deadline,
          _schedule(_at("half-open", 1e5))),
    Plant("half-open connections", "the worker waits for its client for ever", "bounded memory",
          _no_watchdog, _schedule(_at("stalled stranger"))),
    Plant("duplicated streams", "the length of an answer goes unchecked", "typed error",
          _length_of_answers_unchecked, _schedule(_damaged("duplicate", "answer"))),
    Plant("truncated streams", "only the first row is verified", "result", _first_row_verified_only,
          _schedule(_damaged("truncate", "answer", 0), _damaged("truncate", "answer", 1), job=_LONG)),
    Plant("corrupted streams", "answers are not verified", "result", _no_verification,
          _schedule(_damaged("corrupt", "answer", 0), _damaged("corrupt", "answer", 1))),
    Plant("slow readers", "a client that leaves keeps its place", "bounded memory",
          _place_kept_by_those_who_left, _schedule(_at("slow reader", 2000.0))),
    Plant("restarts", "a worker that was gone stays out", "alive", _never_rejoined,
          _schedule(_at("restart"), protected=True)),
    Plant("restarts", "a repeated request has other bytes", "same bytes", _retried_with_other_bytes,
          _schedule(_at("restart", operator=1))),
    Plant("restarts", "when one operator fails, the other is asked", "recipient", _any_operator_will_do,
          _schedule(_at("restart", operator=1))),
    Plant("restarts", "what is under way is counted wrongly", "bounded memory", _in_flight_forever,
          _schedule(_at("restart"))),
    Plant("clock jumps", "time asleep counts as trying", "alive", _slept_away,
          _schedule(replace(_at("restart"), at=0.02), replace(_at("clock jump", 1e6, None), at=0.1),
                    protected=True)),
    Plant("lying workers", "answers are not verified", "result", _no_verification, _schedule(_LIE)),
    Plant("lying workers", "y + q passes", "result", _words_beyond_the_modulus_accepted, _schedule(_BEYOND)),
    Plant("lying workers", "a liar is asked again", "quarantine", _liars_are_asked_again, _schedule(_LIE)),
    Plant("lying workers", "a lie ends in an error of another kind", "typed error",
          _a_lie_is_no_failure_of_ours, _schedule(_LIE)),
    Plant("busy workers", "a busy worker is given up", "alive", _busy_is_final,
          _schedule(protected=True, max_concurrent=1)),
    Plant("out of memory", "the worker blames the client", "alive", _memory_error_blames_the_client,
          _schedule(_at("out of memory"), protected=True)),
    Plant("client killed", "the same seeds after a restart", "fresh masks", _same_seeds_after_a_restart,
          _schedule(_at("client killed", operator=None))),
    Plant("client killed", "a checkpoint is ahead of its adapter", "resumable",
          _checkpoint_ahead_of_its_adapter, _schedule(_at("client killed", operator=None), job=_STEPS)),
    Plant("short operands", "a lattice mask's row is handed out twice", "fresh masks",
          _rows_handed_out_twice, _schedule(lattice=True)),
    Plant("masks ahead", "a mask drawn ahead hides two operands", "fresh masks", _mask_ahead_used_twice,
          _schedule(job=replace(_STEPS, steps=4), ahead=True)),
    Plant("rows of zeros", "they travel in the clear", "fresh masks", _zero_rows_in_the_clear,
          _schedule(job=Job(2, 3, 5, 0))),
)  # fmt: skip
