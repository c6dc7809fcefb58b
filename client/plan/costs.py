"""Seconds of one product, from the client's floats to the client's floats, and the memory it takes meanwhile.

For R rows, contraction c and outputs o (constants as in `blindtune.client.plan.profiles`):

    worker          2 * limbs R c o * operation + c o * weight + R c * (operand [+ expanded]) + R o * output
                    + request + byte * payload
    client shares   shares_round + (k - 1) R c * shares_up + k R o * shares_down, with k operators
    client lattice  lattice_round + R c * lattice_up + R o * lattice_down
                    + B (c + o) * lattice_block * rank / 5
    client, both    + for each operator request + byte * payload
    nobody          turn

B counts the rows that masks are computed for: they come in blocks of 256. Where few are left over, they are
given up; else they wait for the next operand of the same product, as far as they fit the memory that is kept
for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from blindtune.client.kit.hints import hint_bytes
from blindtune.client.plan.profiles import Profile
from blindtune.client.plan.schedule import LATENCY, Stage
from blindtune.client.plan.traffic import WORD_BYTES
from blindtune.common.blocks import block_bytes
from blindtune.protocol.expansion import KEY_BYTES
from blindtune.protocol.lattice.parameters import DEGREE, LatticeParameters
from blindtune.protocol.lattice.stock import shared_rows
from blindtune.protocol.parameters import ParameterSet

__all__ = [
    "ANSWERS_KEPT_BYTES",
    "KEPT_BYTES",
    "Link",
    "Matrix",
    "Protocol",
    "kept_share",
    "product_stages",
    "waiting_bytes",
    "worker_workspace",
]

KEPT_BYTES = 1 << 28
"""For mask rows that wait for the next operand, see `blindtune.protocol.lattice.source.LatticeSource`."""

ANSWERS_KEPT_BYTES = 128 << 20
"""Of each operator's answers, for its next ones, see `blindtune.client.operators.operator.OperatorClient`."""

_CALIBRATED_RANK = 5


@dataclass(frozen=True)
class Matrix:
    """A product that is asked for, of which costs know no more.

    Attributes:
        rows: of the operand.
        contraction: its columns.
        outputs: columns of the result.
    """

    rows: int
    contraction: int
    outputs: int

    @property
    def operand(self) -> int:
        """Elements."""
        return self.rows * self.contraction

    @property
    def answer(self) -> int:
        """Elements."""
        return self.rows * self.outputs


@dataclass(frozen=True)
class Protocol:
    """How operands are masked.

    Attributes:
        operators: how many there are.
        residues: the modulus and what goes with it.
        lattice: parameters of masking ``lattice``, or None for ``shares``.
    """

    operators: int
    residues: ParameterSet
    lattice: LatticeParameters | None = None

    def hint(self, matrix: Matrix) -> int:
        """Bytes of a product's hint."""
        return hint_bytes(self.lattice, matrix.outputs) if self.lattice else 0


@dataclass(frozen=True)
class Link:
    """The network between the client and all operators.

    Attributes:
        up, down: bytes a second, in both directions at once.
        latency: seconds of a round trip.
    """

    up: float
    down: float
    latency: float


def waiting_bytes(matrix: Matrix) -> int:
    """Of mask rows that an operand leaves over for the next one."""
    left = -shared_rows(matrix.rows) % DEGREE
    return left * WORD_BYTES * (matrix.contraction + matrix.outputs)


def kept_share(products: Sequence[Matrix]) -> float:
    """The share of left-over mask rows that fit the memory for them, where all products are asked in turn."""
    needed = sum(waiting_bytes(x) for x in products)
    return min(1.0, KEPT_BYTES / needed) if needed else 1.0


def product_stages(
    matrix: Matrix, protocol: Protocol, profile: Profile, link: Link | None, kept: float = 1.0
) -> list[Stage]:
    """What a product takes of each resource, in order.

    Args:
        matrix: the product.
        protocol: how operands are masked.
        profile: the constants.
        link: the network; None for workers on this machine, which compute at the cost of the client.
        kept: from `kept_share`.
    """
    up, down = _payload(matrix, protocol)
    client, worker = profile.client, profile.worker
    if protocol.lattice is None:
        before = client.shares_round + (protocol.operators - 1) * matrix.operand * client.shares_up
        after = protocol.operators * matrix.answer * client.shares_down
    else:
        rows = _computed_rows(matrix.rows, kept)
        block = rows * client.lattice_block * protocol.lattice.rank / _CALIBRATED_RANK
        before = client.lattice_round + matrix.operand * client.lattice_up + matrix.contraction * block
        after = matrix.answer * client.lattice_down + matrix.outputs * block
    before += protocol.operators * client.request + sum(up) * client.byte
    after += sum(down) * client.byte
    times = [
        worker.request
        + 2 * protocol.residues.limbs * matrix.operand * matrix.outputs * worker.operation
        + matrix.contraction * matrix.outputs * worker.weight
        + matrix.operand * (worker.operand + (worker.expanded if seeded else 0.0))
        + matrix.answer * worker.output
        + (sent + received) * worker.byte
        for seeded, sent, received in zip(_seeded(protocol), up, down, strict=True)
    ]
    if link is None:
        # What is waited for here is this machine all the same.
        return [Stage("client", before), Stage("workers", client.turn + sum(times)), Stage("client", after)]
    return [
        Stage("client", before),
        Stage("upload", sum(up) / link.up),
        Stage(LATENCY, link.latency + client.turn),
        Stage("workers", max(times)),
        Stage("download", sum(down) / link.down),
        Stage("client", after),
    ]


def _seeded(protocol: Protocol) -> list[bool]:
    """Whether each operator gets a seed."""
    return [i < protocol.operators - 1 for i in range(protocol.operators)]


def _payload(matrix: Matrix, protocol: Protocol) -> tuple[list[int], list[int]]:
    """Bytes to each operator, and from each."""
    up = [
        KEY_BYTES if seeded else protocol.residues.word_bytes * matrix.operand for seeded in _seeded(protocol)
    ]
    return up, [protocol.residues.word_bytes * matrix.answer] * protocol.operators


def _computed_rows(rows: int, kept: float) -> float:
    last = shared_rows(rows)
    own = DEGREE * ceil((rows - last) / DEGREE)
    return own + kept * last + (1 - kept) * DEGREE * ceil(last / DEGREE)


def worker_workspace(matrix: Matrix) -> int:
    """Bytes that a worker takes for a request, besides its weights."""
    return block_bytes(matrix.rows, matrix.contraction, matrix.outputs)
