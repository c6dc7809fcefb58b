"""Requests that run and wait in threads: whose turn it is, they are told."""

import threading
from contextlib import ExitStack

import pytest

from blindtune.server.admission.fair_queue import State
from blindtune.server.admission.limits import Limits
from blindtune.server.admission.places import WINDOW_BYTES, LeftError, Place, Places, bounds_of
from blindtune.server.admission.rate import RateLimit
from blindtune.server.admission.refusals import Busy, Draining
from blindtune.server.admission.watchdog import Watchdog

PATIENCE = 60


def places(**limits: float) -> Places:
    """Places of a worker that runs one request at a time."""
    return Places(bounds_of(Limits(**{"max_concurrent": 1, **limits})))  # type: ignore[arg-type]


def lined_up(held: ExitStack, worker: Places, client: str, size: int = 0) -> Place:
    """A request that runs or waits until the stack is left."""
    place = held.enter_context(worker.place(client))
    place.line_up(1, size)
    return place


def test_a_request_waits_until_the_one_before_has_ended() -> None:
    worker, order = places(), list[str]()
    with ExitStack() as waits:
        with ExitStack() as runs:
            lined_up(runs, worker, "first").wait_for_turn()
            second = lined_up(waits, worker, "second")
            assert (worker.inside, worker.waiting) == (1, 1)
            thread = threading.Thread(target=lambda: (second.wait_for_turn(), order.append("second")))
            thread.start()
            order.append("first")
        thread.join(PATIENCE)
        assert order == ["first", "second"]
        assert not worker.wait_until_empty(0)
    assert worker.wait_until_empty(0)


def test_who_left_before_or_after_lining_up_is_told_and_takes_no_place() -> None:
    worker = places()
    with ExitStack() as held:
        runs = lined_up(held, worker, "runs")
        waits, arrives = lined_up(held, worker, "waits"), held.enter_context(worker.place("arrives"))
        for place in (waits, arrives, runs):
            place.leave()
            place.leave()
        with pytest.raises(LeftError):
            waits.wait_for_turn()
        with pytest.raises(LeftError):
            arrives.line_up(1, 0)
        # One that runs still computes: its place is taken until it has ended.
        assert runs.ticket.state is State.RUNNING
        assert (worker.inside, worker.waiting) == (1, 0)
    assert (worker.inside, worker.waiting) == (0, 0)


def test_what_waits_counts_with_a_window_of_its_operand() -> None:
    worker = places(max_waiting_bytes_per_client=2 * WINDOW_BYTES + 10)
    with ExitStack() as held:
        lined_up(held, worker, "runs")
        for size in (100 * WINDOW_BYTES, 9, WINDOW_BYTES):
            lined_up(held, worker, "waits", size)
        with pytest.raises(Busy, match="that wait hold"), ExitStack() as more:
            lined_up(more, worker, "waits", 2)
        lined_up(held, worker, "waits", 1)


def test_one_whose_client_is_slow_goes_on_beside_another() -> None:
    now = 0.0
    worker, watchdog = places(), Watchdog(20.0, 1, lambda: now)
    with ExitStack() as held:
        slow, next_one = lined_up(held, worker, "slow"), lined_up(held, worker, "next")
        patience = held.enter_context(watchdog.watch(lambda: None))
        with slow.running(patience, 100), patience.waiting():
            now = 1.5
            watchdog.sweep()
            next_one.wait_for_turn()
            assert worker.inside == 2
        lined_up(held, worker, "third").leave()


def test_a_closed_worker_admits_nobody_and_drops_who_waits() -> None:
    worker = Places(bounds_of(Limits(max_concurrent=1)), RateLimit(0.5, lambda: 0.0))
    with ExitStack() as held:
        lined_up(held, worker, "runs")
        waits = lined_up(held, worker, "waits")
        worker.close()
        with pytest.raises(Draining):
            waits.wait_for_turn()
        # Whoever asks too often hears of that too: it can go elsewhere.
        with pytest.raises(Draining), worker.place("runs"):
            pass


def test_who_asks_too_often_is_refused_and_manifests_count_too() -> None:
    worker = Places(bounds_of(Limits()), RateLimit(1, lambda: 0.0))
    worker.count("x")
    with worker.place("x"):
        pass
    with pytest.raises(Busy, match="1 times a second"), worker.place("x"):
        pass
    with pytest.raises(Busy):
        worker.count("x")
    worker.count("y")


@pytest.mark.parametrize("registered", ["before", "after"])
def test_who_is_dropped_without_a_header_holds_no_thread_for_long(registered: str) -> None:
    now = 0.0
    watchdog, worker, cancelled = Watchdog(20, 1, lambda: now), places(), list[str]()
    with ExitStack() as held:
        arrives, waits = (
            held.enter_context(worker.place("arrives")),
            held.enter_context(worker.place("waits")),
        )
        patiences = {
            name: held.enter_context(watchdog.watch(lambda name=name: cancelled.append(name)))  # type: ignore[misc]
            for name in ("arrives", "waits")
        }
        if registered == "before":
            arrives.hurried_by(patiences["arrives"].hurry)
        waits.hurried_by(patiences["waits"].hurry)
        lined_up(held, worker, "runs").wait_for_turn()
        waits.line_up(1, 0)
        held.enter_context(patiences["arrives"].waiting())
        worker.close()
        if registered == "after":
            arrives.hurried_by(patiences["arrives"].hurry)
        now = 0.9
        assert watchdog.sweep() == 0
        # The one that waits for its turn is woken up, and needs nobody to cancel it.
        now = 1.1
        assert watchdog.sweep() == 1 and cancelled == ["arrives"]
