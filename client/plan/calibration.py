"""Measures the constants of the cost model on this machine, with the code that training runs."""

import platform
from pathlib import Path

import torch

from blindtune.client.plan.measured_local import measure_local, measure_optimizer
from blindtune.client.plan.measured_rounds import measure_rounds
from blindtune.client.plan.profiles import ClientProfile, Profile, WorkerProfile
from blindtune.protocol.allocator import keep_freed_memory

__all__ = ["calibrate"]


def calibrate() -> Profile:
    """This machine as client and as worker. Nothing else should run meanwhile.

    Raises:
        ConfigurationError: no worker can be started here.
    """
    keep_freed_memory()  # as a client does
    resident = _anonymous_bytes()
    rounds = measure_rounds()
    local = measure_local()
    name = f"{_processor()}, {torch.get_num_threads()} threads"
    # Both ends of a transport are alike, and were measured together.
    byte, request = rounds.byte / 2, rounds.request / 2
    return Profile(
        ClientProfile(
            name=name,
            shares_round=rounds.round,
            shares_up=rounds.shares_up,
            shares_down=rounds.shares_down,
            lattice_round=rounds.lattice_round,
            lattice_up=rounds.lattice_up,
            lattice_down=rounds.lattice_down,
            lattice_block=rounds.lattice_block,
            byte=byte,
            request=request,
            flop=local.flop,
            half_flop=local.half_flop,
            moved=local.moved,
            call=local.call,
            trained=measure_optimizer(),
            resident=resident,
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


def _anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
