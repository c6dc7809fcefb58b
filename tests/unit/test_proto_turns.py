"""The order in which requests that share a connection send their messages."""

import threading
from collections.abc import Iterator

import pytest

from blindtune.proto.turns import Turns

PATIENCE = 30.0


class Requests:
    """Requests whose messages are taken by threads, as gRPC does.

    Attributes:
        order: of the messages, as they were taken.
    """

    def __init__(self, turns: Turns) -> None:
        self.order: list[bytes] = []
        self._turns = turns
        self._threads: list[threading.Thread] = []

    def send(self, messages: list[bytes], left: int | None = None) -> None:
        left = sum(map(len, messages)) if left is None else left

        def run() -> None:
            for message in self._turns.in_turn(messages, left):
                self.order.append(message)

        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()

    def until_ready(self, count: int) -> None:
        """Waits until so many messages wait for their turn."""
        with self._turns._changed:
            for _ in range(100 * int(PATIENCE)):
                if len(self._turns._ready) == count:
                    return
                self._turns._changed.wait(0.01)
        raise AssertionError("no message waits for its turn")

    def join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a message waits for ever"


def _under_way(turns: Turns) -> Iterator[bytes]:
    """A request whose only message is on its way, until the iterator goes on or is closed."""
    blocker = turns.in_turn([b"first"], 0)
    assert next(blocker) == b"first"
    return blocker


def test_the_request_with_the_least_left_goes_first_and_goes_on() -> None:
    turns = Turns(PATIENCE)
    requests, blocker = Requests(turns), _under_way(turns)
    requests.send([b"long 1", b"long 2", b"long 3"])
    requests.until_ready(1)
    requests.send([b"short 1", b"short 2"])
    requests.until_ready(2)
    assert not requests.order, "one message is under way"
    list(blocker)
    requests.join()
    assert requests.order == [b"short 1", b"short 2", b"long 1", b"long 2", b"long 3"]


def test_what_was_sent_is_no_longer_left() -> None:
    turns = Turns(PATIENCE)
    requests, blocker = Requests(turns), _under_way(turns)
    requests.send([b"aaaa", b"a"], left=5)
    requests.until_ready(1)
    requests.send([b"bb", b"bbb", b"b"], left=6)
    requests.until_ready(2)
    list(blocker)
    requests.join()
    assert requests.order == [b"aaaa", b"a", b"bb", b"bbb", b"b"]


def test_a_shorter_request_comes_in_between_the_messages_of_a_longer_one() -> None:
    turns = Turns(PATIENCE)
    requests = Requests(turns)
    long = turns.in_turn([b"long 1", b"long 2"], 12)
    requests.order.append(next(long))
    requests.send([b"short"])
    requests.until_ready(1)
    requests.order += long
    requests.join()
    assert requests.order == [b"long 1", b"short", b"long 2"]


def test_equally_long_requests_go_in_the_order_in_which_they_were_ready() -> None:
    turns = Turns(PATIENCE)
    requests, blocker = Requests(turns), _under_way(turns)
    for i in range(5):
        requests.send([b"%d" % i])
        requests.until_ready(i + 1)
    list(blocker)
    requests.join()
    assert requests.order == [b"0", b"1", b"2", b"3", b"4"]


def test_a_request_that_is_closed_gives_its_turn_away() -> None:
    turns = Turns(PATIENCE)
    requests, blocker = Requests(turns), _under_way(turns)
    requests.send([b"next"], 0)
    requests.until_ready(1)
    blocker.close()
    requests.join()
    assert requests.order == [b"next"]


def test_a_request_that_is_stuck_stops_nobody_and_takes_no_turn_away_later() -> None:
    turns = Turns(0.01)
    requests, stuck = Requests(turns), _under_way(turns)
    requests.send([b"a", b"b"])
    requests.join()
    assert requests.order == [b"a", b"b"]
    holder = _under_way(turns)
    list(stuck)  # goes on at last, while another message is under way
    assert turns._under_way is not None
    list(holder)
    assert turns._under_way is None


def test_an_error_of_the_messages_leaves_no_turn_taken() -> None:
    def broken() -> Iterator[bytes]:
        yield b"one"
        raise ValueError("no more")

    turns = Turns(PATIENCE)
    taken = []
    try:
        for message in turns.in_turn(broken(), 0):
            taken.append(message)
    except ValueError as error:
        assert str(error) == "no more"
    assert taken == [b"one"]
    assert list(turns.in_turn([b"two"], 0)) == [b"two"]


def test_a_wait_that_is_interrupted_leaves_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(PATIENCE)
    blocker = _under_way(turns)

    def interrupted(*arguments: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(turns._changed, "wait_for", interrupted)
        next(turns.in_turn([b"short"], -1))
    list(blocker)
    assert not turns._ready and turns._under_way is None
