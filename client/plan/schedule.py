"""How long micro-batches in flight take, that share one client, one network and the operators' workers.

Each micro-batch is a chain: the client computes, residues go up, workers multiply, answers come down, and
so on. Of micro-batches in flight, the client computes one at a time, of those that are ready the oldest,
as `blindtune.client.rounds.overlap` does; whatever else is shared serves those first that come first. The
chains are followed event by event. With one in flight a step takes the sum of its parts; with many, what the
busiest part takes, and the time in which the others fill and drain.
"""

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["LATENCY", "RESOURCES", "Resource", "Schedule", "Stage", "schedule"]

Resource = Literal["client", "upload", "workers", "download", "latency"]

RESOURCES: tuple[Resource, ...] = get_args(Resource)
"""In the order in which a product takes them."""

LATENCY: Resource = "latency"
"""Waiting that any number of micro-batches do at once."""


@dataclass(frozen=True)
class Stage:
    """A part of a micro-batch's chain.

    Attributes:
        resource: what it takes.
        seconds: for how long.
    """

    resource: Resource
    seconds: float


@dataclass(frozen=True)
class Schedule:
    """The outcome.

    Attributes:
        seconds: from the first stage to the last.
        busy: seconds that each resource is taken, all micro-batches together.
        bound: what holds up the step: the resource that is busy for longest, or latency where each
            micro-batch in flight waits for longer than that.
    """

    seconds: float
    busy: dict[Resource, float]
    bound: Resource


def schedule(
    chain: Sequence[Stage], micro_batches: int, in_flight: int, one_machine: bool = False
) -> Schedule:
    """Follows equal micro-batches through their stages.

    Args:
        chain: the stages of each.
        micro_batches: how many there are.
        in_flight: how many of them at once, the oldest first.
        one_machine: whether the workers compute on the client's own processor.
    """
    busy = dict.fromkeys(RESOURCES, 0.0)
    for stage in chain:
        busy[stage.resource] += micro_batches * stage.seconds
    shared: dict[Resource, Resource] = {"workers": "client"} if one_machine else {}
    position = [0] * micro_batches
    waiting: defaultdict[Resource, list[tuple[float, int]]] = defaultdict(list)
    taken: set[Resource] = set()
    events: list[tuple[float, int]] = [(0.0, i) for i in range(min(in_flight, micro_batches))]
    begun = len(events)
    now = 0.0

    def of(number: int) -> Resource:
        resource = chain[position[number]].resource
        return shared.get(resource, resource)

    def start(number: int) -> None:
        heapq.heappush(events, (now + chain[position[number]].seconds, number))
        position[number] += 1

    def begin(number: int) -> None:
        """A micro-batch comes to its next stage."""
        resource = of(number)
        if resource == LATENCY:
            start(number)
        elif resource in taken:
            # The client takes the oldest micro-batch; others serve in order of arrival.
            heapq.heappush(waiting[resource], (0.0 if resource == "client" else now, number))
        else:
            taken.add(resource)
            start(number)

    while events:
        now, number = heapq.heappop(events)
        if position[number]:
            left = chain[position[number] - 1].resource
            left = shared.get(left, left)
            if left != LATENCY:
                taken.discard(left)
        else:
            left = LATENCY
        if position[number] < len(chain):
            begin(number)
        elif begun < micro_batches:
            heapq.heappush(events, (now, begun))
            begun += 1
        if left not in taken and waiting[left]:
            taken.add(left)
            start(heapq.heappop(waiting[left])[1])
    # Those in flight wait for latency side by side.
    bounds = busy | {LATENCY: busy[LATENCY] / in_flight}
    return Schedule(now, busy, max(RESOURCES, key=lambda x: bounds[x]))
