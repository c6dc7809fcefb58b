"""Every attack on every mask: where an attack works, and where it is left with chance."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import kurtosis
from threadpoolctl import threadpool_limits

from blindtune.checkpoint import Checkpoint
from blindtune.client.audit import label_attacks, source_attack, token_attacks, word_tests
from blindtune.client.audit.game import EXTREMES, Round, game_rounds, play
from blindtune.client.audit.knowledge import Knowledge
from blindtune.client.audit.public_model import PublicModel
from blindtune.client.audit.recording import Recorded, first_and_last, record_plain, record_private
from blindtune.client.audit.statistics import Judged, Score, judge
from blindtune.client.audit.transcript import Transcript
from blindtune.client.audit.weak_masks import WEAK_MASKS, hide
from blindtune.client.audit.workers import StartWorkers, recorded_workers
from blindtune.client.audit.workloads import Sizes, Workload, classifier, language_model
from blindtune.protocol.lattice.parameters import MLWE1280
from blindtune.protocol.products import Direction, Product

__all__ = [
    "COLLUDING",
    "PRIVATE",
    "Cell",
    "LabResult",
    "Observation",
    "knowledge_of",
    "observations",
    "run_lab",
    "scores",
]

Report = Callable[[str], None]

_KNOWN_ROWS = 16
"""Rows at the beginning of each batch that the attacker knows."""

PRIVATE = ("shares: seeds", "shares: rows", "lattice")
"""The observers that must not learn anything."""

COLLUDING = "shares: both"
"""Two operators that collude, against whom `shares` does not protect."""

_TOKEN_ATTACKS = (
    token_attacks.by_cosine,
    token_attacks.by_sorting,
    token_attacks.by_gram_matrix,
    token_attacks.by_regression,
    token_attacks.by_difference,
    token_attacks.by_span,
)


@dataclass(frozen=True)
class Cell:
    """One attack on one mask."""

    mask: str
    judged: Judged


@dataclass(frozen=True)
class LabResult:
    """All cells, and how long it took.

    Attributes:
        cells: of all attacks and masks.
        seconds: of the whole run.
    """

    cells: Sequence[Cell]
    seconds: float

    @property
    def leaks(self) -> list[Cell]:
        """Attacks above chance on what must not leak."""
        return [x for x in self.cells if x.mask in PRIVATE and x.judged.above_chance]


@dataclass(frozen=True, eq=False)
class Observation:
    """What one observer got of one workload."""

    mask: str
    recorded: Recorded


def run_lab(
    folder: Path,
    sizes: Sizes,
    rounds: int,
    report: Report = lambda text: None,
    workers: StartWorkers = recorded_workers,
) -> LabResult:
    """Trains in the clear and with real workers, and runs all attacks.

    Args:
        folder: for models and transcripts.
        sizes: of the trainings.
        rounds: of the game, for each of the attacker's choices.
        report: is told what happens.
        workers: starts the workers that record.
    """
    started = time.monotonic()
    found: list[tuple[str, Score]] = []
    for make, playing in ((language_model, True), (classifier, False)):
        workload = make(folder / make.__name__, sizes)
        played = game_rounds(sizes.hidden, rounds, np.random.default_rng()) if playing else []
        for observation, knowledge in observations(workload, sizes, folder, played, report, workers):
            report(f"{workload.name}: attacks on {observation.mask}")
            found += [(observation.mask, x) for x in scores(observation.recorded, knowledge, played)]
    judged = judge([score for _, score in found])
    cells = [Cell(mask, x) for (mask, _), x in zip(found, judged, strict=True)]
    return LabResult(cells, time.monotonic() - started)


def observations(
    workload: Workload,
    sizes: Sizes,
    folder: Path,
    rounds: Sequence[Round],
    report: Report,
    workers: StartWorkers,
) -> Iterator[tuple[Observation, Knowledge]]:
    """What every observer gets: under broken masks, and, recorded by real workers, under ours."""
    report(f"{workload.name}: training in the clear")
    plain = record_plain(workload, rounds)
    knowledge = knowledge_of(workload, sizes, plain.training)
    for name, make in WEAK_MASKS.items():
        mask = make(np.random.default_rng())
        yield Observation(name, Recorded(hide(plain.training, mask), hide(plain.game, mask))), knowledge()
    report(f"{workload.name}: training with real workers")
    private = record_private(workload, folder / f"{workload.checkpoint.name}-transcripts", rounds, workers)
    seeds, rows = private.seeds, private.rows
    both = Recorded(rows.training.combined_with(seeds.training), rows.game.combined_with(seeds.game))
    yield Observation("shares: seeds", seeds), knowledge()
    yield Observation("shares: rows", rows), knowledge()
    yield Observation(COLLUDING, both), knowledge()
    noise = MLWE1280.eta * knowledge().public.kit.column_absolute_sum(knowledge().public.first)
    yield Observation("lattice", private.lattice), knowledge(noise)


def knowledge_of(workload: Workload, sizes: Sizes, plain: Transcript) -> Callable[..., Knowledge]:
    """What an attacker on a workload knows, as a function of the bound of the mask's noise."""
    first, last = first_and_last(workload)
    public = PublicModel(Checkpoint.open(workload.checkpoint), first)
    tokens = workload.tokens()
    known = []
    for step, row in enumerate(tokens):
        known.append(np.arange(len(row)) < (len(row) if step < len(tokens) // 3 else _KNOWN_ROWS))
    sources = _least_gaussian(plain)

    def knowledge(noise: int = 0) -> Knowledge:
        return Knowledge(
            public=public,
            tokens=tokens,
            known=known,
            last=last,
            labels=workload.labels(),
            known_labels=len(workload.batches) // 2,
            vocabulary_labels=not workload.classes,
            positions=sizes.length,
            noise=noise,
            plain=plain,
            sources=sources,
        )

    return knowledge


def _least_gaussian(plain: Transcript) -> Product:
    """The forward product whose features are furthest from Gaussian, where separation works best."""
    products = {x.product for x in plain.operands if x.product.direction is Direction.FORWARD}

    def excess(product: Product) -> float:
        rows = np.concatenate([x.centred() for x in plain.of(product)])
        return float(np.median(np.nan_to_num(kurtosis(rows))))

    return max(sorted(products, key=lambda x: x.label), key=excess)


def scores(recorded: Recorded, knowledge: Knowledge, rounds: Sequence[Round]) -> list[Score]:
    """All attacks that apply to a workload."""
    # Matrices are small, and threads that wait for each other take longer where the cores are shared.
    with threadpool_limits(limits=1):
        return _scores(recorded, knowledge, rounds)


def _scores(recorded: Recorded, knowledge: Knowledge, rounds: Sequence[Round]) -> list[Score]:
    transcript = recorded.training
    if not knowledge.vocabulary_labels:
        return [label_attacks.by_direction(transcript, knowledge)]
    found = [attack(transcript, knowledge) for attack in _TOKEN_ATTACKS]
    found.append(label_attacks.by_negative_entry(transcript, knowledge))
    found.append(source_attack.by_independent_components(transcript, knowledge))
    tests: tuple[Callable[[Transcript], Score], ...] = (
        word_tests.uniformity,
        word_tests.correlation,
        word_tests.small_differences,
    )
    found += [test(transcript) for test in tests]
    found += [play(recorded.game, rounds, extreme) for extreme in EXTREMES]
    return found
