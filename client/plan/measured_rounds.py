"""How fast this machine masks and unmasks, multiplies as a worker, and moves bytes between the two.

Products of a small random model go three ways: with the worker's product in this process, where client and
worker are timed apart; the same under lattice masks; and both through worker processes on loopback over
TLS, shares through two and the lattice through one. What the last take longer than their parts is the
transport.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from blindtune.checkpoint import Checkpoint
from blindtune.client.certs import issue_operator_certificates
from blindtune.client.config import BlindConfig, Operator
from blindtune.client.connect import connect
from blindtune.client.kit import Kit
from blindtune.client.layer_group import LayerGroup
from blindtune.client.multiplier import PrivateMultiplier
from blindtune.client.plan.costs import Matrix
from blindtune.client.plan.fitting import fit
from blindtune.client.plan.traffic import WORD_BYTES
from blindtune.client.prepare import prepare
from blindtune.protocol.errors import ConfigurationError
from blindtune.protocol.exactness import exact_method
from blindtune.protocol.expansion import KEY_BYTES
from blindtune.protocol.fixed_point import Float32
from blindtune.protocol.lattice.hint import packed_shape
from blindtune.protocol.lattice.parameters import DEGREE, MLWE1280
from blindtune.protocol.lattice.source import LatticeSource
from blindtune.protocol.masks import MaskedOperand, MaskSource, ShareSource
from blindtune.protocol.modular_product import Multiplier
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Product, contraction_lengths
from blindtune.protocol.residues import Centred, Residues

__all__ = ["RoundRates", "measure_rounds"]

_MODEL: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "tie_word_embeddings": True,
}
_LAYER = "model.layers.0."
# One of them is narrow: with matrices of one shape, time for their elements looks like time for operations.
_GROUPS = (
    tuple(f"{_LAYER}self_attn.{x}_proj.weight" for x in "qkv"),
    (f"{_LAYER}self_attn.k_proj.weight",),
    (f"{_LAYER}mlp.gate_proj.weight", f"{_LAYER}mlp.up_proj.weight"),
    (f"{_LAYER}mlp.down_proj.weight",),
)
_ROWS = (16, 64, 256)
_OPERATORS = 2


class RoundRates(NamedTuple):
    """Seconds for one unit each, as in `blindtune.client.plan.profiles`.

    Attributes:
        round: what the client takes for a product, however small, besides its requests.
        product: what a worker takes for one, besides the request.
        byte, request: of the transport, both ends together.
        turn: of a round, besides its requests.
    """

    round: float
    shares_up: float
    shares_down: float
    lattice_round: float
    lattice_up: float
    lattice_down: float
    lattice_block: float
    product: float
    operation: float
    weight: float
    operand: float
    expanded: float
    output: float
    byte: float
    request: float
    turn: float


class _InProcess(PrivateMultiplier):
    """Client and workers in this process, one after the other, and the workers' share of the time.

    Attributes:
        multiplying, expanding: seconds that the workers' products took, and the seeds before them.
    """

    def __init__(self, kit: Kit, multiplier: Multiplier, source: MaskSource) -> None:
        self.source = source
        self.multiplying = self.expanding = 0.0
        self._multiplier = multiplier
        self._check_vectors = cache(kit.check_vectors)

    def multiply(self, operand: Centred, product: Product) -> Centred:
        masked = self.source.mask(operand, product)
        return masked.unmask(self._answers(masked, product))

    def multiply_reals(
        self,
        x: Float32,
        product: Product,
        budget: int,
        column_scale: Float32 | None = None,
        output_scale: Float32 | None = None,
    ) -> Float32:
        v = self._check_vectors(product).v[0]
        masked, scales = self.source.hide(x, product, budget, column_scale, v)
        return masked.reveal(self._answers(masked, product), scales, output_scale)

    def _answers(self, masked: MaskedOperand, product: Product) -> list[Residues]:
        check = self._check_vectors(product)
        answers = []
        for share in masked.shares:
            started = time.perf_counter()
            received = share.residues if share.seed is None else share.seed.expand(*share.shape)
            expanded = time.perf_counter()
            answer = self._multiplier.multiply(product, received)
            self.multiplying += time.perf_counter() - expanded
            self.expanding += expanded - started
            if share.expected is None:
                check.verify(received, answer)
            else:
                check.verify_expected(share.expected, answer)
            answers.append(answer)
        return answers


class _Sample(NamedTuple):
    """Medians for a product: seconds of a round, of the workers' products and expansions in it."""

    matrix: Matrix
    total: float
    multiplying: float
    expanding: float

    @property
    def client(self) -> float:
        return self.total - self.multiplying - self.expanding


