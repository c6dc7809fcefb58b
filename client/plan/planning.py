"""A plan: what a training step of a model costs, from its configuration and a few figures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from blindtune.client.config.parameter_sets import lattice_set, residue_set, set_name
from blindtune.client.kit.groups import products_of
from blindtune.client.kit.head import Head
from blindtune.client.kit.kit import product_outputs
from blindtune.client.plan.asked import Asked, Step, asked_products
from blindtune.client.plan.costs import (
    ANSWERS_KEPT_BYTES,
    KEPT_BYTES,
    Link,
    Matrix,
    Protocol,
    kept_share,
    product_stages,
    waiting_bytes,
    worker_workspace,
)
from blindtune.client.plan.local_work import LocalWork, counted
from blindtune.client.plan.profiles import Profile
from blindtune.client.plan.schedule import Resource, Stage, schedule
from blindtune.client.plan.skeleton import Skeleton, Task, config_folder, skeleton_of
from blindtune.client.plan.traffic import WORD_BYTES, Traffic
from blindtune.errors import ConfigurationError, UnsupportedError
from blindtune.protocol.weights import INT8, SCHEMES, Scheme, kept_bytes, scheme_named

__all__ = ["Memory", "Plan", "Settings", "make_plan"]

_HINT_HEADER_BYTES = 4096
# Of a parameter that is trained: itself, its gradient, and the two moments of AdamW, in float32.
_TRAINED_BYTES = 16
# Of a certificate, for a feature in one direction: words modulo 2^32 and 2^64; of outputs, squares, too.
_CERTIFICATE_BYTES = 4 + 8 + 8 // 2
_MOST = 1 << 30


@dataclass(frozen=True)
class Settings:
    """What a step is planned for.

    Attributes:
        batch: examples of a micro-batch.
        length: tokens of each example, padding included.
        micro_batches: whose gradients make one step.
        in_flight: micro-batches that wait for workers at the same time.
        masking: ``shares`` or ``lattice``.
        operators: None for the fewest that the masking takes.
        parameter_set: of the masking; its own, if None.
        quantization: name of the workers' scheme.
        head: where the output head is computed.
        task: what is trained.
        dtype: of what the client computes itself.
        rank: of the LoRA adapter.
        target_modules: that get one: all-linear, or names.
        link: the network; None for workers on the client's own processor.
        worker_hour: price of an hour of one worker.
        gigabyte: price of 10^9 bytes, in either direction.

    Raises:
        ConfigurationError: they make no sense.
    """

    batch: int = 8
    length: int = 512
    micro_batches: int = 1
    in_flight: int = 1
    masking: Literal["shares", "lattice"] = "shares"
    operators: int | None = None
    parameter_set: str | None = None
    quantization: str = INT8.name
    head: Head = "auto"
    task: Task = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    rank: int = 8
    target_modules: str | tuple[str, ...] = "all-linear"
    link: Link | None = field(default_factory=lambda: Link(125e6, 125e6, 0.02))
    worker_hour: float = 0.0
    gigabyte: float = 0.0

    def __post_init__(self) -> None:
        for name in ("batch", "length", "micro_batches", "in_flight", "rank"):
            if not 1 <= getattr(self, name) < _MOST:
                value = getattr(self, name)
                raise ConfigurationError(f"{name.replace('_', ' ')} must be 1 or more, not {value}")
        if self.in_flight > self.micro_batches:
            raise ConfigurationError(
                f"{self.in_flight} micro-batches can't be in flight where a step has {self.micro_batches}: "
                "ask for more of them, or for fewer in flight"
            )
        if self.masking not in ("shares", "lattice"):
            raise ConfigurationError(f"masking is shares or lattice, not {self.masking}")
        set_name(self.masking, self.parameter_set)
        if self.masking == "shares" and self.protocol.operators < 2:
            raise ConfigurationError("masking 'shares' needs two or more operators")
        if self.masking == "lattice" and self.protocol.operators != 1:
            raise ConfigurationError("masking 'lattice' takes one operator")
        scheme_named(self.quantization, "the quantization")
        if min(self.worker_hour, self.gigabyte) < 0:
            raise ConfigurationError("a price can't be negative")
        link = self.link
        # Written so that what is no number fails too.
        if link is not None and not (link.up > 0 and link.down > 0 and 0 <= link.latency < float("inf")):
            raise ConfigurationError("bandwidth must be positive, and latency must not be negative")

    @property
    def protocol(self) -> Protocol:
        """How operands are masked."""
        if self.masking == "lattice":
            operators = 1 if self.operators is None else self.operators
            lattice = lattice_set(self.parameter_set)
            return Protocol(operators, lattice.residues, lattice)
        residues = residue_set(self.masking, self.parameter_set)
        return Protocol(2 if self.operators is None else self.operators, residues)


@dataclass(frozen=True)
class Memory:
    """Bytes of memory, and of the client's disk.

    Attributes:
        client: that the client must have: libraries, adapter and optimizer, activations, buffers of products.
        adapter: of that, what is trained, with gradients and moments of AdamW.
        activations: of that, what is kept for the backward pass, of all micro-batches in flight.
        buffers: of that, operands, answers and masks of products, intermediate results, and memory between
            arrays that is too little for the next ones.
        mapped: of files that are mapped into the client's memory and given back on demand: parameters that
            stay here, and hints.
        worker: of each worker: libraries, weights, and what requests take.
        hints: on the client's disk.
    """

    client: int
    adapter: int
    activations: int
    buffers: int
    mapped: int
    worker: int
    hints: int


@dataclass(frozen=True)
class Plan:
    """What a training step costs.

    Attributes:
        model: what was asked for.
        architecture: the class that is trained.
        tokens: in a step, padding included.
        layers: frozen layers at the workers.
        trained: parameters of the adapter.
        rounds: products asked for, of all operators at once.
        bytes_up, bytes_down: payload to and from all operators.
        seconds: for the step.
        busy: seconds that client, network and workers are busy; of the workers, one operator's, or on one
            machine all of them together; and latency as all rounds together wait for it.
        local_seconds: of the client's, what it takes for its own part of the model and the optimizer.
        bound: what holds the step up.
        memory: bytes.
        worker_cost: price of the workers' time, if all operators are paid for the whole step.
        traffic_cost: price of the bytes.
        client_profile, worker_profile: names of what the constants are of.
    """

    model: str
    architecture: str
    tokens: int
    layers: int
    trained: int
    rounds: int
    bytes_up: int
    bytes_down: int
    seconds: float
    busy: dict[Resource, float]
    local_seconds: float
    bound: Resource
    memory: Memory
    worker_cost: float
    traffic_cost: float
    client_profile: str
    worker_profile: str

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on in a second."""
        return self.tokens / self.seconds

    @property
    def cost(self) -> float:
        """Of the step, workers and traffic."""
        return self.worker_cost + self.traffic_cost


