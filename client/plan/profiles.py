"""The constants of the cost model, each a time for a unit of work, and where they come from.

A client and a worker are described apart, so that this machine can be planned with another one's GPU.
`blindtune.client.plan.calibration` measures them; those of `SHIPPED` stand in until then.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from blindtune.client.process.disk import disk_errors_are_clear, file_written_at_once
from blindtune.errors import ConfigurationError
from blindtune.protocol.parameters import PARAMETER_SETS

__all__ = [
    "CPU_CLIENT",
    "SHIPPED",
    "ClientProfile",
    "Profile",
    "WorkerProfile",
    "calibrated_path",
    "load_profile",
    "profile_for",
    "save_profile",
]

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_POSITIVE = Field(gt=0)
_NOT_NEGATIVE = Field(ge=0)
_AT_LEAST_ONE = Field(ge=1)
_PARAMETER_SET = Field(pattern=f"^({'|'.join(PARAMETER_SETS)})$")


@dataclass(frozen=True, config=_STRICT)
class WorkerProfile:
    """What a worker takes for one request. All are seconds for one unit, with all its cores or its GPU.

    Attributes:
        name: what was measured.
        operation: an operation of the int8 passes, of which a product of R rows, contraction c and outputs o
            takes 2 R c o for each limb of the modulus.
        weight: a weight that is read, however many rows meet it.
        operand: an element of the operand: checked, split into limbs, on its way to a GPU.
        expanded: an element of an operand that is expanded from a seed, besides that.
        output: an element of the result: recombined, on its way back.
        byte: of payload received or sent.
        request: a request, however small.
    """

    name: str
    operation: float = _POSITIVE
    weight: float = _NOT_NEGATIVE
    operand: float = _NOT_NEGATIVE
    expanded: float = _NOT_NEGATIVE
    output: float = _NOT_NEGATIVE
    byte: float = _NOT_NEGATIVE
    request: float = _NOT_NEGATIVE


@dataclass(frozen=True, config=_STRICT)
class ClientProfile:
    """What a client takes. Numbers but the last two are seconds for one unit, with all its cores.

    Attributes:
        name: what was measured.
        parameter_set: that products were measured with, of the residues.
        shares_round: a product, however small, besides its requests.
        shares_up: an element of an operand, for each seed: quantized, masked, checked against.
        shares_down: an element of an answer: checked, unmasked, rescaled.
        lattice_round: a product under lattice masks, however small.
        lattice_up: an element of an operand: the same, noise included.
        lattice_down: the same for an answer.
        lattice_block: an element of A S or H S in a block of 256 rows, with a rank of 5.
        byte: of payload sent or received.
        request: a product's request to one operator, however small.
        turn: a product's wait for threads and processes that its requests wake up, to however many operators.
        flop, half_flop: a floating-point operation of the local part's matrix products, in float32 and in
            bfloat16.
        moved, half_moved: a byte that its operations read or write, of other types and of bfloat16.
        call: one operation of it, however small.
        shared: one that several threads share, besides that: they are woken up and waited for.
        fresh: a byte of an array for which the system has to provide memory.
        attended, half_attended: a block of at most 32 queries of one head in the backward pass of attention,
            besides its products, in float32 and in bfloat16.
        trained: a parameter in the optimizer's step.
        resident: bytes of a process that has the libraries loaded, has used them, and keeps nothing else.
        spread: bytes that a process grows to for each byte of activations and intermediate results that are
            there at once, where their arrays are not too large for memory to be kept for the next ones.
    """

    name: str
    parameter_set: str = _PARAMETER_SET
    shares_round: float = _NOT_NEGATIVE
    shares_up: float = _NOT_NEGATIVE
    shares_down: float = _NOT_NEGATIVE
    lattice_round: float = _NOT_NEGATIVE
    lattice_up: float = _NOT_NEGATIVE
    lattice_down: float = _NOT_NEGATIVE
    lattice_block: float = _NOT_NEGATIVE
    byte: float = _NOT_NEGATIVE
    request: float = _NOT_NEGATIVE
    turn: float = _NOT_NEGATIVE
    flop: float = _POSITIVE
    half_flop: float = _POSITIVE
    moved: float = _NOT_NEGATIVE
    half_moved: float = _NOT_NEGATIVE
    call: float = _NOT_NEGATIVE
    shared: float = _NOT_NEGATIVE
    fresh: float = _NOT_NEGATIVE
    attended: float = _NOT_NEGATIVE
    half_attended: float = _NOT_NEGATIVE
    trained: float = _NOT_NEGATIVE
    resident: int = _NOT_NEGATIVE
    spread: float = _AT_LEAST_ONE


@dataclass(frozen=True, config=_STRICT)
class Profile:
    """A calibration: this machine as client, and as worker."""

    client: ClientProfile
    worker: WorkerProfile


CPU_CLIENT = ClientProfile(
    name="2 cores with AVX-512 (shipped)",
    parameter_set="q31",
    shares_round=0.2e-3,
    shares_up=5e-9,
    shares_down=2e-9,
    lattice_round=1e-3,
    lattice_up=5e-9,
    lattice_down=2e-9,
    lattice_block=2e-9,
    byte=0.4e-9,
    request=1e-3,
    turn=1e-3,
    flop=1 / 120e9,
    half_flop=1 / 500e9,
    moved=0.05e-9,
    half_moved=0.08e-9,
    call=10e-6,
    shared=80e-6,
    fresh=0.2e-9,
    attended=12e-6,
    half_attended=48e-6,
    trained=8e-9,
    resident=450 << 20,
    spread=2.2,
)

SHIPPED = {
    "cpu": WorkerProfile(
        name="2 cores with AVX-512 VNNI (shipped)",
        operation=1 / 900e9,
        weight=0.5e-9,
        operand=0.5e-9,
        expanded=1e-9,
        output=0.5e-9,
        byte=0.4e-9,
        request=1e-3,
    ),
    # From products of 1024 rows with 28672 x 4096 weights in 5.8 ms and 57344 x 8192 weights in 12.8 ms, host
    # to host: the two equations give 1.6e15 operations a second and 155 ps an element. Bytes, seeds
    # and requests are the processor's work, and those of the processor above.
    "h100": WorkerProfile(
        name="NVIDIA H100 (shipped)",
        operation=0.624e-15,
        weight=0.0,
        operand=0.155e-9,
        expanded=1e-9,
        output=0.155e-9,
        byte=0.4e-9,
        request=1e-3,
    ),
}
"""Workers that were measured, by name."""


def calibrated_path() -> Path:
    """Where this machine's calibration is kept, beside the kits that are made at first use."""
    root = Path(os.environ.get("BLINDTUNE_CACHE", Path.home() / ".cache" / "blindtune"))
    return root / "plan.json"