def measure_rounds(repeats: int = 5) -> RoundRates:
    """Measures masks, products and loopback.

    Raises:
        ConfigurationError: no worker can be started here.
    """
    with tempfile.TemporaryDirectory(prefix="blindtune-plan-") as folder:
        checkpoint = _checkpoint(Path(folder) / "model")
        kit = prepare(checkpoint, Path(folder) / "kit")
        with checkpoint.reader() as reader:
            layers = {x.name: reader.read(x).integers for x in checkpoint.layers}
        lengths = contraction_lengths((x.shape[0], x.shape[1]) for x in layers.values())
        multiplier = Multiplier(layers, exact_method(lengths))
        shares = _samples(kit, _InProcess(kit, multiplier, ShareSource(_OPERATORS, Q31)), repeats)
        lattice_source = _lattice_source(kit)
        lattice = _samples(kit, _InProcess(kit, multiplier, lattice_source), repeats)
        with _workers(checkpoint.folder, Path(folder)) as operators:
            config = BlindConfig(operators=operators, allow_one_machine=True, progress=False)
            remote = connect(config, kit)
            try:
                two = _samples(kit, remote, repeats)
                remote.source = lattice_source
                one = _samples(kit, remote, repeats)
            finally:
                remote.close()
    return _rates(shares, lattice, two, one)


def _checkpoint(folder: Path) -> Checkpoint:
    LlamaForCausalLM(LlamaConfig(**_MODEL)).to(torch.bfloat16).save_pretrained(folder)
    return Checkpoint.open(folder)


def _lattice_source(kit: Kit) -> LatticeSource:
    """With random hints: what comes out is wrong, and takes as long. Rows left over are not kept."""
    generator = np.random.default_rng(0)
    hints: dict[Product, Centred] = {}

    def hint(product: Product) -> Centred:
        if product not in hints:
            shape = packed_shape(MLWE1280, kit.outputs(product))
            hints[product] = generator.integers(-Q31.half, Q31.half, shape, dtype=np.int32)
        return hints[product]

    return LatticeSource(MLWE1280, os.urandom(KEY_BYTES), hint, kept_bytes=0)


def _samples(kit: Kit, multiplier: PrivateMultiplier, repeats: int) -> list[_Sample]:
    """Medians for all products, which take turns: in a step, too, none finds its matrix in a cache."""
    asked: list[tuple[Matrix, Callable[[], object]]] = []
    generator = np.random.default_rng(0)
    for names in _GROUPS:
        group = LayerGroup(names, kit, multiplier)
        outputs = sum(group.out_features)
        for rows in _ROWS:
            x = generator.standard_normal((rows, group.in_features), dtype=np.float32)
            y = [generator.standard_normal((rows, n), dtype=np.float32) for n in group.out_features]
            asked.append((Matrix(rows, group.in_features, outputs), partial(group.forward, x)))
            asked.append((Matrix(rows, outputs, group.in_features), partial(group.backward, y)))
    figures: list[list[tuple[float, float, float]]] = [[] for _ in asked]
    for _ in range(repeats + 1):
        for (_, ask), taken in zip(asked, figures, strict=True):
            taken.append(_timed(ask, multiplier))
    # The first compiles what is not compiled yet, and fills what is kept.
    medians = [[statistics.median(x) for x in zip(*taken[1:], strict=True)] for taken in figures]
    return [_Sample(matrix, *times) for (matrix, _), times in zip(asked, medians, strict=True)]


def _timed(ask: Callable[[], object], multiplier: PrivateMultiplier) -> tuple[float, float, float]:
    """Seconds of a round, and of it those of products and expansions where they are known."""
    apart = multiplier if isinstance(multiplier, _InProcess) else None
    before = (apart.multiplying, apart.expanding) if apart else (0.0, 0.0)
    started = time.perf_counter()
    ask()
    total = time.perf_counter() - started
    after = (apart.multiplying, apart.expanding) if apart else (0.0, 0.0)
    return total, after[0] - before[0], after[1] - before[1]


