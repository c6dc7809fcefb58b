"""Certified products of a client: corrected or asked for again, never wrong, and only after verification."""

import gc
import logging
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.transports import LocalWorker, manifest_of, remote_multiplier

from blindtune.checkpoint import Checkpoint
from blindtune.client.kit.kit import Kit
from blindtune.client.operators.messages import WorkRequest
from blindtune.client.rounds import steps
from blindtune.client.rounds.certified import _part
from blindtune.client.rounds.multiplier import PrivateMultiplier, ReferenceMultiplier, RemoteMultiplier
from blindtune.errors import CheckpointError, FixedPointError, UntrustworthyOperatorError
from blindtune.protocol.certificate.certified import Certified
from blindtune.protocol.certificate.history import WINDOW, ScaleHistory
from blindtune.protocol.certificate.scales import FINEST, first_level
from blindtune.protocol.fixed_point import quantize_rows
from blindtune.protocol.lattice.hint import hint_request, pack_rows, packed_shape
from blindtune.protocol.lattice.parameters import DEGREE, MLWE1280
from blindtune.protocol.lattice.source import LatticeSource
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import Q31, ParameterSet
from blindtune.protocol.products import Product, backward_products, forward_products
from blindtune.protocol.residues import Centred, Residues
from blindtune.protocol.shares.source import ShareSource

ATTENTION = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
(FORWARD,) = forward_products(ATTENTION, 32)
(BACKWARD,) = backward_products(zip(ATTENTION, (32, 16, 16), strict=True))
CERTIFIED = replace(Q31, certified=True)
TOY = replace(MLWE1280, rank=1, residues=CERTIFIED)
Float32 = NDArray[np.float32]


class Operators:
    """Operators in this process; workers may lie, and a certified multiplier asks them."""

    def __init__(self, kit: Kit, honest: Multiplier) -> None:
        self._kit, self._honest = kit, honest
        self.workers: list[LocalWorker] = []

    def shares(self, most_reasks: int = 10_000) -> RemoteMultiplier:
        return self._multiplier(2, ShareSource(2, CERTIFIED), most_reasks)

    def lattice(
        self, most_reasks: int = 10_000, damage: Callable[[Centred], None] = lambda hint: None
    ) -> RemoteMultiplier:
        def hint(product: Product) -> Centred:
            packed = np.empty(packed_shape(TOY, self._kit.outputs(product)), np.int32)
            for first in range(0, TOY.dimension, DEGREE):
                share = hint_request(Q31, bytes(32), product, first, DEGREE)
                pack_rows(self._honest.multiply(product, share.residues, Q31), packed, first, Q31)
            damage(packed)
            return packed

        return self._multiplier(1, LatticeSource(TOY, bytes(32), hint), most_reasks)

    def _multiplier(self, count: int, source: Any, most_reasks: int) -> RemoteMultiplier:
        self.workers = [LocalWorker(self._honest, manifest_of(self._kit)) for _ in range(count)]
        transports = [[worker] for worker in self.workers]
        return remote_multiplier(
            self._kit, transports, retry_seconds=0.0, source=source, most_reasks=most_reasks
        )

    @property
    def operands(self) -> list[Residues]:
        """That the last worker was sent."""
        return [request.share.residues for request in self.workers[-1].requests]


@pytest.fixture
def operators(kit: Kit, honest: Multiplier) -> Operators:
    return Operators(kit, honest)


@pytest.fixture
def reference(checkpoint: Checkpoint, kit: Kit) -> ReferenceMultiplier:
    return ReferenceMultiplier(checkpoint, CERTIFIED, kit, most_reasks=10_000)


def rows_of(product: Product, rows: int = 40, seed: int = 0) -> Float32:
    """Some of zeros, and some with most of their norm in one column."""
    x = np.random.default_rng(seed).standard_normal((rows, product.contraction))
    x[::7] = 0
    x[3::7, 2] *= 30
    return x.astype(np.float32)


def multiplied(multiplier: PrivateMultiplier, x: Float32, product: Product, counted: bool = True) -> Float32:
    scale = np.random.default_rng(1).uniform(0.5, 2, x.shape[1]).astype(np.float32)
    return multiplier.multiply_certified(x, product, scale, None, counted)


def exact(honest: Multiplier, x: Float32, product: Product) -> NDArray[np.float64]:
    """In float64, and the norm that an error is measured by."""
    scale = np.random.default_rng(1).uniform(0.5, 2, x.shape[1])
    unit = np.eye(product.contraction, dtype=np.uint32)
    matrix = honest.multiply(product, unit, Q31).astype(np.int64)
    matrix[matrix > Q31.half] -= Q31.modulus
    return (x * scale.astype(np.float32)).astype(np.float64) @ matrix


