"""One operator that nobody needs to trust: models trained and used under lattice masks by real workers."""

import copy
import json
import logging
import os
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chisquare
from support.checkpoints import CLASSES, FAMILIES, HIDDEN, VOCABULARY, batch
from support.lies import LIES
from support.operators import RunningOperators, RunningWorker, running_operators
from support.recording import Received, read_recording
from support.standard import LATTICE
from support.training import training_step, with_adapter
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from blindtune.checkpoint import Checkpoint
from blindtune.client import BlindConfig, multiplier_of
from blindtune.client.kit.kit import Kit
from blindtune.client.kit.prepare import cached_kit
from blindtune.client.model.remote_linear import RemoteLinear
from blindtune.client.rounds import connect as connect_module
from blindtune.errors import ConfigurationError, OperatorUnavailableError
from blindtune.protocol.lattice.hint import packed_shape
from blindtune.protocol.lattice.parameters import DEGREE, LatticeParameters
from blindtune.protocol.lattice.source import LatticeSource
from blindtune.protocol.products import MAX_CONTRACTION, Product
from blindtune.protocol.residues import Centred, Residues

pytestmark = pytest.mark.hf

Load = Callable[..., PreTrainedModel]
CAUSAL = ["llama", "llama_tied", "qwen3", "gpt2"]

# One product of these widths, d < 128, is off by the noise E M, of standard deviation sqrt(eta / 2) |M_j|;
# a typical result is |z| |M_j| / sqrt(d) with |z| = q / 2 / max |M_j|. As |M_j| <= 127 sqrt(d), that is a
# ratio below sqrt(eta / 2) 127 d / (q / 2). A gradient went through at most 18 products in a row, each of
# which may enlarge an error a little. With a wrong hint or mask it is off by 1 and more.
CLOSE = 8 * (LATTICE.eta / 2) ** 0.5 * 127 * 128 / LATTICE.residues.half
# A test that an honest build fails once in a million runs.
UNLIKELY = 1e-6
# The tiny Llama has 9 groups, which take a hint for each direction. A training step asks for all of them
# forward, and for all but the first one backward, since the embedding is not trained.
HINTS, STEP = 18, 17
FORWARD, BACKWARD = 4, 13
BLOCKS = LATTICE.dimension // DEGREE

Step = dict[str, bytes]


def _lattice(
    operators: RunningOperators, family: str = "llama", workers: Sequence[int] = (0,)
) -> dict[str, Any]:
    """What `load` needs for one operator and some of its workers."""
    return {"masking": "lattice", "operators": [operators[0].operator(family, workers)]}


def _step(model: PreTrainedModel, family: str = "llama", inputs: Any = None) -> Step:
    return training_step(with_adapter(model, family), family, inputs)


def _assert_close(private: Step, expected: Step, gradient_error: float = CLOSE) -> None:
    """Loss and gradients agree but for the noise, and are not the very same."""
    assert private.keys() == expected.keys()
    loss, reference = (float(np.frombuffer(x["loss"], np.float32)[0]) for x in (private, expected))
    assert loss == pytest.approx(reference, rel=CLOSE)
    names = [name for name in expected if name != "loss"]
    a, b = (
        np.concatenate([np.frombuffer(x[name], np.float32) for name in names]) for x in (private, expected)
    )
    assert 0 < np.linalg.norm(a - b) < gradient_error * np.linalg.norm(b)