def save_profile(profile: Profile, path: Path) -> None:
    """Writes a calibration.

    Raises:
        ResourceError: the disk is full.
    """
    with disk_errors_are_clear(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(asdict(profile), indent=1) + "\n"
        file_written_at_once(path, lambda file: file.write(content.encode()))


def load_profile(path: Path) -> Profile:
    """Reads a calibration.

    Raises:
        ConfigurationError: the file can't be read, or is none.
    """
    try:
        return TypeAdapter(Profile).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigurationError(
            f"{path} is no calibration: {where}: {first['msg']}; "
            "make it again with blindtune plan --calibrate"
        ) from None
    except OSError as error:
        raise ConfigurationError(f"the calibration {path} can't be read: {error.strerror}") from None


def profile_for(file: Path | None, worker: str | None) -> Profile:
    """The constants to plan with.

    Args:
        file: a calibration; this machine's own if None, and the shipped one if there is none.
        worker: a name in `SHIPPED` or the file of another calibration; as in ``file`` if None.

    Raises:
        ConfigurationError: a file can't be read, or there is no such worker.
    """
    own = calibrated_path()
    if file is not None or own.exists():
        profile = load_profile(own if file is None else file)
    else:
        profile = Profile(CPU_CLIENT, SHIPPED["cpu"])
    if worker is None:
        return profile
    if worker in SHIPPED:
        return Profile(profile.client, SHIPPED[worker])
    if not Path(worker).is_file():
        raise ConfigurationError(
            f"--worker-device is one of {', '.join(SHIPPED)} or the file of a calibration, not {worker}"
        )
    return Profile(profile.client, load_profile(Path(worker)).worker)
