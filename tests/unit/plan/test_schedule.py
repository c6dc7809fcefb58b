"""Micro-batches in flight: by hand, and between the bounds that no schedule can leave."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blindtune.client.plan.schedule import LATENCY, RESOURCES, Stage, schedule

ROUND = [Stage("client", 1.0), Stage("upload", 2.0), Stage("workers", 3.0), Stage("download", 2.0)]


def test_one_in_flight_takes_the_sum() -> None:
    result = schedule(ROUND, micro_batches=3, in_flight=1)
    assert result.seconds == 3 * 8.0
    assert result.busy == {"client": 3.0, "upload": 6.0, "workers": 9.0, "download": 6.0, "latency": 0.0}
    assert result.bound == "workers"


def test_many_in_flight_take_the_busiest_part_and_a_fill() -> None:
    # The workers begin after 1 + 2 seconds, are never idle again, and 2 seconds follow.
    assert schedule(ROUND, micro_batches=10, in_flight=10).seconds == 3.0 + 10 * 3.0 + 2.0


def test_two_in_flight_overlap_as_on_paper() -> None:
    # The second uploads from 3 to 5, waits for the workers until 6, and leaves them at 9.
    assert schedule(ROUND, micro_batches=2, in_flight=2).seconds == 3.0 + 2 * 3.0 + 2.0


def test_latency_is_waited_for_side_by_side() -> None:
    chain = [Stage("client", 0.1), Stage(LATENCY, 10.0)]
    result = schedule(chain, micro_batches=4, in_flight=4)
    assert result.seconds == pytest.approx(10.4)
    assert result.bound == LATENCY
    assert result.busy[LATENCY] == 40.0


def test_the_client_goes_on_with_the_oldest_micro_batch() -> None:
    # At 2 the first comes back, after the third became ready at 1: the first goes on all the same.
    chain = [Stage("client", 1.0), Stage(LATENCY, 1.0), Stage("client", 1.0)]
    assert schedule(chain, micro_batches=3, in_flight=3).seconds == 6.0
    first_long = [Stage("client", 1.0), Stage(LATENCY, 0.5), Stage("client", 1.0), Stage("upload", 5.0)]
    # First: 0-1, from 2 (the second had the client) to 3, uploads 3-8. Second: 1-2, 3-4, uploads 8-13.
    assert schedule(first_long, micro_batches=2, in_flight=2).seconds == 13.0


def test_workers_on_the_clients_processor_do_not_overlap_with_it() -> None:
    chain = [Stage("client", 1.0), Stage("workers", 2.0), Stage("client", 1.0)]
    assert schedule(chain, micro_batches=5, in_flight=5, one_machine=True).seconds == 20.0
    assert schedule(chain, micro_batches=5, in_flight=5).seconds < 15.0


_stages = st.lists(
    st.builds(Stage, st.sampled_from(RESOURCES), st.floats(0.0, 10.0)), min_size=1, max_size=12
)


@given(_stages, st.integers(1, 6), st.data())
def test_no_schedule_beats_its_busiest_part_or_is_slower_than_the_sum(
    chain: list[Stage], micro_batches: int, data: st.DataObject
) -> None:
    in_flight = data.draw(st.integers(1, micro_batches))
    result = schedule(chain, micro_batches, in_flight)
    total = sum(x.seconds for x in chain)
    shared = max(seconds for name, seconds in result.busy.items() if name != LATENCY)
    least = max(total, shared)
    assert least - 1e-6 <= result.seconds <= micro_batches * total + 1e-6
    assert sum(result.busy.values()) == pytest.approx(micro_batches * total)