def make_plan(model: str, revision: str | None, settings: Settings, profile: Profile) -> Plan:
    """Plans a training step.

    Args:
        model: a folder with config.json, or a name on the Hugging Face hub.
        revision: of a model on the hub.
        settings: of the step.
        profile: constants of the cost model.

    Raises:
        CheckpointError: there is no such model, or its configuration can't be read.
        UnsupportedError: the protocol cannot serve it, or a step of it can't be followed.
        ConfigurationError: PEFT refuses the adapter.
    """
    skeleton = skeleton_of(
        config_folder(model, revision), settings.task, settings.head, getattr(torch, settings.dtype)
    )
    shapes, local_bytes = skeleton.shapes, skeleton.local_bytes
    work = LocalWork()
    asked = _asked(skeleton, settings, work)
    if not work.calls:
        raise UnsupportedError(
            f"a training step of {type(skeleton.model).__name__} can't be followed without weights, so there "
            "is no plan for it"
        )
    matrices = [_matrix(x, settings, shapes) for x in asked]
    local = _local_seconds(work, profile)
    optimizer = work.trained * profile.client.trained
    chain = _chain(matrices, local, settings, profile)
    outcome = schedule(chain, settings.micro_batches, settings.in_flight, one_machine=settings.link is None)
    seconds = outcome.seconds + optimizer
    busy = outcome.busy | {"client": outcome.busy["client"] + optimizer}
    protocol = settings.protocol
    traffic = Traffic(asked, shapes, protocol.operators, protocol.residues)
    lengths = [settings.length] * settings.batch
    up, down = (settings.micro_batches * x for x in (traffic.up(lengths), traffic.down(lengths)))
    return Plan(
        model=model,
        architecture=type(skeleton.model).__name__,
        tokens=settings.micro_batches * settings.batch * settings.length,
        layers=len(skeleton.layers),
        trained=work.trained,
        rounds=settings.micro_batches * traffic.rounds,
        bytes_up=up,
        bytes_down=down,
        seconds=seconds,
        busy=busy,
        local_seconds=settings.micro_batches * local + optimizer,
        bound=outcome.bound,
        memory=_memory(skeleton, matrices, work, local_bytes, settings, profile),
        worker_cost=seconds / 3600 * protocol.operators * settings.worker_hour,
        traffic_cost=(up + down) / 1e9 * settings.gigabyte,
        client_profile=profile.client.name,
        worker_profile=profile.worker.name,
    )


