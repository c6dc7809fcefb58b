"""Workers that take fewer rows in a request than an operand has, or than their replicas take."""

import threading

import numpy as np
import pytest
from support.transports import LocalWorker, VirtualTime, manifest_of, remote_multiplier

from blindtune.client.kit.kit import Kit
from blindtune.client.operators.decisions import Failure
from blindtune.client.operators.messages import WorkRequest
from blindtune.client.operators.operator import OperatorClient
from blindtune.client.operators.transport import Transport, TransportError
from blindtune.client.rounds.connect import expectations
from blindtune.errors import IncompatibleWorkerError
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import forward_products
from blindtune.protocol.residues import Centred
from blindtune.protocol.shares.source import ShareSource
from blindtune.protocol.shares.unmasked import UnmaskedSource
from blindtune.server.admission.limits import Limits

ATTENTION = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
(FORWARD,) = forward_products(ATTENTION, 32)
GONE = TransportError(Failure.UNREACHABLE, "UNAVAILABLE: connection reset")
EACH_OPERATOR = pytest.mark.parametrize("operator", [0, 1], ids=["who gets seeds", "who gets residues"])


def _operand(rows: int) -> Centred:
    return np.random.default_rng(0).integers(-1000, 1000, (rows, FORWARD.contraction)).astype(np.int32)


def _request(kit: Kit, rows: int, recipient: int = 0) -> WorkRequest:
    share = ShareSource(2, Q31).hide_integers(_operand(rows), FORWARD).shares[recipient]
    return WorkRequest(kit.description.fingerprint, Q31.name, FORWARD, share, 64)


def _client(kit: Kit, workers: list[Transport], index: int = 0) -> OperatorClient:
    time = VirtualTime()
    named = [(f"10.0.0.{i}:7100", worker) for i, worker in enumerate(workers)]
    times = {"clock": time.clock, "sleep": time.sleep, "later": time.later}
    return OperatorClient(index, "alpha", named, expectations(kit, Q31), 60.0, 60.0, **times)  # type: ignore[arg-type]


def test_operands_longer_than_a_worker_takes_are_cut_for_its_own_rows(kit: Kit, honest: Multiplier) -> None:
    limits = manifest_of(kit, Limits(max_rows=64))
    workers = [LocalWorker(honest, limits), LocalWorker(honest, limits)]
    multiplier = remote_multiplier(kit, [[worker] for worker in workers])
    for operator in multiplier._operators:
        operator.connect()
    operand = _operand(160)
    masked = UnmaskedSource(Q31).hide_integers(operand, FORWARD)
    expected = masked.reveal_integers([honest.multiply(FORWARD, masked.shares[0].residues, Q31)])
    assert np.array_equal(multiplier.multiply_integers(operand, FORWARD), expected)
    assert [len(request.share.residues) for request in workers[1].requests] == [53, 53, 54]
    seeds = [request.share.seed for request in workers[0].requests]
    assert [seed.row_offset for seed in seeds if seed] == [0, 53, 106]


@pytest.mark.parametrize("limits", [Limits(max_rows=64), Limits(max_operand_bytes=1 << 20)])
@EACH_OPERATOR
def test_the_limits_of_one_replica_do_not_cut_what_others_get(
    kit: Kit, honest: Multiplier, limits: Limits, operator: int
) -> None:
    most = min(limits.max_rows, limits.max_operand_bytes // (4 * FORWARD.contraction))
    generous = LocalWorker(honest, manifest_of(kit))
    strict = LocalWorker(honest, manifest_of(kit, limits))
    both = threading.Event()
    strict.before = lambda request: both.set()
    generous.before = lambda request: both.wait(60) and None
    client = _client(kit, [strict, generous], operator)
    client.connect()
    rows = 16 * max(most, 256)
    request = _request(kit, rows, operator)
    answer = client.multiply(request, kit.check_vectors(FORWARD, Q31))
    assert np.array_equal(answer, honest.multiply(FORWARD, request.share.residues, Q31))
    sizes = [[x.share.shape[0] for x in worker.requests] for worker in (strict, generous)]
    assert sum(sizes[0] + sizes[1]) == rows
    assert 0 < max(sizes[0]) <= most < max(sizes[1])


def test_rows_that_failed_at_a_worker_go_on_in_pieces_to_one_that_takes_fewer(
    kit: Kit, honest: Multiplier
) -> None:
    generous = LocalWorker(honest, manifest_of(kit), failures=[GONE] * 1000)
    strict = LocalWorker(honest, manifest_of(kit, Limits(max_rows=64)))
    client = _client(kit, [generous, strict])
    client.connect()
    request = _request(kit, 193)
    answer = client.multiply(request, kit.check_vectors(FORWARD, Q31))
    assert np.array_equal(answer, honest.multiply(FORWARD, request.share.residues, Q31))
    assert generous.requests[0].share.shape[0] == 193
    offsets = [(x.share.seed.row_offset, x.share.shape[0]) for x in strict.requests if x.share.seed]
    assert offsets == [(0, 64), (64, 64), (128, 64), (192, 1)]


@pytest.mark.parametrize("limits", [Limits(max_rows=63), Limits(max_operand_bytes=(1 << 20) - 1)])
def test_a_worker_that_takes_next_to_nothing_is_refused_by_name(
    kit: Kit, honest: Multiplier, limits: Limits
) -> None:
    strict = LocalWorker(honest, manifest_of(kit, limits))
    client = _client(kit, [LocalWorker(honest, manifest_of(kit)), strict])
    with pytest.raises(IncompatibleWorkerError, match=r"10\.0\.0\.1:7100 of operator alpha takes .*max-rows"):
        client.connect()
