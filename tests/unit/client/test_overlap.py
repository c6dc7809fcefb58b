"""The baton: threads compute one at a time, and wait side by side."""

import random
import threading
from collections.abc import Callable

import pytest

from blindtune.client.rounds.overlap import Baton, Dropped, waiting

PATIENCE = 30


class Threads:
    """Threads that a test starts; their errors are kept."""

    def __init__(self) -> None:
        self.errors: dict[int, BaseException] = {}
        self._threads: list[threading.Thread] = []

    def start(self, baton: Baton, number: int, compute: Callable[[], None]) -> None:
        def run() -> None:
            try:
                with baton.turn(number):
                    compute()
            except BaseException as error:
                self.errors[number] = error

        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a thread waits for ever"


@pytest.fixture
def threads() -> Threads:
    return Threads()


def _wait(event: threading.Event) -> None:
    with waiting():
        assert event.wait(PATIENCE)


def _until_wanted_by(baton: Baton, count: int) -> None:
    """Waits until so many threads ask for the baton. Asking tells nobody, so it is looked at repeatedly."""
    with baton._changed:
        for _ in range(100 * PATIENCE):
            if len(baton._wanted) == count:
                return
            baton._changed.wait(0.01)
    raise AssertionError("nobody asks for the baton")


def test_while_one_waits_another_computes_and_never_two_at_once(threads: Threads) -> None:
    baton = Baton()
    inside, seen = [0], [0]

    def compute(number: int) -> None:
        draw = random.Random(number)
        for _ in range(50):
            inside[0] += 1
            assert inside[0] == 1
            for _ in range(draw.randrange(200)):
                seen[0] += 1  # a moment in which another thread could come in
            assert inside[0] == 1
            inside[0] -= 1
            with waiting():
                threading.Event().wait(draw.choice((0.0, 0.0001)))

    for number in range(8):
        threads.start(baton, number, lambda number=number: compute(number))
    threads.join()
    assert not threads.errors


def test_a_thread_that_waits_lets_others_finish(threads: Threads) -> None:
    baton = Baton()
    finished = threading.Event()
    threads.start(baton, 0, lambda: _wait(finished))
    threads.start(baton, 1, finished.set)
    threads.join()
    assert not threads.errors


def test_of_those_that_want_it_the_lowest_number_goes_first(threads: Threads) -> None:
    order: list[int] = []
    baton = Baton(lambda last, now: order.append(now))
    answer = threading.Event()
    with baton.turn(9):
        for number in (3, 1, 2, 0):
            threads.start(baton, number, lambda: _wait(answer))
        _until_wanted_by(baton, 4)
    with baton.turn(9):
        del order[:]
        answer.set()
        _until_wanted_by(baton, 4)
    threads.join()
    assert order == [0, 1, 2, 3]
    assert not threads.errors


def test_who_had_it_last_is_told_when_another_takes_it_over_and_only_then(threads: Threads) -> None:
    handed: list[tuple[int | None, int]] = []
    baton = Baton(lambda last, now: handed.append((last, now)))
    with baton.turn(0):
        for _ in range(3):
            with waiting():
                pass
        assert handed == [(None, 0)]
        with waiting():
            threads.start(baton, 5, lambda: None)
            threads.join()
    assert handed == [(None, 0), (0, 5), (5, 0)]


def test_an_error_while_waiting_is_handled_with_the_baton(threads: Threads) -> None:
    baton = Baton()
    with baton.turn(0):
        with pytest.raises(ConnectionError, match="gone"), waiting():
            raise ConnectionError("gone")
        threads.start(baton, 1, lambda: None)
        _until_wanted_by(baton, 1)  # and so it does not run
    threads.join()
    assert not threads.errors


def test_an_error_gives_the_baton_to_the_next(threads: Threads) -> None:
    baton = Baton()
    with pytest.raises(ValueError, match="broken"), baton.turn(0):
        raise ValueError("broken")
    threads.start(baton, 1, lambda: None)
    threads.join()
    assert not threads.errors


def test_a_dropped_turn_ends_when_its_answer_is_there_and_earlier_ones_go_on(threads: Threads) -> None:
    baton = Baton()
    answer = threading.Event()
    waits = [threading.Event() for _ in range(3)]
    went_on: list[int] = []

    def compute(number: int) -> None:
        with waiting():
            waits[number].set()
            assert answer.wait(PATIENCE)
            if number == 2:
                raise ConnectionError("its worker is gone")
        went_on.append(number)

    for number in range(3):
        threads.start(baton, number, lambda number=number: compute(number))
    assert all(event.wait(PATIENCE) for event in waits)
    baton.drop_from(1)
    threads.start(baton, 3, lambda: went_on.append(3))
    answer.set()
    threads.join()
    assert went_on == [0]
    assert {number: type(error) for number, error in threads.errors.items()} == {
        1: Dropped,
        2: ConnectionError,
        3: Dropped,
    }


def test_without_a_baton_waiting_changes_nothing() -> None:
    with waiting():
        pass
    with pytest.raises(ConnectionError), waiting():
        raise ConnectionError


def test_a_thread_has_one_turn_at_a_time() -> None:
    with Baton().turn(0), pytest.raises(RuntimeError, match="already"), Baton().turn(1):
        pass
    with Baton().turn(2):
        pass  # and the first one is over


def test_a_baton_that_cannot_be_handed_over_holds_up_nobody() -> None:
    def handed(last: int | None, now: int) -> None:
        if now == 0:
            raise MemoryError

    baton = Baton(handed)
    with pytest.raises(MemoryError), baton.turn(0):
        raise AssertionError("the turn began")
    with baton.turn(1):
        pass