def _rates(
    shares: Sequence[_Sample], lattice: Sequence[_Sample], two: Sequence[_Sample], one: Sequence[_Sample]
) -> RoundRates:
    """Constants from samples of the same products in the same order.

    Args:
        shares, lattice: in this process.
        two, one: the same through two workers, and through one.
    """
    seeds = _OPERATORS - 1
    shares_round, up, down = _fit(
        [x.client for x in shares],
        [(1, seeds * x.matrix.operand, _OPERATORS * x.matrix.answer) for x in shares],
    )
    lattice_round, lattice_up, lattice_down, block = _fit(
        [x.client for x in lattice],
        [(1, x.matrix.operand, x.matrix.answer, _block_elements(x.matrix)) for x in lattice],
    )
    # Under lattice masks there is one worker, whose product is timed alone.
    product, operation, weight, operand, output = _fit(
        [x.multiplying for x in lattice],
        [
            (
                1,
                8 * x.matrix.operand * x.matrix.outputs,
                x.matrix.contraction * x.matrix.outputs,
                x.matrix.operand,
                x.matrix.answer,
            )
            for x in lattice
        ],
    )
    (expanded,) = _fit([x.expanding for x in shares], [(seeds * x.matrix.operand,) for x in shares])
    # What a round through processes takes besides its parts; never nothing, which could not be fitted.
    byte, request, turn = _fit(
        [
            max(x.total - parts.total, 0.01 * x.total)
            for x, parts in zip((*two, *one), (*shares, *lattice), strict=True)
        ],
        [
            (WORD_BYTES * (x.matrix.operand + operators * x.matrix.answer), operators, 1)
            for samples, operators in ((two, _OPERATORS), (one, 1))
            for x in samples
        ],
    )
    return RoundRates(
        round=shares_round,
        shares_up=up,
        shares_down=down,
        lattice_round=lattice_round,
        lattice_up=lattice_up,
        lattice_down=lattice_down,
        lattice_block=block,
        product=product,
        operation=operation,
        weight=weight,
        operand=operand,
        expanded=expanded,
        output=output,
        byte=byte,
        request=request,
        turn=turn,
    )


def _block_elements(matrix: Matrix) -> int:
    """Of A S and H S, for whole blocks."""
    return ceil(matrix.rows / DEGREE) * DEGREE * (matrix.contraction + matrix.outputs)


def _fit(seconds: Sequence[float], amounts: Sequence[tuple[float, ...]]) -> list[float]:
    found = fit(np.array(amounts, np.float64), np.array(seconds))
    return [float(x) for x in found]


@contextmanager
def _workers(model: Path, folder: Path) -> Iterator[list[Operator]]:
    """Worker processes on loopback, one for each operator, as they are run elsewhere: over mutual TLS."""
    with ExitStack() as stack:
        started = []
        for i in range(_OPERATORS):
            name = f"operator-{i}"
            certificates = issue_operator_certificates(folder / "certs", name).ca.parent
            started.append((name, certificates, stack.enter_context(_worker(model, certificates))))
        yield [
            Operator(
                name,
                [_address(process)],
                ca=certificates / "ca.pem",
                cert=certificates / "client.pem",
                key=certificates / "client-key.pem",
            )
            for name, certificates, process in started
        ]


@contextmanager
def _worker(model: Path, certificates: Path) -> Iterator["subprocess.Popen[str]"]:
    options = {
        "model": model,
        "listen": "127.0.0.1:0",
        "tls-cert": certificates / "worker.pem",
        "tls-key": certificates / "worker-key.pem",
        "tls-client-ca": certificates / "ca.pem",
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    process = subprocess.Popen(
        [sys.executable, "-m", "blindtune.server", "serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _address(process: "subprocess.Popen[str]") -> str:
    line = process.stdout.readline() if process.stdout is not None else ""
    if not line:
        raise ConfigurationError(
            "the measurement needs a worker on this machine, and none can be started: "
            "pip install 'blindtune[worker]'"
        )
    return f"127.0.0.1:{json.loads(line)['port']}"
