"""What happens to a group's operands when workers fail or lie: one mask, one try, and nothing is unmasked."""

from collections.abc import Callable, Sequence
from math import isqrt
from typing import Any

import numpy as np
import pytest
from support.lies import Rogue
from support.transports import LocalWorker, remote_multiplier

from blindtune.client.kit.kit import Kit
from blindtune.client.model.layer_group import LayerGroup
from blindtune.client.operators.policy import Failure
from blindtune.client.operators.transport import TransportError
from blindtune.client.rounds.multiplier import PrivateMultiplier
from blindtune.errors import OperatorUnavailableError, UntrustworthyOperatorError
from blindtune.protocol.lattice.parameters import LATTICE_PARAMETER_SETS
from blindtune.protocol.lattice.source import LatticeSource
from blindtune.protocol.masks import MaskedOperand, MaskSource
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Direction, Product
from blindtune.protocol.residues import Centred, Residues
from blindtune.protocol.shares.source import ShareSource

ATTENTION = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
GONE = TransportError(Failure.UNREACHABLE, "UNAVAILABLE: connection reset")
X = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)


def _gone(honest: Multiplier) -> LocalWorker:
    """Fails more often than any request is tried, and would answer in the end."""
    return LocalWorker(honest, failures=[GONE] * 100)


def test_an_operand_whose_operators_fail_is_sent_under_one_mask(kit: Kit, honest: Multiplier) -> None:
    alpha, beta = _gone(honest), LocalWorker(honest)
    group = LayerGroup(ATTENTION, kit, remote_multiplier(kit, [[alpha], [beta]]))
    with pytest.raises(OperatorUnavailableError):
        group.forward(X)
    assert len(alpha.requests) > 5
    assert len({request.share.seed for request in alpha.requests}) == 1
    assert len(beta.requests) == 1


def test_a_share_whose_operator_fails_goes_to_no_other(kit: Kit, honest: Multiplier) -> None:
    for dead in (0, 1):
        workers = [LocalWorker(honest), LocalWorker(honest)]
        workers[dead] = _gone(honest)
        group = LayerGroup(ATTENTION, kit, remote_multiplier(kit, [[worker] for worker in workers]))
        with pytest.raises(OperatorUnavailableError):
            group.forward(X)
        for index, worker in enumerate(workers):
            assert {request.share.recipient for request in worker.requests} == {index}


class FailsOnce(PrivateMultiplier):
    """Fails at the first product, and would answer the next."""

    source = ShareSource(2, Q31)

    def __init__(self, outputs: int) -> None:
        self.operands: list[MaskedOperand] = []
        self._outputs = outputs

    def _ask(self, masked: MaskedOperand, product: Product, decode: Any) -> Any:
        self.operands.append(masked)
        if len(self.operands) == 1:
            raise OperatorUnavailableError("nobody answers")
        return decode([np.zeros((share.shape[0], self._outputs), np.uint32) for share in masked.shares])


@pytest.mark.parametrize(
    ("outputs", "ask"),
    [
        (64, lambda group: group.forward(X)),
        (32, lambda group: group.backward([X, None, None])),
    ],
    ids=["forward", "backward"],
)
def test_a_product_that_failed_is_not_quantized_again(
    kit: Kit, outputs: int, ask: Callable[[LayerGroup], object]
) -> None:
    """Other integers of the same numbers, under another mask, would be one more sample of them."""
    multiplier = FailsOnce(outputs)
    group = LayerGroup(ATTENTION, kit, multiplier)
    with pytest.raises(OperatorUnavailableError):
        ask(group)
    assert len(multiplier.operands) == 1
    ask(group)
    assert len(multiplier.operands) == 2


class Watched(MaskSource):
    """Notes which responses are unmasked."""

    operators, parameters = 2, Q31

    def __init__(self) -> None:
        self.unmasked: list[Sequence[Residues]] = []
        self._source = ShareSource(2, Q31)

    def noise(self, column_absolute_sum: int) -> int:
        return self._source.noise(column_absolute_sum)

    def hide_integers(self, operand: Centred, product: Product) -> MaskedOperand:
        return WatchedOperand(self._source.hide_integers(operand, product), self.unmasked)

    def hide_reals(self, *arguments: Any, **options: Any) -> tuple[MaskedOperand, Any]:
        masked, scales = self._source.hide_reals(*arguments, **options)
        return WatchedOperand(masked, self.unmasked), scales


