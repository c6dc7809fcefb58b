"""``blindtune plan``: what a training step of a model will cost, before any worker is there."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from blindtune.client.cli.console import emit, messages, results

if TYPE_CHECKING:
    from blindtune.client.plan.planning import Plan
    from blindtune.client.plan.profiles import Profile

__all__ = ["plan"]

_BITS = 1e6 / 8


def plan(
    model: Annotated[
        str | None, typer.Argument(help="A folder with config.json, or a model on the Hugging Face hub.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision on the hub.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples of a micro-batch.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of each example, padding included.")] = 512,
    micro_batches: Annotated[
        int | None,
        typer.Option(help="Micro-batches that make one step; as many as are in flight unless given."),
    ] = None,
    in_flight: Annotated[int, typer.Option(help="Micro-batches under way at the same time.")] = 1,
    masking: Annotated[
        Literal["shares", "lattice"], typer.Option(help="How operands are hidden.")
    ] = "shares",
    operators: Annotated[
        int | None, typer.Option(help="How many: two unless given, and one for masking 'lattice'.")
    ] = None,
    parameter_set: Annotated[
        str | None, typer.Option(help="Of the masking; q24 or mlwe1280-q24 unless given.")
    ] = None,
    quantization: Annotated[
        str, typer.Option(help="How the workers keep weights: int8, nf4 or nf4-double.")
    ] = "int8",
    head: Annotated[
        str, typer.Option(help="Where the output head is computed: local, remote, or auto.")
    ] = "auto",
    task: Annotated[
        Literal["auto", "instructions", "classification"],
        typer.Option(help="What is trained; auto goes by the architecture."),
    ] = "auto",
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of what the client computes itself.")
    ] = "float32",
    rank: Annotated[int, typer.Option(help="Rank of the LoRA adapter.")] = 8,
    target_modules: Annotated[
        str, typer.Option(help="Layers that get an adapter: all-linear, or names with commas between them.")
    ] = "all-linear",
    bandwidth: Annotated[float, typer.Option(help="Of your network, Mbit/s in each direction.")] = 1000.0,
    upload: Annotated[float | None, typer.Option(help="Mbit/s upwards, where that differs.")] = None,
    latency: Annotated[float, typer.Option(help="Milliseconds of a round trip to the workers.")] = 20.0,
    one_machine: Annotated[
        bool, typer.Option("--one-machine", help="The workers compute on this machine's own processor.")
    ] = False,
    worker_hour: Annotated[float, typer.Option(help="Price of an hour of one worker.")] = 0.0,
    gigabyte: Annotated[float, typer.Option(help="Price of a GB of traffic, in either direction.")] = 0.0,
    worker_device: Annotated[
        str | None, typer.Option(help="h100, cpu, or FILE of a calibration made on the worker's machine.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Calibration of the client, instead of this machine's own.")
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="First measure this machine, which takes a minute."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON on stdout.")] = False,
) -> None:
    """Say what a training step costs: traffic, time, memory, disk and money.

    It needs a model's configuration and no weights, and connects to no worker. Traffic and hints are exact;
    times come from a cost model with the constants of a calibration.
    """
    from blindtune.client.cli.quiet import quiet_libraries
    from blindtune.client.kit.head import checked_head
    from blindtune.client.plan.costs import Link
    from blindtune.client.plan.planning import Settings, make_plan
    from blindtune.client.plan.profiles import profile_for

    if model is None and not calibrate:
        raise typer.BadParameter("name a model, or measure this machine with --calibrate")
    quiet_libraries()
    settings = Settings(
        batch=batch_size,
        length=length,
        micro_batches=in_flight if micro_batches is None else micro_batches,
        in_flight=in_flight,
        masking=masking,
        operators=operators,
        parameter_set=parameter_set,
        quantization=quantization,
        head=checked_head(head),
        task=task,
        dtype=dtype,
        rank=rank,
        target_modules=_targets(target_modules),
        link=None
        if one_machine
        else Link((bandwidth if upload is None else upload) * _BITS, bandwidth * _BITS, latency / 1e3),
        worker_hour=worker_hour,
        gigabyte=gigabyte,
    )
    if calibrate:
        _calibrate(profile, json)
    constants = profile_for(profile, worker_device)
    if model is None:
        return
    made = make_plan(model, revision, settings, constants)
    if json:
        emit(
            "plan",
            **asdict(made),
            tokens_per_second=made.tokens_per_second,
            cost=made.cost,
        )
    else:
        _show(made, settings.protocol.operators, constants)


def _targets(names: str) -> str | tuple[str, ...]:
    return names if names == "all-linear" else tuple(x.strip() for x in names.split(","))


def _calibrate(path: Path | None, json: bool) -> None:
    from blindtune.client.plan.calibration import calibrate
    from blindtune.client.plan.profiles import calibrated_path, save_profile

    target = calibrated_path() if path is None else path
    if not json:
        messages.print("Measuring this machine; nothing else should run on it meanwhile ...")
    measured = calibrate()
    save_profile(measured, target)
    if json:
        emit("calibration", path=str(target), **asdict(measured))
    else:
        messages.print(f"Kept in {target}", highlight=False, soft_wrap=True)


def _show(made: "Plan", operators: int, constants: "Profile") -> None:
    memory, busy = made.memory, made.busy
    each = ", ".join(f"{name} {_seconds(value)}" for name, value in busy.items() if value)
    lines = {
        "model": f"{made.architecture}, {made.layers} frozen layers, {made.trained:,} trained parameters",
        "step": f"{made.tokens:,} tokens in {_seconds(made.seconds)}, {made.tokens_per_second:,.1f} a second",
        "bound by": made.bound,
        "busy": f"{each} (of the client's, {_seconds(made.local_seconds)} for its own part of the model)",
        "traffic": f"{_bytes(made.bytes_up)} up, {_bytes(made.bytes_down)} down, {made.rounds:,} rounds",
        "client": f"{_bytes(memory.client)} of memory: activations {_bytes(memory.activations)}, buffers "
        f"{_bytes(memory.buffers)}, adapter and optimizer {_bytes(memory.adapter)}; "
        f"{_bytes(memory.mapped)} mapped from files",
        "hints": f"{_bytes(memory.hints)} on the client's disk" if memory.hints else "",
        "workers": f"{operators} x {_bytes(memory.worker)} of memory",
        "cost": f"{made.cost:.3g} a step: workers {made.worker_cost:.3g}, traffic {made.traffic_cost:.3g}; "
        f"{made.cost / made.tokens * 1e6:.3g} for a million tokens"
        if made.cost
        else "",
        "constants": f"client: {constants.client.name}, in {constants.client.parameter_set}; "
        f"worker: {constants.worker.name}",
    }
    for name, text in lines.items():
        if text:
            results.print(f"{name:10} {text}", markup=False, highlight=False, soft_wrap=True)


def _seconds(value: float) -> str:
    return f"{value * 1e3:,.1f} ms" if value < 1 else f"{value:,.2f} s"


def _bytes(value: float) -> str:
    return f"{value / 1e9:,.2f} GB" if value >= 1e9 else f"{value / 1e6:,.1f} MB"
