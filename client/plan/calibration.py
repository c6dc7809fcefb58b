"""Measures the constants of the cost model on this machine, with the code that training runs."""

from collections.abc import Callable
from typing import TypeVar

import torch

from blindtune.client.plan.loopback import loopback
from blindtune.client.plan.measured_local import LocalRates, measure_local, measure_optimizer
from blindtune.client.plan.measured_memory import measure_memory
from blindtune.client.plan.measured_rounds import RoundRates, measure_rounds
from blindtune.client.plan.processor import processor_name
from blindtune.client.plan.profiles import ClientProfile, Profile, WorkerProfile
from blindtune.errors import ConfigurationError
from blindtune.protocol.kernels.allocator import keep_freed_memory

__all__ = ["calibrate", "plausible"]

Rates = TypeVar("Rates", RoundRates, LocalRates)

_ATTEMPTS = 3
# What no machine does in no time. Of the rest, some may be too little to be seen beside them.
_NEVER_NOTHING = {
    "shares_up": "masking",
    "lattice_block": "lattice masks",
    "operation": "a worker's products",
    "expanded": "seeds",
    "byte": "transport",
    "flop": "products in float32",
    "half_flop": "products in bfloat16",
    "moved": "reading and writing float32",
    "half_moved": "reading and writing bfloat16",
}


def calibrate() -> Profile:
    """This machine as client and as worker, with the maskings' own parameter sets. Nothing else should run.

    Raises:
        ConfigurationError: no worker can be started here, or the machine is too busy.
    """
    keep_freed_memory()  # as a client does
    memory = measure_memory()  # first, while this process holds nothing else
    with loopback() as here:
        parameter_set = here.remote.source.parameters.name
        rounds = plausible(lambda: measure_rounds(here))
        local = plausible(lambda: measure_local(here.ask))
    trained = measure_optimizer()
    name = f"{processor_name()}, {torch.get_num_threads()} threads"
    # Both ends of a transport are alike, and were measured together.
    byte, request = rounds.byte / 2, rounds.request / 2
    return Profile(
        ClientProfile(
            name=name,
            parameter_set=parameter_set,
            shares_round=rounds.round,
            shares_up=rounds.shares_up,
            shares_down=rounds.shares_down,
            lattice_round=rounds.lattice_round,
            lattice_up=rounds.lattice_up,
            lattice_down=rounds.lattice_down,
            lattice_block=rounds.lattice_block,
            byte=byte,
            request=request,
            turn=rounds.turn,
            flop=local.flop,
            half_flop=local.half_flop,
            moved=local.moved,
            half_moved=local.half_moved,
            call=local.call,
            shared=local.shared,
            fresh=local.fresh,
            attended=local.attended,
            half_attended=local.half_attended,
            trained=trained,
            resident=memory.resident,
            spread=memory.spread,
        ),
        WorkerProfile(
            name=name,
            operation=rounds.operation,
            weight=rounds.weight,
            operand=rounds.operand,
            expanded=rounds.expanded,
            output=rounds.output,
            byte=byte,
            request=request + rounds.product,
        ),
    )


def plausible(measure: Callable[[], Rates]) -> Rates:
    """What is measured, again if the machine was so busy that nothing can be made of it.

    Raises:
        ConfigurationError: it is that busy all the time.
    """
    lost: list[str] = []
    for _ in range(_ATTEMPTS):
        rates = measure()
        lost = [what for name, what in _NEVER_NOTHING.items() if getattr(rates, name, 1.0) <= 0]
        if not lost:
            return rates
    raise ConfigurationError(
        f"this machine was too busy to be measured: in {_ATTEMPTS} attempts, {', '.join(lost)} took no time "
        "that could be told from the rest. Try again when nothing else runs on it"
    )
