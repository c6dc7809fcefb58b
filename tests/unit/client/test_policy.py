"""Which worker is asked next, on a clock that the test moves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blindtune.client.operators.decisions import (
    LATE_TRIES,
    Ask,
    Attempt,
    Failure,
    GiveUp,
    Request,
    Wait,
)
from blindtune.client.operators.policy import WorkerPolicy

PATIENCE, LONGEST_ATTEMPT, FIRST_PAUSE, LONGEST_PAUSE = 60.0, 1000.0, 0.5, 4.0
FOR_EVER = 1e9


def _policy(workers: int, patience: float = PATIENCE) -> WorkerPolicy:
    return WorkerPolicy(workers, patience, LONGEST_ATTEMPT, FIRST_PAUSE, LONGEST_PAUSE)


def _send(policy: WorkerPolicy, request: Request, now: float) -> Attempt:
    decision = policy.choose(request, now)
    assert isinstance(decision, Ask), decision
    return decision.attempt


def _ask(policy: WorkerPolicy, request: Request, now: float) -> int:
    return _send(policy, request, now).worker


def _fail(
    policy: WorkerPolicy, request: Request, failure: Failure, detail: str = "", at: float = 0, now: float = 0
) -> int:
    """Sends a request at one moment, which fails at another; returns the worker."""
    attempt = _send(policy, request, at)
    policy.failed(request, attempt, failure, detail, max(at, now))
    return attempt.worker


def test_requests_at_the_same_time_spread_over_all_replicas() -> None:
    policy = _policy(3)
    assert [_ask(policy, policy.request(0), 0) for _ in range(6)] == [0, 1, 2, 0, 1, 2]


def test_the_worker_that_finished_first_is_asked_first() -> None:
    policy = _policy(3)
    attempts = [_send(policy, policy.request(0), 0) for _ in range(3)]
    policy.succeeded(attempts[1], 0)
    assert _ask(policy, policy.request(0), 0) == 1


def test_a_failed_request_goes_to_a_replica_at_once() -> None:
    policy = _policy(2)
    request = policy.request(0)
    first = _fail(policy, request, Failure.UNREACHABLE, "gone")
    assert _ask(policy, request, 0) == 1 - first


def test_a_busy_worker_is_asked_again_after_a_pause() -> None:
    policy = _policy(1)
    request = policy.request(0)
    _fail(policy, request, Failure.BUSY)
    assert policy.choose(request, 0) == Wait(FIRST_PAUSE)
    assert _ask(policy, request, FIRST_PAUSE) == 0
    assert not policy.is_excluded(0)


def test_pauses_double_up_to_a_limit_and_a_success_ends_them() -> None:
    policy = _policy(1, patience=FOR_EVER)
    request, now, pauses = policy.request(0), 0.0, []
    for _ in range(5):
        _fail(policy, request, Failure.UNREACHABLE, at=now)
        decision = policy.choose(request, now)
        assert isinstance(decision, Wait)
        pauses.append(decision.seconds)
        now += decision.seconds
    assert pauses == [0.5, 1.0, 2.0, 4.0, 4.0]
    policy.succeeded(_send(policy, request, now), now)
    _fail(policy, request, Failure.UNREACHABLE, at=now)
    assert policy.choose(request, now) == Wait(FIRST_PAUSE)


def test_a_pausing_worker_is_passed_over_by_new_requests() -> None:
    policy = _policy(2)
    _fail(policy, policy.request(0), Failure.UNREACHABLE)
    assert [_ask(policy, policy.request(0), 0) for _ in range(3)] == [1, 1, 1]


def test_a_liar_is_not_asked_again_by_any_request_however_long_it_takes() -> None:
    policy = _policy(2, patience=FOR_EVER)
    request = policy.request(0)
    _fail(policy, request, Failure.LIED)
    assert policy.is_excluded(0)
    for now in (0, 1, 1e6):
        assert _ask(policy, request, now) == 1
        assert _ask(policy, policy.request(now), now) == 1


@pytest.mark.parametrize(
    "after", ["succeeded", "overtaken", "abandoned", *(x for x in Failure if x is not Failure.LIED)]
)
def test_whatever_comes_of_requests_under_way_does_not_bring_a_liar_back(after: str | Failure) -> None:
    policy = _policy(2)
    requests = [policy.request(0) for _ in range(5)]
    attempts = [_send(policy, request, 0) for request in requests]
    assert [x.worker for x in attempts] == [0, 1, 0, 1, 0]
    policy.failed(requests[2], attempts[2], Failure.LIED, "row 0", 1)
    for place in (0, 4):
        if isinstance(after, Failure):
            policy.failed(requests[place], attempts[place], after, "later", 2)
        elif after == "abandoned":
            policy.abandoned(attempts[place])
        else:
            getattr(policy, after)(attempts[place], 2)
        assert policy.is_excluded(0)
    for now in (2, 1e6):
        assert [_ask(policy, policy.request(now), now) for _ in range(3)] == [1, 1, 1]
    last = policy.request(1e6)
    policy.failed(last, _send(policy, last, 1e6), Failure.LIED, "row 0", 1e6)
    decision = policy.choose(policy.request(1e6), 1e6)
    assert isinstance(decision, GiveUp) and decision.lied


def test_when_all_lied_or_serve_something_else_the_request_ends_at_once() -> None:
    policy = _policy(2)
    request = policy.request(0)
    _fail(policy, request, Failure.LIED, "row 0")
    _fail(policy, request, Failure.INCOMPATIBLE, "other model")
    assert isinstance(policy.choose(request, 0), GiveUp)
    assert isinstance(policy.choose(policy.request(1), 1), GiveUp)
    assert "row 0" in policy.describe(0)
    assert "other model" in policy.describe(1)


def test_a_request_is_tried_for_as_long_as_the_patience_lasts_and_no_longer() -> None:
    policy = _policy(1)
    request, now = policy.request(0), 0.0
    while not isinstance(decision := policy.choose(request, now), GiveUp):
        if isinstance(decision, Ask):
            policy.failed(request, decision.attempt, Failure.UNREACHABLE, "gone", now)
        else:
            now += decision.seconds
    assert PATIENCE - LONGEST_PAUSE <= now <= PATIENCE
    assert "60 s" in decision.reason


def test_a_machine_that_slept_has_lost_no_patience() -> None:
    policy = _policy(1)
    request = policy.request(0)
    _fail(policy, request, Failure.UNREACHABLE)
    assert policy.choose(request, 0) == Wait(FIRST_PAUSE)
    woken = FIRST_PAUSE + 3600
    _fail(policy, request, Failure.UNREACHABLE, at=woken)
    assert isinstance(policy.choose(request, woken), Wait)
    # It slept in the middle of an attempt too; what an attempt may take counts.
    woken += 2 * FIRST_PAUSE
    _fail(policy, request, Failure.UNREACHABLE, at=woken, now=woken + 7200)
    assert isinstance(policy.choose(request, woken + 7200), GiveUp)


def test_a_busy_worker_is_asked_again_though_others_used_up_all_patience() -> None:
    policy = _policy(2)
    request = policy.request(0)
    _fail(policy, request, Failure.BUSY)
    now = PATIENCE + 1
    assert _fail(policy, request, Failure.UNREACHABLE, now=now) == 1
    turned_down = 1
    while isinstance(decision := policy.choose(request, now), Ask | Wait):
        if isinstance(decision, Wait):
            now += decision.seconds
            continue
        assert decision.worker == 0
        turned_down += 1
        policy.failed(request, decision.attempt, Failure.BUSY, "full", now)
    assert turned_down == LATE_TRIES


def test_who_says_busy_after_a_long_time_is_not_asked_again_once_patience_has_ended() -> None:
    policy = _policy(1)
    request = policy.request(0)
    now = PATIENCE + 1
    _fail(policy, request, Failure.BUSY, now=now)
    assert isinstance(policy.choose(request, now), GiveUp)


def test_nobody_waits_for_a_worker_that_comes_back_too_late() -> None:
    policy = _policy(1, patience=FIRST_PAUSE / 2)
    request = policy.request(0)
    _fail(policy, request, Failure.UNREACHABLE)
    assert isinstance(policy.choose(request, 0), GiveUp)


def test_without_any_patience_a_request_is_still_tried_once() -> None:
    policy = _policy(1, patience=0)
    assert _ask(policy, policy.request(5), 5) == 0


def test_a_replica_that_was_never_asked_is_asked_though_the_first_attempt_took_all_the_patience() -> None:
    """One attempt may take longer than the patience: a worker that hangs must not hide its replica."""
    policy = _policy(2)
    request = policy.request(0)
    late = PATIENCE * 5
    hanging = _fail(policy, request, Failure.SILENT, now=late)
    assert _ask(policy, request, late) == 1 - hanging


def test_a_late_lie_does_not_hide_the_replica() -> None:
    policy = _policy(2, patience=0)
    request = policy.request(0)
    _fail(policy, request, Failure.LIED, now=1)
    assert _ask(policy, request, 1) == 1


def test_an_interrupted_request_leaves_its_worker_as_it_was() -> None:
    policy = _policy(2)
    policy.abandoned(_send(policy, policy.request(0), 0))
    assert [_ask(policy, policy.request(0), 0) for _ in range(2)] == [0, 1]
    assert policy.describe(0) == "not asked yet"


_OUTCOMES = st.lists(
    st.tuples(st.sampled_from(["ok", "interrupted", "overtaken", *Failure]), st.floats(0, 20)),
    min_size=1,
    max_size=60,
)


@given(workers=st.integers(1, 4), outcomes=_OUTCOMES, patience=st.floats(0, 100))
def test_whatever_happens_every_request_ends_and_no_excluded_worker_is_asked(
    workers: int, outcomes: list[tuple[object, float]], patience: float
) -> None:
    policy = _policy(workers, patience)
    now = 0.0
    excluded: set[int] = set()
    script = iter(outcomes)
    for _ in range(len(outcomes)):
        request, started, waits, late = policy.request(now), now, 0, 0.0
        while True:
            decision = policy.choose(request, now)
            if isinstance(decision, GiveUp):
                break
            if isinstance(decision, Wait):
                assert decision.seconds > 0
                now += decision.seconds
                waits += 1
                late += min(decision.seconds, max(0.0, now - started - patience))
                assert late <= workers * LATE_TRIES * LONGEST_PAUSE + 1e-3
                continue
            assert decision.worker not in excluded
            outcome, seconds = next(script, ("ok", 0.0))
            now += seconds
            if outcome == "ok":
                policy.succeeded(decision.attempt, now)
                break
            if outcome == "interrupted":
                policy.abandoned(decision.attempt)
                break
            if outcome == "overtaken":
                policy.overtaken(decision.attempt, now)
                break
            assert isinstance(outcome, Failure)
            policy.failed(request, decision.attempt, outcome, "", now)
            if outcome in (Failure.LIED, Failure.INCOMPATIBLE):
                excluded.add(decision.worker)
        assert waits <= len(outcomes) + 1
    assert all(policy.is_excluded(i) == (i in excluded) for i in range(workers))
    # Nothing is in flight any more: as many requests as there are workers left get one each.
    left = [i for i in range(workers) if i not in excluded]
    assert sorted(_ask(policy, policy.request(FOR_EVER), FOR_EVER) for _ in left) == left
