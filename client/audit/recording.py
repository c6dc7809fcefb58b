"""Runs a workload and returns what workers would get, or what real ones got."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from blindtune.checkpoint import Checkpoint
from blindtune.client.audit.game import Round
from blindtune.client.audit.transcript import Operand, Transcript, read_transcript
from blindtune.client.audit.workers import StartWorkers, recorded_workers
from blindtune.client.audit.workloads import Workload
from blindtune.client.config.blind_config import BlindConfig, Masking, Operator
from blindtune.client.kit.groups import all_products
from blindtune.client.kit.prepare import kit_of
from blindtune.client.model.layer_group import LayerGroup
from blindtune.client.model.quantizer import multiplier_of
from blindtune.protocol.kernels.low_sums import Words
from blindtune.protocol.lattice.parameters import MLWE1280
from blindtune.protocol.masks import MaskedOperand
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Centred, from_centred
from blindtune.protocol.shares.unmasked import UnmaskedSource

__all__ = [
    "LAB_SETS",
    "Private",
    "Recorded",
    "WatchedSource",
    "first_and_last",
    "record_plain",
    "record_private",
]

LAB_SETS: Mapping[Masking, str] = {"shares": Q31.name, "lattice": MLWE1280.name}
"""One attack knows the integers of known rows exactly, which takes scales that follow from public facts."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """What one worker got.

    Attributes:
        training: operands of the training steps.
        game: operands of the game's rounds, which come after.
    """

    training: Transcript
    game: Transcript

    @classmethod
    def split(cls, transcript: Transcript, rounds: int) -> "Recorded":
        """Splits a run of which the last operands are the game's."""
        operands = Transcript.of_training(transcript)
        cut = len(operands.operands) - rounds
        return cls(operands.between(0, cut), operands.between(cut))


@dataclass(eq=False)
class WatchedSource(UnmaskedSource):
    """No mask, as in masking ``reference``, and a copy of each operand. It reaches no worker."""

    seen: list[Operand] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(Q31)

    def hide_integers(self, operand: Centred, product: Product, image: Words | None = None) -> MaskedOperand:
        rows, columns = operand.shape
        self.seen.append(Operand(product, rows, columns, Q31, from_centred(operand, Q31)))
        return super().hide_integers(operand, product, image)


def record_plain(workload: Workload, rounds: Sequence[Round] = ()) -> Recorded:
    """Trains in this process and returns the operands in the clear."""
    config = BlindConfig(masking="reference", parameter_set=Q31.name, head=workload.head, progress=False)
    model = workload.load(config)
    multiplier = multiplier_of(model)
    multiplier.source = source = WatchedSource()
    _run(workload, model, rounds)
    return Recorded.split(Transcript(source.seen), len(rounds))


@dataclass(frozen=True, eq=False)
class Private:
    """What each worker got in the same training, twice.

    Attributes:
        seeds, rows: the two operators of masking ``shares``.
        lattice: the one of masking ``lattice``.
    """

    seeds: Recorded
    rows: Recorded
    lattice: Recorded


def record_private(
    workload: Workload,
    folder: Path,
    rounds: Sequence[Round] = (),
    workers: StartWorkers = recorded_workers,
    parameter_sets: Mapping[Masking, str] = LAB_SETS,
) -> Private:
    """Trains with real workers, once with each masking, and returns what each of them recorded.

    Args:
        workload: the training.
        folder: new or empty; for transcripts.
        rounds: of the game, which is played after the training.
        workers: starts them.
        parameter_sets: of each masking.
    """
    folder.mkdir(parents=True, exist_ok=True)
    transcripts = [folder / name for name in ("seeds", "rows", "lattice")]
    with workers(workload.checkpoint, transcripts) as (alpha, beta, gamma):
        maskings: tuple[tuple[Masking, list[str]], ...] = (("shares", [alpha, beta]), ("lattice", [gamma]))
        for masking, addresses in maskings:
            config = BlindConfig(
                operators=[Operator(f"operator {i}", [x]) for i, x in enumerate(addresses)],
                masking=masking,
                parameter_set=parameter_sets[masking],
                head=workload.head,
                insecure=True,
                allow_one_machine=True,
                progress=False,
            )
            model = workload.load(config)
            _run(workload, model, rounds)
            multiplier_of(model).close()
    return Private(*(Recorded.split(read_transcript(x), len(rounds)) for x in transcripts))


def first_and_last(workload: Workload) -> tuple[Product, Product]:
    """The forward product of the first layers, and the backward one of the last."""
    products = all_products(Checkpoint.open(workload.checkpoint), workload.head)
    return products[0], products[-1]


def _run(workload: Workload, model: nn.Module, rounds: Sequence[Round]) -> None:
    workload.train(model)
    first, _ = first_and_last(workload)
    group = LayerGroup([x.layer for x in first.spans], kit_of(workload.checkpoint), multiplier_of(model))
    for played in rounds:
        group.forward(played.x)