def at_level(monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    """K, forced down (or up)."""
    monkeypatch.setattr(ScaleHistory, "level", lambda self, product: level)


@pytest.mark.parametrize("level", [0, 9, FINEST])
@pytest.mark.parametrize("product", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_whatever_wraps_shares_give_the_references_bits_and_both_the_product(
    operators: Operators,
    reference: ReferenceMultiplier,
    honest: Multiplier,
    monkeypatch: pytest.MonkeyPatch,
    product: Product,
    level: int,
) -> None:
    at_level(monkeypatch, level)
    shares, lattice, x = operators.shares(), operators.lattice(), rows_of(product)
    found = multiplied(shares, x, product)
    assert found.tobytes() == multiplied(reference, x, product).tobytes()
    right = exact(honest, x, product)
    size = np.linalg.norm(x, axis=1, keepdims=True) * 3000
    assert (abs(found - right) <= 2.0**-20 * size).all()
    error = (abs(multiplied(lattice, x, product) - right) / size)[x.any(axis=1)].max()
    # Rows that are asked for again are as precise as others: the second one carries the noise of the first.
    assert error <= 2.0 ** (-24 if level == FINEST else -19)
    for multiplier in (shares, lattice, reference):
        assert multiplier.certified is not None
        seen = multiplier.certified.certificates()
        assert (seen.wraps > 0) == (level == 9)
        assert level or not seen.reasks
        assert level != FINEST or seen.reasks > 20


def test_a_row_is_asked_for_again_as_two_rows_of_a_new_operand_under_a_new_mask(
    operators: Operators, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_level(monkeypatch, FINEST)
    x = rows_of(FORWARD)
    for mode in (operators.shares, operators.lattice):
        multiplier = mode()
        multiplied(multiplier, x, FORWARD)
        assert multiplier.certified is not None
        first, second = operators.operands
        assert len(second) == 2 * multiplier.certified.certificates().reasks < 2 * len(first)
        words = {row.tobytes() for row in (*first, *second)}
        assert len(words) == len(first) + len(second)
        seeds = [request.share.seed for request in operators.workers[0].requests]
        assert len({seed and seed.key for seed in seeds}) == (2 if len(operators.workers) > 1 else 1)


class Lying:
    def __init__(self, honest: Multiplier) -> None:
        self._honest = honest

    def multiply(self, product: Product, operand: Any, parameters: ParameterSet) -> Residues:
        answer = self._honest.multiply(product, operand, parameters)
        answer[-1, -1] ^= 1
        return answer


def test_what_is_asked_again_was_verified_first_at_every_operator(
    operators: Operators,
    honest: Multiplier,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A lie is found as one: no syndrome is looked at, nothing is asked for again, no wrap is counted."""
    at_level(monkeypatch, FINEST)
    caplog.set_level(logging.INFO, logger="blindtune")
    for liar in (0, 1):
        multiplier = operators.shares()
        operators.workers[liar].multiplier = Lying(honest)
        with pytest.raises(UntrustworthyOperatorError):
            multiplied(multiplier, rows_of(FORWARD), FORWARD)
        assert all(len(worker.requests) == 1 for worker in operators.workers)
        assert multiplier.certified is not None
        assert multiplier.certified.certificates().wraps == 0
        assert multiplier.certified.certificates().reasks == 0
    assert "asking again" not in caplog.text


@pytest.mark.parametrize(("most", "stops"), [(8, True), (100, False)])
def test_more_rows_than_may_be_asked_again_stop_the_run_before_they_are(
    operators: Operators, monkeypatch: pytest.MonkeyPatch, most: int, stops: bool
) -> None:
    at_level(monkeypatch, FINEST)
    multiplier = operators.shares(most_reasks=most)
    if stops:
        with pytest.raises(
            FixedPointError, match=r"rows of this step wrap .* 8 may be asked for again.*precision full"
        ):
            multiplied(multiplier, rows_of(FORWARD), FORWARD)
    else:
        multiplied(multiplier, rows_of(FORWARD), FORWARD)
    assert len(operators.operands) == (1 if stops else 2)


def test_a_step_of_an_optimizer_allows_for_new_rows_to_be_asked_again(
    operators: Operators, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_level(monkeypatch, FINEST)
    multiplier, x = operators.shares(most_reasks=5), rows_of(FORWARD)[1:5]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
    for _ in range(3):
        multiplied(multiplier, x, FORWARD)
        optimizer.step()
    multiplied(multiplier, x, FORWARD)
    with pytest.raises(FixedPointError, match="8 rows of this step"):
        multiplied(multiplier, x, FORWARD)


class Flipping:
    """Flips a bit of an answer after it was verified."""

    def __init__(self, multiplier: PrivateMultiplier, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        real, self.left = multiplier._ask, times

        def ask(masked: Any, product: Product, decode: Any) -> Any:
            def decoded(answers: list[Residues]) -> Any:
                if self.left:
                    self.left -= 1
                    answers = [answer.copy() for answer in answers]
                    answers[-1][8, 11] ^= np.uint32(1 << 9)
                return decode(answers)

            return real(masked, product, decoded)

        monkeypatch.setattr(multiplier, "_ask", ask)


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("mode", ["shares", "lattice"])
def test_a_bit_that_flips_after_verification_is_repaired_and_counted_or_stops_the_run(
    operators: Operators,
    honest: Multiplier,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: str,
    level: int,
) -> None:
    at_level(monkeypatch, level)
    caplog.set_level(logging.INFO, logger="blindtune")
    multiplier, x = getattr(operators, mode)(), rows_of(FORWARD)
    Flipping(multiplier, monkeypatch, 1)
    if mode == "shares" and level == 0:  # the proven scale: nothing wraps there
        with pytest.raises(FixedPointError, match="1 of 40 rows of forward .* memory or a hint"):
            multiplied(multiplier, x, FORWARD)
        return
    found = multiplied(multiplier, x, FORWARD)
    size = np.linalg.norm(x, axis=1, keepdims=True) * 3000
    assert (abs(found - exact(honest, x, FORWARD)) <= 2.0**-14 * size).all()
    assert multiplier.certified.certificates().reasks == 1
    assert "asking again for 1 rows" in caplog.text


@pytest.mark.parametrize("level", [0, 6, FINEST])
def test_a_changed_hint_always_stops_the_run(
    operators: Operators, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    at_level(monkeypatch, level)

    def damage(hint: Centred) -> None:
        hint[0, 0, 100, 5] ^= 1

    for x in (rows_of(FORWARD), rows_of(FORWARD)[1:2]):
        with pytest.raises(FixedPointError, match="memory or a hint of this machine is damaged"):
            multiplied(operators.lattice(damage=damage), x, FORWARD)


def test_scales_follow_the_last_steps_and_stand_still_within_one(
    operators: Operators, reference: ReferenceMultiplier
) -> None:
    multiplier, optimizer = operators.shares(), torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
    assert multiplier.certified is not None
    history = multiplier.certified.history
    assert first_level(2048) == 6 and history.level(FORWARD) == first_level(32) == 0

    def level_after(x: Float32, product: Product = FORWARD, counted: bool = True) -> int:
        before = history.level(product)
        multiplied(multiplier, x, product, counted)
        multiplied(multiplier, x / 3, product, counted)
        assert history.level(product) == before
        optimizer.step()
        return history.level(product)

    # Rows that no output is large for, and some that are along a column of M.
    matrix = exact_columns(multiplier)
    _, _, vt = np.linalg.svd(matrix.T)
    small, large = vt[-4:].astype(np.float32), matrix.T[:4].astype(np.float32)
    scale = np.random.default_rng(1).uniform(0.5, 2, 32).astype(np.float32)
    small, large = small / scale, large / scale
    fine = level_after(small)
    assert fine > 0
    assert level_after(large, counted=False) == fine, "what has no gradients decides on nothing"
    assert level_after(np.zeros_like(small)) == fine
    assert level_after(large) < fine
    coarse = history.level(FORWARD)
    for _ in range(WINDOW - 1):
        assert level_after(small) == coarse
    assert level_after(small) == fine
    assert history.level(BACKWARD) == 0
    optimizer.step()
    assert history.level(FORWARD) == fine, "a step without rows"


def test_the_part_that_a_result_takes_is_not_understated_where_rounding_is_diffused() -> None:
    (product,) = backward_products([("head", 4096)])
    # In each lane every column falls short by what the one before left, and by as much again.
    lane = np.resize([2.9, -2.9], 256)
    lane[0] = 2.45
    x, budget = np.repeat(lane, 16)[np.newaxis].astype(np.float32), 249**2
    (z,), _ = quantize_rows(x, budget, diffused=product.diffused)
    assert np.unique(np.abs(z)).tolist() == [2]
    # M is a column along the row, so that the result takes all that Cauchy and Schwarz allow.
    found = Certified(x, np.array([int(z @ np.sign(z))]), np.empty(0, np.int64))
    assert 1 <= _part(found, budget, int((np.sign(z) ** 2).sum()), product) < 1.1


def exact_columns(multiplier: RemoteMultiplier) -> NDArray[np.float64]:
    """M of FORWARD, through workers."""
    unit = np.eye(32, dtype=np.int32)
    return multiplier.multiply_integers(unit, FORWARD).astype(np.float64)


def test_scales_do_not_depend_on_the_order_of_operands_and_come_back_from_a_checkpoint(
    operators: Operators,
) -> None:
    states = []
    for order in ((0, 1, 2), (2, 0, 1)):
        multiplier = operators.shares()
        assert multiplier.certified is not None
        for step in range(3):
            for i in order:
                multiplied(multiplier, rows_of(FORWARD, seed=3 * step + i), FORWARD)
                multiplied(multiplier, rows_of(BACKWARD, seed=3 * step + i), BACKWARD)
            if step < 2:
                multiplier.certified.step()
        states.append(multiplier.certified.history.state())
    assert states[0] == states[1] and states[0]["open"]
    history = ScaleHistory()
    history.restore(states[0])
    assert history.state() == states[0]
    assert history.level(FORWARD) == multiplier.certified.history.level(FORWARD)


@pytest.mark.parametrize(
    "change",
    [
        {"window": 15},
        {"more": 1},
        {"steps": {"a": []}},
        {"steps": {"a": [0.1] * 17}},
        {"steps": {"a": [float("nan")]}},
        {"steps": {"a": [2.0]}},
        {"open": {"a": "x"}},
        {"open": []},
    ],
)
def test_scales_that_are_damaged_are_refused(change: dict[str, Any]) -> None:
    history = ScaleHistory()
    with pytest.raises(CheckpointError, match="scales of the certified fixed point are damaged"):
        history.restore(history.state() | change)


def test_scales_and_words_are_neither_sent_nor_shown_nor_pickled(
    operators: Operators, kit: Kit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    at_level(monkeypatch, 9)
    caplog.set_level(logging.DEBUG, logger="blindtune")
    for mode in (operators.shares, operators.lattice):
        multiplier = mode()
        multiplied(multiplier, rows_of(FORWARD), FORWARD)
        assert operators.operands
        assert multiplier.certified is not None
        words, history = kit.certificate(FORWARD), multiplier.certified.history
        secrets = [a.tobytes() for a in (words.u, words.image, words.long_u, words.long_image)]
        for request in (r for worker in operators.workers for r in worker.requests):
            sent = _bytes_of(request)
            assert not any(secret[:8] in sent for secret in secrets)
            assert not any(str(int(word)).encode() in sent for word in (*words.u, *words.long_u))
        shown = repr([multiplier, multiplier.certified, words, history, multiplier.certified.certificates()])
        assert not any(str(int(word)) in shown + caplog.text for word in words.u)
        for thing in (words, history):
            with pytest.raises(TypeError):
                pickle.dumps(thing)


def test_requests_at_different_scales_differ_in_their_masks_alone(
    operators: Operators, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    for level in (0, 1, FINEST):
        at_level(monkeypatch, level)
        multiplied(operators.shares(), rows_of(FORWARD)[:1], FORWARD)
        requests = [worker.requests[0] for worker in operators.workers]
        seeds = [request.share.seed for request in requests]
        sent.append(
            [
                (
                    request.fingerprint,
                    request.parameter_set,
                    request.product,
                    request.outputs,
                    request.share.shape,
                )
                for request in requests
            ]
            + [seed.row_offset for seed in seeds if seed]
        )
    assert sent[0] == sent[1] == sent[2]


def _bytes_of(request: WorkRequest) -> bytes:
    share = request.share
    return share.residues.tobytes() + (share.seed.key if share.seed else b"") + repr(request).encode()


def test_precision_below_that_of_bfloat16_is_said_once(
    operators: Operators, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    multiplier = operators.shares()
    assert multiplier.certified is not None
    monkeypatch.setattr("blindtune.client.rounds.certified._BFLOAT16", 2.0**-40)
    for product in (FORWARD, BACKWARD, FORWARD):
        multiplied(multiplier, rows_of(product), product)
    assert caplog.text.count("less precisely than with bfloat16") == 1
    scales = multiplier.certified.certificates().scales
    assert set(scales) == {FORWARD.label, BACKWARD.label}
    assert all(0 < x.part <= 1 and 2.0**-40 < x.precision < 2.0**-10 for x in scales.values())


def test_a_multiplier_that_is_gone_is_told_of_no_more_steps(operators: Operators) -> None:
    multiplier = operators.shares()
    before = len(steps._told)
    del multiplier
    gc.collect()
    assert len(steps._told) < before
