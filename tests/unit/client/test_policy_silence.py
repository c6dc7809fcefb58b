"""How long a worker is waited for, when a replica is asked meanwhile, and when one is set aside."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blindtune.client.operators.decisions import Ask, Attempt, Failure, GiveUp, Keep, Request, Stop, Wait
from blindtune.client.operators.pace import Pace
from blindtune.client.operators.policy import WorkerPolicy

PATIENCE, LONGEST_ATTEMPT = 60.0, 300.0
MIB = 1 << 20


def _policy(workers: int = 2, acknowledges: bool = False, patience: float = PATIENCE) -> WorkerPolicy:
    policy = WorkerPolicy(workers, patience, LONGEST_ATTEMPT)
    for worker in range(workers):
        policy.acknowledges(worker, acknowledges)
    return policy


def _send(policy: WorkerPolicy, request: Request, now: float) -> Attempt:
    decision = policy.choose(request, now)
    assert isinstance(decision, Ask), decision
    return decision.attempt


def _answered(
    policy: WorkerPolicy, requests: int, seconds: float, rows: int = 1, now: float = 0.0, queued: float = 0.0
) -> None:
    """So many requests of a MiB for each row are answered by each worker, each after so many seconds."""
    for _ in range(requests):
        attempts = [_send(policy, policy.request(now, rows, MIB), now) for _ in policy.ready(now)]
        assert sorted(x.worker for x in attempts) == policy.ready(now)
        for attempt in attempts:
            attempt.look = now + seconds  # as if it had been looked at
            policy.heard(attempt, 0, now + queued)
            policy.succeeded(attempt, now + seconds)


def _stuck(policy: WorkerPolicy, now: float, rows: int = 1) -> tuple[Request, Attempt]:
    """A request that the first worker has taken."""
    request = policy.request(now, rows, MIB)
    return request, _send(policy, request, now)


def _watch(
    policy: WorkerPolicy, request: Request, attempt: Attempt, until: float = 1e4
) -> tuple[float, list[tuple[float, Attempt]]]:
    """Looks at an attempt as often as it says; when it is stopped, and what hedges were sent when."""
    now, hedges = attempt.look, []
    while now < until:
        decision = policy.look(request, attempt, now)
        if isinstance(decision, Stop):
            return now, hedges
        if decision.hedge is not None:
            hedges.append((now, decision.hedge))
        assert 0 < decision.seconds == pytest.approx(attempt.look - now)
        now = attempt.look
    return until, hedges


def test_a_worker_is_waited_for_ten_times_as_long_as_usual_and_no_less_than_a_floor() -> None:
    for usual, longest in ((0.01, 10.0), (0.9, 10.0), (5.0, 50.0), (100.0, 300.0)):
        policy = _policy()
        _answered(policy, 8, usual)
        ended, _ = _watch(policy, *_stuck(policy, 1000.0), until=1e4 if longest < 300 else 1301)
        assert ended - 1000 == pytest.approx(longest), usual


def test_longer_requests_are_given_more_time_and_short_ones_say_nothing_against_it() -> None:
    policy = _policy()
    _answered(policy, 8, 2.0, rows=1)
    ended, _ = _watch(policy, *_stuck(policy, 0.0, rows=8))
    assert ended == pytest.approx(8 * 20.0)
    policy = _policy()
    _answered(policy, 8, 2.0, rows=1)
    # And long ones are no reason to wait for a short one as long.
    _answered(policy, 8, 4.0, rows=8, now=500.0)
    ended, _ = _watch(policy, *_stuck(policy, 1000.0))
    assert ended - 1000 == pytest.approx(20.0)


def test_one_slow_answer_among_many_changes_nothing_and_a_slow_network_is_learned() -> None:
    pace = Pace()
    for _ in range(15):
        pace.note(MIB, 1.0)
    pace.note(MIB, 100.0)
    assert pace.usual(MIB) == 1.0
    pace.note(MIB, 100.0)
    assert pace.usual(MIB) == 100.0


@given(st.lists(st.tuples(st.integers(1, 1 << 40), st.floats(0, 1e3)), min_size=1), st.integers(1, 1 << 40))
def test_longer_requests_never_have_less_time_whatever_was_seen(
    seen: list[tuple[int, float]], size: int
) -> None:
    pace = Pace()
    assert pace.usual(size) is None
    for some, seconds in seen:
        pace.note(some, seconds)
    usual = [x for n in range(-40, 40) if (x := pace.usual(int(size * 2.0**n))) is not None]
    assert len(usual) == 80 and usual == sorted(usual)


def test_a_worker_can_not_make_its_own_slowness_usual() -> None:
    policy = _policy()
    for _ in range(20):
        slow, fast = (_send(policy, policy.request(0, 1, MIB), 0) for _ in range(2))
        slow.look = 100.0
        policy.succeeded(fast, 1.0)
        policy.succeeded(slow, 25.0)
    # Four times as slow as its replica is believed, more is not: 40 s instead of 250.
    ended, _ = _watch(policy, *_stuck(policy, 1000.0))
    assert ended - 1000 == pytest.approx(40.0)


def test_a_row_now_and_then_does_not_keep_an_attempt_alive() -> None:
    policy = _policy()
    _answered(policy, 8, 0.01)
    request, attempt = _stuck(policy, 0.0)
    now, rows = attempt.look, 0
    while isinstance(policy.look(request, attempt, now), Keep):
        rows += 1
        policy.heard(attempt, rows, now)
        now = attempt.look
    assert now <= 4 * 10.0 + 1e-6
    assert rows > 4


def test_who_acknowledges_must_do_so_within_seconds() -> None:
    policy = _policy(acknowledges=True)
    _answered(policy, 8, 0.5, queued=0.01)
    ended, _ = _watch(policy, *_stuck(policy, 0.0))
    assert ended == pytest.approx(5.0)
    slow = _policy(acknowledges=True)
    _answered(slow, 8, 3.0, queued=2.0)
    ended, _ = _watch(slow, *_stuck(slow, 0.0))
    assert ended == pytest.approx(20.0)


def test_a_request_that_waits_in_a_queue_is_not_silent_for_half_a_minute() -> None:
    policy = _policy(acknowledges=True)
    _answered(policy, 8, 0.5, queued=0.01)
    request, attempt = _stuck(policy, 0.0)
    policy.heard(attempt, 0, 0.1)
    ended, _ = _watch(policy, request, attempt)
    assert ended == pytest.approx(30.1)
    policy.abandoned(attempt)
    # Once rows come, it is no queue that it waits in.
    request, attempt = _stuck(policy, 100.0)
    policy.heard(attempt, 0, 100.1)
    policy.heard(attempt, 3, 125.0)
    ended, _ = _watch(policy, request, attempt)
    assert ended == pytest.approx(135.0)


def test_what_an_old_worker_sends_first_is_not_taken_for_a_place_in_a_queue() -> None:
    policy = _policy(acknowledges=False)
    _answered(policy, 8, 0.01)
    request, attempt = _stuck(policy, 0.0)
    policy.heard(attempt, 0, 2.0)
    ended, _ = _watch(policy, request, attempt)
    assert ended == pytest.approx(12.0)


def test_a_worker_without_a_replica_is_given_more_and_more_time_and_in_the_end_all_of_it() -> None:
    policy = _policy(workers=1)
    _answered(policy, 8, 0.01)
    request, now, took = policy.request(0.0, 1, MIB), 0.0, []
    while not isinstance(decision := policy.choose(request, now), GiveUp):
        if isinstance(decision, Wait):
            now += decision.seconds
            continue
        attempt = decision.attempt
        ended, _ = _watch(policy, request, attempt, until=attempt.started + LONGEST_ATTEMPT)
        took.append(round(ended - attempt.started))
        policy.failed(request, attempt, Failure.SILENT, "", ended)
        now = ended
    assert took == [10, 20, 300]
    assert not policy.is_set_aside(0, now)


def test_of_a_worker_without_a_replica_nothing_is_given_up_before_it_ever_answered() -> None:
    policy = _policy(workers=1)
    ended, _ = _watch(policy, *_stuck(policy, 0.0), until=LONGEST_ATTEMPT)
    assert ended == LONGEST_ATTEMPT


def test_nothing_is_given_up_that_nothing_could_follow() -> None:
    policy = _policy(patience=0.0)
    _answered(policy, 8, 0.01)
    request, first = _stuck(policy, 0.0)
    ended, _ = _watch(policy, request, first)
    assert ended == pytest.approx(10.0), "the replica follows though there is no patience"
    policy.failed(request, first, Failure.SILENT, "", ended)
    ended, _ = _watch(policy, request, _send(policy, request, ended), until=10.0 + LONGEST_ATTEMPT)
    assert ended == 10.0 + LONGEST_ATTEMPT


def test_a_silent_worker_is_set_aside_after_three_silences_in_a_row() -> None:
    policy = _policy()
    _answered(policy, 8, 0.01)
    now, aside = 100.0, None
    for silence in range(3):
        request, attempt = _stuck(policy, now)
        assert attempt.worker == 0
        now, _ = _watch(policy, request, attempt)
        aside = policy.failed(request, attempt, Failure.SILENT, "", now)
        assert (aside is not None) == (silence == 2)
        now += 10.0
    assert aside == 60.0
    assert policy.is_set_aside(0, now) and not policy.is_excluded(0)
    assert [_send(policy, policy.request(now), now).worker for _ in range(5)] == [1] * 5
    assert policy.ready(now) == [1]


def _set_aside(policy: WorkerPolicy, now: float) -> float:
    """Lets the first worker be silent until it is set aside; returns when that ends."""
    while True:
        request, attempt = _stuck(policy, now)
        if attempt.worker != 0:
            policy.abandoned(attempt)
            now += 1.0
            continue
        now += 10.0
        if (seconds := policy.failed(request, attempt, Failure.SILENT, "", now)) is not None:
            return now + seconds


def test_it_is_set_aside_for_longer_each_time_and_tried_by_one_request_when_that_is_over() -> None:
    policy = _policy()
    _answered(policy, 8, 0.01)
    now, times = 0.0, []
    for _ in range(9):
        over = _set_aside(policy, now)
        assert policy.is_set_aside(0, over - 0.01)
        times.append(round(over - now))
        now = over
    assert times[0] > 60 and times[1:4] == [130, 250, 490] and times[-1] == 3610
    attempts = [_send(policy, policy.request(now), now) for _ in range(4)]
    assert [x.worker for x in attempts] == [0, 1, 1, 1]
    # It answers: from now on it is as good as any.
    policy.succeeded(attempts[0], now)
    assert [_send(policy, policy.request(now), now).worker for _ in range(2)] == [0, 0]


def test_silences_at_the_same_time_count_once_and_an_answer_ends_the_row() -> None:
    policy = _policy()
    requests = [policy.request(0.0) for _ in range(8)]
    attempts = [_send(policy, request, 0.0) for request in requests]
    for request, attempt in zip(requests, attempts, strict=True):
        if attempt.worker == 0:
            assert policy.failed(request, attempt, Failure.SILENT, "", 10.0) is None
    for turn in range(1, 8):
        now = 100.0 * turn
        request, attempt = _stuck(policy, now)
        if turn % 2:
            assert policy.failed(request, attempt, Failure.SILENT, "", now + 10) is None
        else:
            policy.succeeded(attempt, now)
        assert not policy.is_set_aside(0, now + 10)


def test_when_all_others_fail_a_worker_that_was_set_aside_is_asked_after_all() -> None:
    for failure in (Failure.UNREACHABLE, Failure.LIED, Failure.INCOMPATIBLE, Failure.SILENT):
        policy = _policy()
        now = _set_aside(policy, 0.0) - 30
        request, attempt = _stuck(policy, now)
        assert attempt.worker == 1
        policy.failed(request, attempt, failure, "", now)
        assert _send(policy, request, now).worker == 0


def test_a_busy_replica_is_no_reason_to_ask_one_that_was_set_aside() -> None:
    policy = _policy()
    now = _set_aside(policy, 0.0) - 30
    request, attempt = _stuck(policy, now)
    policy.failed(request, attempt, Failure.BUSY, "", now)
    decision = policy.choose(request, now)
    assert isinstance(decision, Wait)
    assert _send(policy, request, now + decision.seconds).worker == 1


def test_the_last_worker_is_never_set_aside() -> None:
    for others in (Failure.LIED, Failure.SILENT):
        policy = _policy()
        if others is Failure.SILENT:
            now = _set_aside(policy, 0.0) - 59
        else:
            now = 1.0
            request, attempt = _stuck(policy, now)
            policy.failed(request, attempt, Failure.LIED, "", now)
        for _ in range(5):
            now += 5.0
            request, attempt = _stuck(policy, now)
            assert attempt.worker == 1
            assert policy.failed(request, attempt, Failure.SILENT, "", now + 0.1) is None


def test_a_replica_is_asked_after_four_times_the_usual_time_if_it_has_nothing_to_do() -> None:
    for usual, due in ((0.01, 1.0), (0.5, 2.0), (2.0, 8.0)):
        policy = _policy()
        _answered(policy, 40, usual)
        request, attempt = _stuck(policy, 1000.0)
        ended, hedges = _watch(policy, request, attempt)
        ((when, hedge),) = hedges
        assert when - 1000 == pytest.approx(due)
        assert (hedge.worker, hedge.rows, hedge.size, hedge.is_hedge) == (1, 1, MIB, True)
        assert ended - 1000 == pytest.approx(max(10.0, 10 * usual))


def test_a_replica_that_is_busy_out_silent_pausing_or_too_small_is_not_asked_early() -> None:
    def busy(policy: WorkerPolicy) -> None:
        _send(policy, policy.request(0.0), 0.0)
        _send(policy, policy.request(0.0), 0.0)
        policy.abandoned(_send(policy, policy.request(0.0), 0.0))

    def failed(failure: Failure) -> None:
        policy = _policy()
        _answered(policy, 40, 0.01)
        attempts = [_stuck(policy, 999.9) for _ in range(2)]
        policy.abandoned(attempts[0][1])
        policy.failed(*attempts[1], failure, "", 999.9)
        request, attempt = _stuck(policy, 1000.0)
        assert attempt.worker == 0
        _, hedges = _watch(policy, request, attempt, until=1000.2 if failure is not Failure.LIED else 1e4)
        assert not hedges

    for failure in (Failure.LIED, Failure.UNREACHABLE, Failure.SILENT):
        failed(failure)

    policy = _policy()
    _answered(policy, 40, 0.01)
    request, attempt = _stuck(policy, 1000.0)
    other = _send(policy, policy.request(1000.0), 1000.0)
    assert other.worker == 1
    _, hedges = _watch(policy, request, attempt, until=1005.0)
    assert not hedges, "it has something to do"
    policy.succeeded(other, 1005.0)
    _, hedges = _watch(policy, request, attempt, until=1006.0)
    assert len(hedges) == 1

    policy = _policy()
    _answered(policy, 40, 0.01)
    request = policy.request(1000.0, 10, MIB, most=[10, 9])
    _, hedges = _watch(policy, request, _send(policy, request, 1000.0), until=1009.0)
    assert not hedges, "it does not take as many rows"


def test_at_most_one_in_twenty_requests_is_repeated_early() -> None:
    policy = _policy()
    _answered(policy, 9, 0.01)
    hedged = 0
    for turn in range(400):
        now = 100.0 * turn
        request, attempt = _stuck(policy, now)
        _, hedges = _watch(policy, request, attempt, until=now + 9.0)
        hedged += len(hedges)
        assert hedged <= (18 + turn + 1) / 20
        for _, hedge in hedges:
            policy.abandoned(hedge)
        policy.abandoned(attempt)
    assert hedged == 418 // 20


def test_a_request_is_repeated_once_and_what_repeats_it_never() -> None:
    policy = _policy(workers=3)
    _answered(policy, 100, 0.01)
    request, attempt = _stuck(policy, 1000.0)
    _, hedges = _watch(policy, request, attempt, until=1009.0)
    ((when, hedge),) = hedges
    ended, more = _watch(policy, request, hedge)
    assert not more
    assert ended - when == pytest.approx(10.0)


def test_who_is_overtaken_counts_as_silent_only_if_it_said_nothing() -> None:
    for acknowledged in (True, False):
        policy = _policy(acknowledges=True)
        _answered(policy, 100, 0.01)
        for turn in range(1, 4):
            now = 100.0 * turn
            attempt = _send(policy, policy.request(now), now)
            assert attempt.worker == 0
            if acknowledged:
                policy.heard(attempt, 0, now + 0.1)
            aside = policy.overtaken(attempt, now + 2)
            assert (aside is not None) == (turn == 3 and not acknowledged)
        assert policy.is_set_aside(0, 303.0) != acknowledged


def test_time_asleep_is_held_against_no_worker() -> None:
    policy = _policy()
    _answered(policy, 40, 0.01)
    request, attempt = _stuck(policy, 0.0)
    assert isinstance(policy.look(request, attempt, 3600.0), Keep), "it may have answered meanwhile"
    ended, _ = _watch(policy, request, attempt)
    assert 3605 < ended < 3611
    # What was answered in the meantime says nothing of how long it took.
    attempt = _send(policy, policy.request(4000.0, 1, MIB), 4000.0)
    policy.succeeded(attempt, 7600.0)
    ended, _ = _watch(policy, *_stuck(policy, 8000.0))
    assert ended - 8000 == pytest.approx(10.0)


def test_a_worker_that_takes_fewer_rows_is_asked_for_the_first_of_them() -> None:
    policy = _policy()
    request = policy.request(0.0, 100, MIB, most=[100, 64])
    first = _send(policy, request, 0.0)
    assert (first.worker, first.rows) == (0, 100)
    policy.failed(request, first, Failure.UNREACHABLE, "", 0.0)
    second = _send(policy, request, 0.0)
    assert (second.worker, second.rows, second.size) == (1, 64, 64 * MIB)
    policy.failed(request, second, Failure.UNREACHABLE, "", 0.0)
    assert _send(policy, request, 5.0).rows == 64, "no row is asked for that another request may have by now"


def test_of_two_that_are_free_the_one_that_takes_all_rows_is_asked() -> None:
    policy = _policy()
    assert _send(policy, policy.request(0.0, 100, 1, most=[64, 100]), 0.0).worker == 1
    assert _send(policy, policy.request(0.0, 100, 1, most=[64, 100]), 0.0).worker == 0