def _asked(skeleton: Skeleton, settings: Settings, work: LocalWork) -> list[Asked]:
    """All products of a micro-batch; their order is not that of the step, which costs do not depend on."""

    def adapt(model: PreTrainedModel) -> nn.Module:
        names = settings.target_modules
        targets = names if isinstance(names, str) else list(names)
        kind = "SEQ_CLS" if type(model).__name__.endswith("ForSequenceClassification") else "CAUSAL_LM"
        try:
            return get_peft_model(model, LoraConfig(r=settings.rank, target_modules=targets, task_type=kind))
        except ValueError as error:
            raise ConfigurationError(f"adapter: {' '.join(str(error).split())}") from None

    # Models that classify by the last token ask for the padding token of batches.
    if getattr(skeleton.model.config, "pad_token_id", None) is None:
        skeleton.model.config.pad_token_id = 0
    step = Step(
        adapt,
        batch=settings.batch,
        length=settings.length,
        labels=True,
        watched=lambda model: counted(work, model),
    )
    forward, training = asked_products(skeleton.model, skeleton.layers, step)
    return forward + training


def _matrix(asked: Asked, settings: Settings, shapes: dict[str, tuple[int, int]]) -> Matrix:
    rows = settings.batch * settings.length if asked.all_tokens else settings.batch
    return Matrix(rows, asked.product.contraction, product_outputs(asked.product, shapes))


def _local_seconds(work: LocalWork, profile: Profile) -> float:
    """Of a micro-batch, without the optimizer."""
    client = profile.client
    products = work.flops * client.flop + work.half_flops * client.half_flop
    attention = work.attended * client.attended + work.half_attended * client.half_attended
    memory = work.moved * client.moved + work.half_moved * client.half_moved + work.fresh * client.fresh
    return products + attention + memory + work.calls * client.call + work.shared * client.shared


def _chain(matrices: Sequence[Matrix], local: float, settings: Settings, profile: Profile) -> list[Stage]:
    """The stages of a micro-batch, with the local part spread evenly over the products."""
    kept = kept_share(matrices)
    return [
        stage
        for matrix in matrices
        for stage in (
            Stage("client", local / len(matrices)),
            *product_stages(matrix, settings.protocol, profile, settings.link, kept),
        )
    ]


def _memory(
    skeleton: Skeleton,
    matrices: Sequence[Matrix],
    work: LocalWork,
    local_bytes: int,
    settings: Settings,
    profile: Profile,
) -> Memory:
    protocol, in_flight = settings.protocol, settings.in_flight
    widest = max(x.contraction for x in matrices)
    # An operand in floats, and masked; and the result in floats.
    buffers = in_flight * max(WORD_BYTES * (2 * x.operand + x.answer) for x in matrices)
    # Answers of each shape are kept for the next ones.
    answers = {(x.rows, x.outputs): WORD_BYTES * x.answer for x in matrices}.values()
    buffers += protocol.operators * max(in_flight * max(answers), min(ANSWERS_KEPT_BYTES, sum(answers)))
    # Of the micro-batches in flight, one computes.
    buffers += work.held_small + work.held_large - work.saved
    small = work.held_small + (in_flight - 1) * (work.saved - work.saved_large)
    buffers += round((profile.client.spread - 1) * small)
    sizes = {x.name: (x.out_features, x.in_features) for x in skeleton.layers}
    vectors = WORD_BYTES * protocol.residues.hint_vectors
    words = _CERTIFICATE_BYTES if protocol.residues.certified else 0
    buffers += sum(2 * (vectors + words) * (a + b) for a, b in sizes.values())
    hints = 0
    if protocol.lattice is not None:
        buffers += WORD_BYTES * protocol.lattice.dimension * widest + min(
            KEPT_BYTES, sum(waiting_bytes(x) for x in matrices)
        )
        hints = _hints(skeleton, protocol)
    adapter = _TRAINED_BYTES * work.trained
    activations = in_flight * work.saved
    return Memory(
        client=profile.client.resident + adapter + activations + buffers,
        adapter=adapter,
        activations=activations,
        buffers=buffers,
        mapped=local_bytes + hints,
        # Its libraries are those of the client, about.
        worker=profile.client.resident
        + _weights(skeleton, SCHEMES[settings.quantization])
        + in_flight * max(worker_workspace(x) for x in matrices),
        hints=hints,
    )


def _weights(skeleton: Skeleton, scheme: Scheme) -> int:
    """Bytes that a worker keeps of all layers."""
    if scheme is INT8:
        return skeleton.held
    return sum(kept_bytes(x.out_features, x.in_features, scheme) for x in skeleton.layers)


def _hints(skeleton: Skeleton, protocol: Protocol) -> int:
    """Bytes of all hints: of every group in both directions, asked for in this step or not."""
    shapes = skeleton.shapes
    return sum(
        _HINT_HEADER_BYTES + protocol.hint(Matrix(0, x.contraction, product_outputs(x, shapes)))
        for x in products_of(type(skeleton.model), skeleton.model.config, skeleton.layers)
    )