@pytest.fixture(scope="module")
def reference_step(checkpoints: dict[str, Path]) -> Step:
    """Loss and gradients of the tiny Llama without workers or masks."""
    config = BlindConfig(masking="reference", progress=False)
    return _step(CLASSES["llama"].from_pretrained(checkpoints["llama"], quantization_config=config))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Kits and hints of this test alone: there are none when it begins."""
    monkeypatch.setenv("BLINDTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _hints(cache: Path, parameters: str = LATTICE.name) -> list[Path]:
    return sorted(cache.glob(f"kits/*/blindtune/hints/{parameters}/*.hint"))


# Results.


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_through_one_worker_are_those_of_the_reference_but_for_noise(
    operators: RunningOperators, load: Load, family: str
) -> None:
    model = load(family, **_lattice(operators, family))
    _assert_close(_step(model, family), _step(load(family, masking="reference"), family))
    (figures,) = multiplier_of(model).statistics().values()
    assert figures.lies == () and figures.verified_responses == figures.requests >= 15


@pytest.mark.parametrize("family", FAMILIES)
def test_300_rows_which_cross_the_border_of_a_block_are_close_to_the_reference(
    operators: RunningOperators, load: Load, family: str
) -> None:
    inputs = batch(family, rows=6, tokens=50)
    _assert_close(
        _step(load(family, **_lattice(operators, family)), family, inputs),
        _step(load(family, masking="reference"), family, inputs),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_row_is_close_to_the_reference(operators: RunningOperators, load: Load, family: str) -> None:
    ids = torch.tensor([[41]])

    def logits_and_gradient(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model.eval()(inputs_embeds=embedded).logits
        (logits * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
        assert embedded.grad is not None
        return logits.detach(), embedded.grad

    private = logits_and_gradient(load(family, **_lattice(operators, family)))
    expected = logits_and_gradient(load(family, masking="reference"))
    for a, b in zip(private, expected, strict=True):
        assert 0 < (a - b).norm() < CLOSE * b.norm()


@pytest.mark.parametrize("family", CAUSAL)
def test_a_remote_head_is_close_to_the_reference(
    operators: RunningOperators, load: Load, family: str
) -> None:
    model = load(family, **_lattice(operators, family), head="remote")
    head = model.get_output_embeddings()
    assert isinstance(head, RemoteLinear) and head.out_features == VOCABULARY
    _assert_close(_step(model, family), _step(load(family, masking="reference", head="remote"), family))


def test_the_larger_parameter_set_works(
    operators: RunningOperators, load: Load, reference_step: Step, own_cache: Path
) -> None:
    model = load("llama", **_lattice(operators), parameter_set="mlwe1536")
    assert multiplier_of(model).source.lattice.rank == 6  # type: ignore[attr-defined]
    _assert_close(_step(model), reference_step)
    assert len(_hints(own_cache, "mlwe1536")) == HINTS
    assert _hints(own_cache) == []


def test_a_bf16_model_trains_as_the_reference_does(operators: RunningOperators, load: Load) -> None:
    options = {"dtype": torch.bfloat16}
    private = _step(load("llama", **_lattice(operators), **options))
    expected = _step(load("llama", masking="reference", **options))
    a, b = (np.concatenate([np.frombuffer(x, np.float32) for x in y.values()]) for y in (private, expected))
    # bf16 keeps 8 bits of every activation, so that noise may round the other way.
    assert np.linalg.norm(a - b) < 2**-5 * np.linalg.norm(b)


@pytest.mark.parametrize("family", CAUSAL)
def test_generated_tokens_are_those_of_the_reference(
    operators: RunningOperators, load: Load, family: str
) -> None:
    prompts = torch.randint(3, VOCABULARY, (8, 3), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
    }
    options |= {"attention_mask": torch.ones_like(prompts), "return_dict_in_generate": True}
    expected = load(family, masking="reference").generate(prompts, output_logits=True, **options)
    tokens = load(family, **_lattice(operators, family)).generate(prompts, **options).sequences
    logits = torch.stack(expected.logits, dim=1)
    top = logits.topk(2).values
    # A choice stands if noise in both candidates can't turn it; what follows one that doesn't is free.
    margins = (top[..., 0] - top[..., 1]) / logits.norm(dim=-1)
    stands = (margins > 2**-9).int().cumprod(dim=1).bool()
    assert stands.sum() >= 40, "the prompts were chosen badly"
    new = tokens[:, prompts.shape[1] :]
    assert torch.equal(new[stands], expected.sequences[:, prompts.shape[1] :][stands])


def test_tokens_of_a_cached_sequence_share_blocks(operators: RunningOperators, load: Load) -> None:
    """`generate` asks for one row at a time, and sends no more than that."""
    model = load("llama", **_lattice(operators))
    worker = operators[0].workers[0]
    before = multiplier_of(model).statistics()["alpha"]
    model.generate(torch.tensor([[5, 17, 31]]), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    after = multiplier_of(model).statistics()["alpha"]
    rows = 3 + 5
    widths = 2 * (HIDDEN + HIDDEN + HIDDEN + 48) + HIDDEN
    assert after.bytes_sent - before.bytes_sent <= 4 * rows * widths
    assert worker.lies_told("llama") == 0


# Zeros.


def test_rows_of_zeros_give_exactly_zero_forward_and_backward(
    operators: RunningOperators, load: Load
) -> None:
    model = load("llama", **_lattice(operators))
    layers = model.model.layers[0]
    generator = torch.Generator().manual_seed(0)
    for members in (
        [layers.self_attn.q_proj, layers.self_attn.k_proj, layers.self_attn.v_proj],
        [layers.mlp.down_proj],
    ):
        x = torch.randn(7, members[0].in_features, generator=generator)
        x[[1, 4]] = 0
        x.requires_grad_()
        outputs = [layer(x) for layer in members]
        for y in outputs:
            assert torch.equal(y[[1, 4]], torch.zeros_like(y[[1, 4]]))
            assert (y[[0, 2, 3, 5, 6]].abs().sum(1) > 0).all()
        gradients = [torch.randn(y.shape, generator=generator) for y in outputs]
        for gradient in gradients:
            gradient[[0, 4]] = 0
        torch.autograd.backward(outputs, gradients)
        assert x.grad is not None
        assert torch.equal(x.grad[[0, 4]], torch.zeros_like(x.grad[[0, 4]]))
        assert (x.grad[[1, 2, 3, 5, 6]].abs().sum(1) > 0).all()


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_rows_of_zeros_give_exactly_the_bias(operators: RunningOperators, load: Load, family: str) -> None:
    model = load(family, **_lattice(operators, family))
    layer = next(x for x in model.modules() if isinstance(x, RemoteLinear))
    assert layer.bias is not None and layer.bias.any()
    assert torch.equal(layer(torch.zeros(3, layer.in_features)), layer.bias.expand(3, -1))


@pytest.mark.parametrize("family", CAUSAL)
def test_a_text_without_loss_contributes_exactly_nothing(
    operators: RunningOperators, load: Load, family: str
) -> None:
    model = load(family, **_lattice(operators, family), head="remote")
    inputs = batch(family, rows=3, tokens=9)
    labels = inputs["labels"].clone()
    labels[1] = -100
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    model.eval()(
        inputs_embeds=embedded, attention_mask=inputs["attention_mask"], labels=labels
    ).loss.backward()
    assert embedded.grad is not None
    assert not embedded.grad[1].any()
    assert embedded.grad[0].any() and embedded.grad[2].any()


# Configurations.


@pytest.mark.parametrize("count", [0, 2])
def test_any_number_of_operators_but_one_is_refused(operators: RunningOperators, count: int) -> None:
    chosen = operators.operators("llama")[:count]
    with pytest.raises(ConfigurationError, match=f"takes one operator, not {count}: .*'shares'"):
        BlindConfig(operators=chosen, masking="lattice")


@pytest.mark.parametrize("name", ["toy", "q31", "MLWE1280", ""])
def test_a_parameter_set_that_is_not_there_is_refused(operators: RunningOperators, name: Any) -> None:
    sets = "mlwe1280, mlwe1536, mlwe1280-q24, mlwe1024-q24"
    with pytest.raises(ConfigurationError, match=f"of masking 'lattice' is one of {sets}, not"):
        BlindConfig(**_lattice(operators), parameter_set=name)


def test_a_configuration_names_its_parameter_set_when_it_is_written_down(operators: RunningOperators) -> None:
    config = BlindConfig(**_lattice(operators), parameter_set="mlwe1536")
    again = BlindConfig(**json.loads(json.dumps(config.to_dict())))
    assert (again.masking, again.parameter_set) == ("lattice", "mlwe1536")


# Lies.


def _errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_caught_named_and_survived_when_a_replica_is_there(
    operators: RunningOperators, load: Load, reference_step: Step, caplog: pytest.LogCaptureFixture, lie: str
) -> None:
    model = with_adapter(load("llama", **_lattice(operators, workers=[0, 1])), "llama")
    worker = operators[0].workers[0]
    _assert_close(training_step(model, "llama"), reference_step)
    worker.lie("llama", lie, at=FORWARD, times=100)
    _assert_close(training_step(model, "llama"), reference_step)
    assert worker.lies_told("llama") == 1, "a liar must not be asked again"
    assert multiplier_of(model).statistics()["alpha"].lies == (worker.addresses["llama"],)
    (message,) = _errors(caplog)
    assert f"worker {worker.addresses['llama']} of operator alpha gave a wrong answer" in message


@pytest.mark.parametrize("at", [FORWARD, BACKWARD], ids=["forward", "backward"])
@pytest.mark.parametrize("lie", ["one residue is off by one", "y + q"])
def test_a_lie_without_a_replica_is_one_clear_error(
    operators: RunningOperators, load: Load, caplog: pytest.LogCaptureFixture, lie: str, at: int
) -> None:
    model = with_adapter(load("llama", **_lattice(operators)), "llama")
    worker = operators[0].workers[0]
    worker.lie("llama", lie, at=at)
    with pytest.raises(OperatorUnavailableError) as caught:
        training_step(model, "llama")
    for part in ("operator alpha: no worker is left", f"{worker.addresses['llama']}: gave a wrong answer"):
        assert part in str(caught.value)
    assert len(_errors(caplog)) == 1


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_about_a_hint_is_caught_and_no_run_begins_with_it(
    operators: RunningOperators, load: Load, reference_step: Step, own_cache: Path, lie: str
) -> None:
    liar, honest = operators[0].workers
    liar.lie("llama", lie, at=BLOCKS + 2, times=100)
    with pytest.raises(OperatorUnavailableError) as caught:
        load("llama", **_lattice(operators))
    assert f"{liar.addresses['llama']}: gave a wrong answer" in str(caught.value)
    made = len(_hints(own_cache))
    assert 1 <= made < HINTS
    assert len(list(_hints(own_cache)[0].parent.iterdir())) == made + 1, (
        "hints, the seed, and nothing unfinished"
    )
    # What was made before the lie is right, and kept; the rest comes from an honest worker.
    model = load("llama", **_lattice(operators, workers=[1]))
    assert multiplier_of(model).statistics()["alpha"].requests == BLOCKS * (HINTS - made)
    _assert_close(_step(model), reference_step)
    assert honest.lies_told("llama") == 0


def test_a_lie_about_a_hint_is_survived_when_a_replica_is_there(
    operators: RunningOperators, load: Load, reference_step: Step, own_cache: Path
) -> None:
    liar = operators[0].workers[0]
    liar.lie("llama", "another layer's answer", at=BLOCKS + 2, times=100)
    model = load("llama", **_lattice(operators, workers=[0, 1]))
    assert multiplier_of(model).statistics()["alpha"].lies == (liar.addresses["llama"],)
    assert liar.lies_told("llama") == 1
    _assert_close(_step(model), reference_step)


# What the worker sees.

STEPS = 3


@pytest.fixture(scope="module")
def recorded(
    session_operators: RunningOperators,
    checkpoints: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Kit, list[Received]]:
    """All that the only worker got, hints included, until the third step on one and the same batch."""
    folder = tmp_path_factory.mktemp("recorded")
    worker = session_operators[0].workers[0]
    config = BlindConfig(**_lattice(session_operators), progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLINDTUNE_CACHE", str(folder / "cache"))
        worker.record(folder / "alpha")
        model = CLASSES["llama"].from_pretrained(checkpoints["llama"], quantization_config=config)
        kit = cached_kit(Checkpoint.open(checkpoints["llama"]))
    wrapped = with_adapter(model, "llama")
    for _ in range(STEPS):
        training_step(wrapped, "llama", batch("llama", rows=8, tokens=16))
    worker.record(None)
    multiplier_of(model).close()
    return kit, read_recording(folder / "alpha")


def _uniformity(residues: NDArray[np.unsignedinteger[Any]]) -> list[float]:
    """The p-values of chi-square tests: by size, by lowest byte, and by the byte above it."""
    values = residues.ravel().astype(np.int64)
    edges = -(-np.arange(257) * LATTICE.residues.modulus // 256)
    size = np.searchsorted(edges, values, side="right") - 1
    expected = np.diff(edges) / LATTICE.residues.modulus * len(values)
    return [
        float(chisquare(np.bincount(size, minlength=256), expected).pvalue),
        float(chisquare(np.bincount(values & 255, minlength=256)).pvalue),
        float(chisquare(np.bincount(values >> 8 & 255, minlength=256)).pvalue),
    ]


def _operands(received: Sequence[Received]) -> list[Residues]:
    return [x.residues for x in received if x.residues is not None]


def test_requests_for_hints_carry_the_public_seed_and_nothing_else(
    recorded: tuple[Kit, list[Received]],
) -> None:
    kit, received = recorded
    seed = (kit.folder / "blindtune" / "hints" / LATTICE.name / "public.seed").read_bytes()
    hints, training = received[: HINTS * BLOCKS], received[HINTS * BLOCKS :]
    assert all(x.residues is None and x.seed is not None and x.seed.key == seed for x in hints)
    asked = Counter((x.product, x.rows, x.seed.row_offset) for x in hints if x.seed)
    products = {x.product for x in hints}
    assert asked == Counter((x, DEGREE, DEGREE * i) for x in products for i in range(BLOCKS))
    assert products > {x.product for x in training}
    assert all(x.seed is None and x.residues is not None for x in training)
    assert len(training) == STEPS * STEP


def test_residues_are_uniform(recorded: tuple[Kit, list[Received]]) -> None:
    operands = _operands(recorded[1])
    everything = np.concatenate([x.ravel() for x in operands])
    assert everything.max() < LATTICE.residues.modulus
    assert len(everything) > 200_000
    assert min(_uniformity(everything)) > UNLIKELY
    for operand in operands:
        assert min(_uniformity(operand)) > UNLIKELY / len(operands)


def test_operands_of_equal_batches_are_unrelated(recorded: tuple[Kit, list[Received]]) -> None:
    """A mask that is used twice shows in the difference of what it covers."""
    training = [x for x in recorded[1] if x.residues is not None]
    each = len(training) // STEPS
    assert [(x.product, x.rows) for x in training[:each]] == [(x.product, x.rows) for x in training[-each:]]
    steps = [
        np.concatenate([x.ravel() for x in _operands(training[i * each : (i + 1) * each])]).astype(np.int64)
        for i in range(STEPS)
    ]
    for a, b in combinations(steps, 2):
        # About one in 10 000 runs has a single coincidence.
        assert np.count_nonzero(a == b) <= 2
        assert min(_uniformity((a - b) % LATTICE.residues.modulus)) > UNLIKELY
        assert abs(np.corrcoef(a, b)[0, 1]) < 6 / len(a) ** 0.5


def test_rows_and_columns_of_operands_are_unrelated(recorded: tuple[Kit, list[Received]]) -> None:
    operands = [x.astype(np.int64) for x in _operands(recorded[1])]
    rows = np.concatenate([(x[1:] - x[:-1]).ravel() % LATTICE.residues.modulus for x in operands])
    columns = np.concatenate([(x[:, 1:] - x[:, :-1]).ravel() % LATTICE.residues.modulus for x in operands])
    # Across a block: S has an equation for each of its 256 rows, X^256 = -1 being the first.
    blocks: list[NDArray[np.int64]] = []
    by_product: dict[str, list[Residues]] = defaultdict(list)
    for x in recorded[1]:
        if x.residues is not None:
            by_product[x.product].append(x.residues)
    for same in by_product.values():
        whole = np.concatenate(same).astype(np.int64)
        sums = [whole[DEGREE:] + sign * whole[:-DEGREE] for sign in (1, -1)]
        blocks += [x.ravel() % LATTICE.residues.modulus for x in sums]
    for differences in (rows, columns, np.concatenate(blocks)):
        assert len(differences) > 50_000
        assert min(_uniformity(differences)) > UNLIKELY


# Every row of every mask serves once.

# No integer of these models' operands is larger in a first step: their norm is q / 2 / max |M_j|, and
# |M_j| > 2^7.
SMALL = LATTICE.residues.modulus >> 8


class Ledger:
    """Gives out randomness and remembers it, so that the masks of a run can be computed again."""

    def __init__(self) -> None:
        self.drawn: list[bytes] = []
        self.public_seed = b""
        self._products: dict[str, Product] = {}
        self._lock = threading.Lock()

    def random_bytes(self, size: int) -> bytes:
        secret = os.urandom(size)
        with self._lock:
            self.drawn.append(secret)
        return secret

    def source(
        self, parameters: LatticeParameters, public_seed: bytes, hints: Callable[[Product], Centred]
    ) -> LatticeSource:
        """A mask source of a client's, which draws from here."""
        assert parameters == LATTICE
        self.public_seed = public_seed

        def remembered(product: Product) -> Centred:
            self._products[product.label] = product
            return hints(product)

        return LatticeSource(parameters, public_seed, remembered, self.random_bytes)

    def assert_each_row_has_a_mask_of_its_own(self, received: Sequence[Received]) -> dict[str, int]:
        """Explains every row that was received by a row of a mask that no other row has.

        What a mask leaves of an operand is small, and what a wrong one leaves is anything, so the masks
        tell by themselves which row they cover.

        Returns:
            How many rows there are of each product.
        """
        assert len(set(self.drawn)) == len(self.drawn), "a block's secret was drawn twice"
        operands: dict[str, list[Residues]] = defaultdict(list)
        for x in received:
            if x.residues is not None:
                operands[x.product].append(x.residues)
        owners: dict[bytes, str] = {}
        blocks = self._blocks([self._products[label] for label in operands])
        for label, parts in operands.items():
            rows = np.concatenate(parts)
            used = self._matches(rows, np.concatenate([masks for _, masks in blocks[label]]))
            assert len(set(used)) == len(used), f"a mask's row served twice for {label}"
            of_block: dict[bytes, list[int]] = defaultdict(list)
            for block, row in (divmod(row, DEGREE) for row in used):
                of_block[blocks[label][block][0]].append(row)
            for secret, handed_out in of_block.items():
                assert owners.setdefault(secret, label) == label, "a secret served two products"
                assert sorted(handed_out) == list(range(len(handed_out))), "rows were drawn for nothing"
        return {label: sum(map(len, parts)) for label, parts in operands.items()}

    def _blocks(self, products: Sequence[Product]) -> dict[str, list[tuple[bytes, Residues]]]:
        """All masks that any of the secrets gives for each product."""
        secrets = iter([secret for _ in products for secret in self.drawn])
        empty = np.zeros(packed_shape(LATTICE, 1), np.int32)
        source = LatticeSource(LATTICE, self.public_seed, lambda _: empty, lambda size: next(secrets))
        return {
            product.label: [
                (
                    secret,
                    source.hide_integers(np.zeros((DEGREE, product.contraction), np.int32), product)
                    .shares[0]
                    .residues,
                )
                for secret in self.drawn
            ]
            for product in products
        }

    @staticmethod
    def _matches(rows: Residues, masks: Residues) -> list[int]:
        """For each row the only mask that leaves something small of it."""
        few, q = masks[:, :16].astype(np.int64), LATTICE.residues.modulus
        order = np.argsort(few[:, 0])
        sorted_first = few[order, 0]
        found = []
        for row in rows[:, :16].astype(np.int64):
            # Masks that are near in the first column, across 0 too; then those near in all of them.
            near = [np.searchsorted(sorted_first, row[0] + x) for x in (-SMALL, SMALL)]
            near += [np.searchsorted(sorted_first, q + row[0] - SMALL)]
            near += [np.searchsorted(sorted_first, row[0] + SMALL - q)]
            candidates = order[np.r_[near[0] : near[1], near[2] : len(order), 0 : near[3]]]
            rest = (row - few[candidates] + q // 2) % q - q // 2
            (index,) = candidates[(abs(rest) < SMALL).all(axis=1)]
            found.append(int(index))
        return found


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """Watches the randomness of all models that the test loads."""
    ledger = Ledger()
    monkeypatch.setattr(connect_module, "LatticeSource", ledger.source)
    return ledger


@pytest.fixture
def counted(operators: RunningOperators, load: Load, ledger: Ledger, tmp_path: Path) -> Iterator["Counted"]:
    """A model whose only worker records what it gets, from the first operand on."""
    model = load("llama", **_lattice(operators))
    worker = operators[0].workers[0]
    worker.record(tmp_path / "received")
    counted = Counted(model, worker, ledger, tmp_path / "received")
    yield counted
    worker.record(None)


class Counted:
    """See the fixture of that name."""

    def __init__(self, model: PreTrainedModel, worker: RunningWorker, ledger: Ledger, folder: Path) -> None:
        self.model, self.worker, self.ledger, self.folder = model, worker, ledger, folder

    def received(self) -> list[Received]:
        return read_recording(self.folder)

    def assert_once(self, processes: int = 1) -> dict[str, int]:
        """No mask's row served twice, and none was left out while a block had rows left."""
        received = self.received()
        assert len({x.operand for x in received}) == len(received)
        counts = self.ledger.assert_each_row_has_a_mask_of_its_own(received)
        if processes == 1:
            assert len(self.ledger.drawn) == sum(-(-rows // DEGREE) for rows in counts.values())
        return counts


def test_the_search_for_reused_rows_finds_one(counted: Counted) -> None:
    """This is what makes the other tests here meaningful."""
    counted.model(**batch("llama"))
    received = counted.received()
    assert counted.assert_once()
    with pytest.raises(AssertionError, match="served twice"):
        counted.ledger.assert_each_row_has_a_mask_of_its_own([*received, received[3]])
    first = counted.ledger.drawn[0]
    counted.ledger.drawn.append(first)
    with pytest.raises(AssertionError, match="drawn twice"):
        counted.ledger.assert_each_row_has_a_mask_of_its_own(received)
    counted.ledger.drawn = [os.urandom(32)]
    with pytest.raises(ValueError, match="unpack"):
        counted.ledger.assert_each_row_has_a_mask_of_its_own(received)


def test_equal_training_steps_draw_fresh_rows(counted: Counted, reference_step: Step) -> None:
    model = with_adapter(counted.model, "llama")
    for _ in range(4):
        _assert_close(training_step(model, "llama"), reference_step)
    counts = counted.assert_once()
    assert set(counts.values()) == {4 * 14}
    assert len(counted.ledger.drawn) == len(counts) == STEP, "short operands share blocks"


def test_operands_longer_than_a_block_draw_fresh_rows(counted: Counted) -> None:
    model = with_adapter(counted.model, "llama")
    for rows, tokens in ((6, 50), (1, 9), (5, 47)):
        training_step(model, "llama", batch("llama", rows=rows, tokens=tokens))
    assert set(counted.assert_once().values()) == {300 + 9 + 235}


def _train(model: nn.Module, folder: Path, **options: Any) -> list[float]:
    """Trains with a stock trainer; returns the losses."""
    ids = batch("llama", rows=12, tokens=9)["input_ids"]
    arguments = TrainingArguments(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        use_cpu=True,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids]
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("accumulated", [1, 3])
def test_gradient_accumulation_draws_fresh_rows(
    counted: Counted, load: Load, tmp_path: Path, accumulated: int
) -> None:
    options = {"gradient_accumulation_steps": accumulated}
    losses = _train(with_adapter(counted.model, "llama"), tmp_path / "private", **options)
    assert set(counted.assert_once().values()) == {2 * accumulated * 18}
    expected = _train(
        with_adapter(load("llama", masking="reference"), "llama"), tmp_path / "reference", **options
    )
    assert losses == pytest.approx(expected, rel=CLOSE)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_gradient_checkpointing_computes_again_gets_fresh_rows(
    counted: Counted, tmp_path: Path, reentrant: bool
) -> None:
    counted.model.config.use_cache = False
    _train(
        with_adapter(counted.model, "llama"),
        tmp_path / "training",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        gradient_accumulation_steps=2,
    )
    counts = counted.assert_once()
    for label, rows in counts.items():
        # Layers inside checkpointed blocks are computed again, the head is not.
        again = label.startswith("forward") and "lm_head" not in label
        assert rows == (2 if again else 1) * 2 * 2 * 18, label
    assert any(rows == 2 * 2 * 2 * 18 for rows in counts.values())


@pytest.mark.parametrize("fault", ["one residue is off by one", "a row too few", "unavailable", "busy"])
@pytest.mark.parametrize("at", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_a_retry_sends_the_same_bytes_and_draws_nothing(
    operators: RunningOperators,
    load: Load,
    ledger: Ledger,
    reference_step: Step,
    tmp_path: Path,
    fault: str,
    at: int,
) -> None:
    model = with_adapter(load("llama", **_lattice(operators, workers=[0, 1])), "llama")
    failing, replica = operators[0].workers
    for worker, name in ((failing, "failing"), (replica, "replica")):
        worker.record(tmp_path / name)
    failing.lie("llama", fault, at=at, times=100)
    _assert_close(training_step(model, "llama"), reference_step)
    sent = {name: read_recording(tmp_path / name) for name in ("failing", "replica")}
    both = {x.operand for x in sent["failing"]} & {x.operand for x in sent["replica"]}
    assert both, "something was sent a second time"
    assert len(sent["failing"]) + len(sent["replica"]) == STEP + len(both)
    distinct = {x.operand: x for x in sent["failing"] + sent["replica"]}
    assert len(distinct) == STEP
    counts = ledger.assert_each_row_has_a_mask_of_its_own(list(distinct.values()))
    assert set(counts.values()) == {14}
    assert len(ledger.drawn) == STEP
    training_step(model, "llama")
    assert len(ledger.drawn) == STEP, "the next rows come from the same blocks"


def test_an_operand_that_failed_for_good_does_not_give_its_rows_back(
    operators: RunningOperators, load: Load, ledger: Ledger, tmp_path: Path
) -> None:
    model = load("llama", **_lattice(operators), retry_seconds=1.0).eval()
    worker = operators[0].workers[0]
    worker.record(tmp_path)
    worker.lie("llama", "unavailable", at=FORWARD, times=1000)
    with torch.no_grad():
        with pytest.raises(OperatorUnavailableError):
            model(**batch("llama"))
        worker.lie("llama", None)
        model(**batch("llama"))
    received = read_recording(tmp_path)
    distinct = {x.operand: x for x in received}
    assert len(distinct) < len(received), "attempts are repeated, with the same bytes"
    counts = ledger.assert_each_row_has_a_mask_of_its_own(list(distinct.values()))
    assert Counter(counts.values()) == {14: 9 - FORWARD, 2 * 14: FORWARD}


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "with an adapter"])
def test_a_deep_copy_of_a_model_draws_from_the_same_stock(counted: Counted, wrapped: bool) -> None:
    model: nn.Module = with_adapter(counted.model, "llama") if wrapped else counted.model
    model.eval()
    copies = [model, copy.deepcopy(model)]
    copies.append(copy.deepcopy(copies[1]))
    for _ in range(2):
        for each in copies:
            embedded = counted.model.get_input_embeddings()(batch("llama")["input_ids"]).detach()
            each(inputs_embeds=embedded.requires_grad_()).logits.sum().backward()
    counts = counted.assert_once()
    assert set(counts.values()) == {2 * 3 * 14}
    assert len(counts) == HINTS


def test_threads_that_use_a_model_at_the_same_time_never_share_a_row(counted: Counted, load: Load) -> None:
    model = with_adapter(counted.model, "llama").eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    inputs = [batch("llama", rows=1 + seed % 3, tokens=5 + 9 * seed, seed=seed) for seed in range(6)]
    ready = threading.Barrier(2)

    def work(mine: Sequence[dict[str, torch.Tensor]]) -> list[tuple[float, torch.Tensor]]:
        ready.wait()
        results = []
        for x in mine:
            loss = model(**x).loss
            gradients = torch.autograd.grad(loss, parameters)
            results.append((loss.item(), torch.cat([g.flatten() for g in gradients])))
        return results

    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(work, (inputs[:3], inputs[3:])))
    rows = sum(x["input_ids"].numel() for x in inputs)
    assert set(counted.assert_once().values()) == {rows}
    model = with_adapter(load("llama", masking="reference"), "llama").eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    ready = threading.Barrier(1)
    for (loss, gradient), (expected, reference) in zip(halves[0] + halves[1], work(inputs), strict=True):
        assert loss == pytest.approx(expected, rel=CLOSE)
        assert (gradient - reference).norm() < CLOSE * reference.norm()


def test_models_loaded_from_one_kit_share_hints_and_no_row(
    operators: RunningOperators, load: Load, ledger: Ledger, tmp_path: Path
) -> None:
    models = [load("llama", **_lattice(operators)).eval() for _ in range(2)]
    operators[0].workers[0].record(tmp_path)
    with torch.no_grad():
        for model in (*models, *models):
            model(**batch("llama"))
    counts = ledger.assert_each_row_has_a_mask_of_its_own(read_recording(tmp_path))
    assert set(counts.values()) == {4 * 14}
    assert len(ledger.drawn) == 2 * len(counts)


FORKING = """
import json, os, signal, sys
from functools import partial

import torch
from support.checkpoints import CLASSES, batch

from blindtune.client import BlindConfig, multiplier_of
from blindtune.client.rounds import connect
from blindtune.protocol.lattice.source import LatticeSource

settings = json.loads(sys.argv[1])
torch.set_num_threads(1)  # torch's own threads do not survive a fork
drawn = os.open(settings["drawn"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def random_bytes(size):
    secret = os.urandom(size)
    os.write(drawn, f"{os.getpid()} {secret.hex()}\\n".encode())
    return secret

connect.LatticeSource = partial(LatticeSource, random_bytes=random_bytes)
config = BlindConfig(settings["operators"], "lattice", progress=False)
model = CLASSES["llama"].from_pretrained(settings["model"], quantization_config=config).eval()
inputs = batch("llama", rows=3, tokens=11)

def logits():
    with torch.no_grad():
        return model(**inputs).logits

expected = logits()

def use():
    for _ in range(2):
        torch.testing.assert_close(logits(), expected, rtol=1e-2, atol=2e-2)

children = []
for generation in range(2):
    child = os.fork()
    if not child:
        signal.alarm(60)  # should it hang, it ends
        try:
            use()
            grandchild = os.fork()
            use()
            if grandchild and os.waitpid(grandchild, 0)[1]:
                os._exit(4)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(3)
    children.append(child)
    use()
print([os.waitpid(child, 0)[1] for child in children], flush=True)
use()
multiplier_of(model).close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_processes_never_use_a_row_of_their_parents(
    operators: RunningOperators, load: Load, checkpoints: dict[str, Path], ledger: Ledger, tmp_path: Path
) -> None:
    load("llama", **_lattice(operators))(**batch("llama"))  # the hints are there, and known to the ledger
    ledger.drawn.clear()
    operator = asdict(operators[0].operator("llama", [0]))
    operator = {
        name: value if isinstance(value, str | tuple | None) else str(value)
        for name, value in operator.items()
    }
    settings = {
        "operators": [operator],
        "model": str(checkpoints["llama"]),
        "drawn": str(tmp_path / "drawn"),
    }
    worker = operators[0].workers[0]
    worker.record(tmp_path / "received")
    ended = subprocess.run(
        [sys.executable, "-c", FORKING, json.dumps(settings)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    worker.record(None)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "[0, 0]\n", ended.stderr
    lines = [line.split() for line in (tmp_path / "drawn").read_text().splitlines()]
    ledger.drawn = [bytes.fromhex(secret) for _, secret in lines]
    received = read_recording(tmp_path / "received")
    assert len({x.operand for x in received}) == len(received)
    counts = ledger.assert_each_row_has_a_mask_of_its_own(received)
    # The parent asks 7 times, each child 4 times, each child's child twice.
    assert set(counts.values()) == {(7 + 2 * 4 + 2 * 2) * 33}
    drawing = Counter(process for process, _ in lines)
    assert list(drawing.values()) == 5 * [len(counts)], "each of five processes drew blocks of its own"


# Larger models.


@pytest.mark.slow
def test_a_vocabulary_that_is_cut_into_spans_is_close_to_the_reference(load: Load, tmp_path: Path) -> None:
    """The head's backward contracts over more than one product may, so its parts have masks of their own."""
    config = LlamaConfig(
        vocab_size=MAX_CONTRACTION + 3000,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    folder = tmp_path / "model"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        LlamaForCausalLM(config).save_pretrained(folder)
    with running_operators(tmp_path, {"wide": folder}, (1,)) as operators:
        asked = operators.operators("wide")
        model = load("llama", folder=folder, masking="lattice", precision="full", operators=asked)
        head = model.get_output_embeddings()
        assert isinstance(head, RemoteLinear) and head.out_features > MAX_CONTRACTION
        # By the same reckoning, a product with 32,768 terms is off by no more than this.
        _assert_close(_step(model), _step(load("llama", folder=folder, masking="reference")), 2**-6)


@pytest.mark.slow
def test_every_loss_of_a_fine_tuning_run_is_that_of_the_reference(tmp_path: Path) -> None:
    from support.assets import asset
    from support.fine_tuning import fine_tune

    steps = 50
    expected, _ = fine_tune(tmp_path / "reference", BlindConfig(masking="reference", progress=False), steps)
    with running_operators(tmp_path, {"tiny-llama": asset("models/tiny-llama")}, (1,)) as operators:
        config = BlindConfig(operators.operators("tiny-llama"), "lattice", progress=False)
        losses, trainer = fine_tune(tmp_path / "lattice", config, steps)
        (figures,) = multiplier_of(trainer.model).statistics().values()
        multiplier_of(trainer.model).close()
    assert len(losses) == len(expected) == steps
    assert losses == pytest.approx(expected, rel=0.01)
    assert expected[-1] < expected[0], "something was learnt"
    assert figures.lies == ()
    assert figures.verified_responses > steps