class WatchedOperand(MaskedOperand):
    def __init__(self, masked: MaskedOperand, unmasked: list[Sequence[Residues]]) -> None:
        self.shares = masked.shares
        self._masked, self._unmasked = masked, unmasked

    def reveal_integers(self, responses: Sequence[Residues]) -> Centred:
        self._unmasked.append(responses)
        return self._masked.reveal_integers(responses)

    def reveal_reals(self, responses: Sequence[Residues], *arguments: Any, **options: Any) -> Any:
        self._unmasked.append(responses)
        return self._masked.reveal_reals(responses, *arguments, **options)


@pytest.mark.parametrize("liar", [0, 1], ids=["who gets seeds", "who gets residues"])
def test_nothing_is_unmasked_when_an_answer_is_wrong(kit: Kit, honest: Multiplier, liar: int) -> None:
    rogue = Rogue(honest)
    rogue.plan("one residue is off by one")
    workers = [LocalWorker(honest), LocalWorker(honest)]
    workers[liar] = LocalWorker(rogue)
    multiplier = remote_multiplier(kit, [[worker] for worker in workers])
    multiplier.source = source = Watched()
    with pytest.raises(UntrustworthyOperatorError):
        LayerGroup(ATTENTION, kit, multiplier).forward(X)
    assert rogue.told == 1
    assert source.unmasked == []
    honest_workers = remote_multiplier(kit, [[LocalWorker(honest)], [LocalWorker(honest)]])
    honest_workers.source = source
    LayerGroup(ATTENTION, kit, honest_workers).forward(X)
    assert len(source.unmasked) == 1


class Budgets(PrivateMultiplier):
    """Notes what a row of each product may be, and answers zeros."""

    def __init__(self, source: MaskSource, kit: Kit) -> None:
        self.source = source
        self.budgets: dict[Product, int] = {}
        self._kit = kit

    def multiply_reals(self, x: Any, product: Product, budget: int, *scales: Any) -> Any:
        self.budgets[product] = budget
        return np.zeros((len(x), self._kit.outputs(product)), np.float32)

    def _ask(self, masked: MaskedOperand, product: Product, decode: Any) -> Any:
        raise AssertionError("nobody is asked")


def _no_hint(product: Product) -> Centred:
    raise AssertionError(f"nobody multiplies by {product.label}")


SOURCES = {
    "shares": ShareSource(2, Q31),
    # Of those with a proof: certified ones have no such budget.
    **{
        name: LatticeSource(x, bytes(32), _no_hint)
        for name, x in LATTICE_PARAMETER_SETS.items()
        if not x.residues.certified
    },
}


@pytest.mark.parametrize("masking", SOURCES)
def test_no_row_that_a_budget_allows_wraps_under_the_largest_noise(
    kit: Kit, honest: Multiplier, masking: str
) -> None:
    multiplier = Budgets(SOURCES[masking], kit)
    group = LayerGroup(ATTENTION, kit, multiplier)
    group.forward(X)
    group.backward([np.ones((5, width), np.float32) for width in group.out_features])
    forward = np.concatenate([honest._layers[name].numpy().T for name in ATTENTION], axis=1).astype(object)
    eta = 0 if masking == "shares" else LATTICE_PARAMETER_SETS[masking].eta
    for direction, matrix in ((Direction.FORWARD, forward), (Direction.BACKWARD, forward.T)):
        (budget,) = (x for product, x in multiplier.budgets.items() if product.direction is direction)
        squares, noise = (matrix**2).sum(axis=0).max(), eta * abs(matrix).sum(axis=0).max()
        assert isqrt(budget * squares) + noise <= Q31.half
        # And no part of the range is given away.
        assert (budget + 1) * squares > (Q31.half - noise) ** 2
