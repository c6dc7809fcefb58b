"""Operators whose workers are in this process: what is sent to whom, and what happens when it fails."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.lies import LIES, Rogue
from support.transports import LocalWorker, VirtualTime, manifest_of, remote_multiplier

from blindtune.client.kit.kit import Kit
from blindtune.client.operators.decisions import Failure
from blindtune.client.operators.manifest import Expectations
from blindtune.client.operators.messages import WorkRequest
from blindtune.client.operators.operator import OperatorClient
from blindtune.client.operators.transport import Transport, TransportError
from blindtune.client.rounds.multiplier import RemoteMultiplier
from blindtune.errors import (
    IncompatibleWorkerError,
    OperatorUnavailableError,
    ProtocolError,
    UntrustworthyOperatorError,
    VerificationError,
)
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import Q31, ParameterSet
from blindtune.protocol.products import Product, backward_products, forward_products
from blindtune.protocol.residues import Centred, Residues
from blindtune.protocol.shares.source import ShareSource
from blindtune.protocol.shares.unmasked import UnmaskedSource
from blindtune.server.hooks import Multiplying

ATTENTION = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
(FORWARD,) = forward_products(ATTENTION, 32)
(BACKWARD,) = backward_products(zip(ATTENTION, (32, 16, 16), strict=True))
GONE = TransportError(Failure.UNREACHABLE, "UNAVAILABLE: connection reset")
EACH_OPERATOR = pytest.mark.parametrize("operator", [0, 1], ids=["who gets seeds", "who gets residues"])


def _operand(product: Product, rows: int = 5, seed: int = 0) -> Centred:
    generator = np.random.default_rng(seed)
    return generator.integers(-(10**6), 10**6, (rows, product.contraction)).astype(np.int32)


def _expected(honest: Multiplier, operand: Centred, product: Product) -> Centred:
    masked = UnmaskedSource(Q31).hide_integers(operand, product)
    return masked.reveal_integers([honest.multiply(product, masked.shares[0].residues, Q31)])


def _client(
    kit: Kit, workers: list[Transport], index: int = 0, retry_seconds: float = 60.0
) -> tuple[OperatorClient, VirtualTime]:
    clock = VirtualTime()
    layers = {name: layer.fingerprint for name, layer in kit.layers.items()}
    expected = Expectations("tiny", kit.description.fingerprint, Q31.name, layers)
    named = [(f"10.0.0.{i}:7100", worker) for i, worker in enumerate(workers)]
    client = OperatorClient(
        index,
        "alpha",
        named,
        expected,
        retry_seconds,
        60.0,
        clock=clock.clock,
        sleep=clock.sleep,
        later=clock.later,
    )
    return client, clock


def _request(kit: Kit, rows: int = 5, recipient: int = 0) -> WorkRequest:
    shares = ShareSource(2, Q31).hide_integers(_operand(FORWARD, rows), FORWARD).shares
    return WorkRequest(kit.description.fingerprint, Q31.name, FORWARD, shares[recipient], 64)


@pytest.mark.parametrize("product", [FORWARD, BACKWARD], ids=["forward", "backward"])
@pytest.mark.parametrize("operators", [2, 3, 4])
def test_shares_of_several_operators_add_up_to_the_product(
    kit: Kit, honest: Multiplier, product: Product, operators: int
) -> None:
    multiplier = remote_multiplier(kit, [[LocalWorker(honest)] for _ in range(operators)])
    operand = _operand(product)
    assert np.array_equal(multiplier.multiply_integers(operand, product), _expected(honest, operand, product))


def test_all_operators_but_the_last_get_a_seed_and_the_last_gets_rows(kit: Kit, honest: Multiplier) -> None:
    workers = [LocalWorker(honest) for _ in range(3)]
    remote_multiplier(kit, [[worker] for worker in workers]).multiply_integers(_operand(FORWARD), FORWARD)
    seeds = [worker.requests[0].share.seed for worker in workers]
    assert seeds[0] and seeds[1] and seeds[2] is None
    assert seeds[0].key != seeds[1].key


def test_a_share_of_another_operator_is_refused_and_nothing_is_sent(kit: Kit, honest: Multiplier) -> None:
    worker = LocalWorker(honest)
    client, _ = _client(kit, [worker], index=0)
    request = _request(kit, recipient=1)
    with pytest.raises(ProtocolError, match="share for operator 1 .* operator 0"):
        client.multiply(request, kit.check_vectors(FORWARD, Q31))
    assert worker.requests == []


def test_operators_in_another_order_than_the_shares_are_refused(kit: Kit, honest: Multiplier) -> None:
    clients = [_client(kit, [LocalWorker(honest)], index)[0] for index in (1, 0)]
    with pytest.raises(ValueError, match="in order"):
        RemoteMultiplier(ShareSource(2, Q31), clients, kit)


def test_an_operand_without_a_mask_has_no_way_out(kit: Kit, honest: Multiplier) -> None:
    with pytest.raises(ValueError, match="without a mask"):
        RemoteMultiplier(UnmaskedSource(Q31), [_client(kit, [LocalWorker(honest)])[0]], kit)


class Conspiracy:
    """Two operators that pool what they are asked, and answer each other's requests."""

    def __init__(self, honest: Multiplier) -> None:
        self._honest = honest
        self._both_asked = threading.Barrier(2, timeout=60)
        self._operands: dict[int, Residues] = {}

    def member(self, index: int) -> Multiplying:
        conspiracy = self

        class Member:
            def outputs(self, product: Product) -> int:
                return conspiracy._honest.outputs(product)

            def multiply(self, product: Product, operand: Residues, parameters: ParameterSet) -> Residues:
                conspiracy._operands[index] = operand
                conspiracy._both_asked.wait()
                return conspiracy._honest.multiply(product, conspiracy._operands[1 - index], Q31)

        return Member()


def test_operators_that_swap_their_answers_are_both_caught(
    kit: Kit, honest: Multiplier, caplog: pytest.LogCaptureFixture
) -> None:
    conspiracy = Conspiracy(honest)
    liars = [LocalWorker(conspiracy.member(index)) for index in range(2)]
    multiplier = remote_multiplier(kit, [[liar, LocalWorker(honest)] for liar in liars])
    operand = _operand(FORWARD)
    assert np.array_equal(multiplier.multiply_integers(operand, FORWARD), _expected(honest, operand, FORWARD))
    statistics = multiplier.statistics()
    assert statistics["alpha"].lies == ("alpha-0:7100",)
    assert statistics["beta"].lies == ("beta-0:7100",)
    assert "worker alpha-0:7100 of operator alpha gave a wrong answer" in caplog.text
    assert "worker beta-0:7100 of operator beta gave a wrong answer" in caplog.text


def test_operators_that_swap_their_answers_end_the_run_without_replicas(kit: Kit, honest: Multiplier) -> None:
    conspiracy = Conspiracy(honest)
    multiplier = remote_multiplier(kit, [[LocalWorker(conspiracy.member(i))] for i in range(2)])
    with pytest.raises(UntrustworthyOperatorError, match="no worker is left .*gave a wrong answer"):
        multiplier.multiply_integers(_operand(FORWARD), FORWARD)


def _integers(multiplier: RemoteMultiplier, seed: int) -> NDArray[Any]:
    return multiplier.multiply_integers(_operand(FORWARD, seed=seed), FORWARD)


def _reals(multiplier: RemoteMultiplier, seed: int) -> NDArray[Any]:
    x = np.random.default_rng(seed).normal(size=(4, FORWARD.contraction)).astype(np.float32)
    return multiplier.multiply_reals(x, FORWARD, budget=1 << 30)


@EACH_OPERATOR
@pytest.mark.parametrize("ask", [_integers, _reals])
@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_caught_and_the_replica_answers_the_same_bytes(
    kit: Kit,
    honest: Multiplier,
    lie: str,
    ask: Callable[[RemoteMultiplier, int], NDArray[Any]],
    operator: int,
) -> None:
    rogue = Rogue(honest)
    rogue.plan(lie, at=2)
    liar, replica = LocalWorker(rogue), LocalWorker(honest)
    groups: list[list[Transport]] = [[LocalWorker(honest)], [LocalWorker(honest)]]
    groups[operator] = [liar, replica]
    multiplier = remote_multiplier(kit, groups)
    with_honest_workers = remote_multiplier(kit, [[LocalWorker(honest)], [LocalWorker(honest)]])
    for seed in range(3):
        assert np.array_equal(ask(multiplier, seed), ask(with_honest_workers, seed))
    assert rogue.told == 1
    name = ("alpha", "beta")[operator]
    assert multiplier.statistics()[name].lies == (f"{name}-0:7100",)
    # The liar got two requests, of which the second went to the replica unchanged.
    assert len(liar.requests) == 2
    assert replica.requests[0] is liar.requests[1]


@EACH_OPERATOR
def test_a_retry_sends_the_same_bytes_to_every_worker(kit: Kit, honest: Multiplier, operator: int) -> None:
    sent: list[tuple[bytes | None, bytes]] = []

    def note(request: WorkRequest) -> None:
        seed = request.share.seed
        sent.append((seed and seed.key, request.share.residues.tobytes()))

    groups: list[list[Transport]] = [[LocalWorker(honest)], [LocalWorker(honest)]]
    groups[operator] = [LocalWorker(honest, failures=[GONE] * n, before=note) for n in (2, 1)]
    multiplier = remote_multiplier(kit, groups)
    operand = _operand(FORWARD)
    assert np.array_equal(multiplier.multiply_integers(operand, FORWARD), _expected(honest, operand, FORWARD))
    assert len(sent) == 4
    assert len(set(sent)) == 1
    assert (sent[0][0] is None) == (operator == 1)


def test_no_two_requests_ever_send_the_same_bytes(kit: Kit, honest: Multiplier) -> None:
    workers = [LocalWorker(honest), LocalWorker(honest)]
    multiplier = remote_multiplier(kit, [[worker] for worker in workers])
    operand = _operand(FORWARD)
    for _ in range(3):
        multiplier.multiply_integers(operand, FORWARD)
    for worker in workers:
        sent = {request.share.residues.tobytes() for request in worker.requests}
        assert len(sent) == 3


def test_pauses_between_attempts_end_when_the_patience_does(kit: Kit, honest: Multiplier) -> None:
    worker = LocalWorker(honest, failures=[GONE] * 1000)
    client, clock = _client(kit, [worker], retry_seconds=30)
    before = clock.now
    with pytest.raises(OperatorUnavailableError) as caught:
        client.multiply(_request(kit), kit.check_vectors(FORWARD, Q31))
    assert 20 < clock.now - before <= 30
    assert 5 < len(worker.requests) < 30
    message = str(caught.value)
    assert "operator alpha" in message
    assert "10.0.0.0:7100: could not be reached: UNAVAILABLE: connection reset" in message


def test_a_worker_that_comes_back_is_used_again(kit: Kit, honest: Multiplier) -> None:
    worker = LocalWorker(honest, failures=[GONE] * 3)
    client, clock = _client(kit, [worker])
    before = clock.now
    client.multiply(_request(kit), kit.check_vectors(FORWARD, Q31))
    assert clock.now > before
    after = clock.now
    client.multiply(_request(kit), kit.check_vectors(FORWARD, Q31))
    assert clock.now == after


def test_a_hanging_worker_does_not_hide_its_replica(kit: Kit, honest: Multiplier) -> None:
    """The request's timeout is longer than the time for retries, as it is by default."""
    hanging = LocalWorker(honest, failures=[TransportError(Failure.UNREACHABLE, "DEADLINE_EXCEEDED")])
    client, clock = _client(kit, [hanging, LocalWorker(honest)], retry_seconds=60)
    hanging.before = lambda request: clock.sleep(300)
    client.multiply(_request(kit), kit.check_vectors(FORWARD, Q31))


def test_figures_count_retries_bytes_verified_answers_and_lies(kit: Kit, honest: Multiplier) -> None:
    rogue = Rogue(honest)
    rogue.plan("one residue is off by one")
    groups = [[LocalWorker(honest, failures=[GONE])], [LocalWorker(rogue), LocalWorker(honest)]]
    multiplier = remote_multiplier(kit, groups)
    multiplier.multiply_integers(_operand(FORWARD, rows=5), FORWARD)
    alpha, beta = multiplier.statistics().values()
    assert (alpha.requests, alpha.bytes_sent, alpha.bytes_received) == (2, 2 * 32, 5 * 64 * 4)
    assert (beta.requests, beta.bytes_sent, beta.bytes_received) == (2, 2 * 5 * 32 * 4, 2 * 5 * 64 * 4)
    assert (alpha.verified_responses, beta.verified_responses) == (1, 1)
    assert (alpha.lies, beta.lies) == ((), ("beta-0:7100",))
    multiplier.multiply_integers(_operand(FORWARD, rows=5), FORWARD)
    assert beta.requests == 2, "figures handed out earlier must not change"


def test_a_lie_is_logged_with_worker_operator_and_layers_but_no_numbers_of_the_operand(
    kit: Kit, honest: Multiplier, caplog: pytest.LogCaptureFixture
) -> None:
    rogue = Rogue(honest)
    rogue.plan("y + q")
    client, _ = _client(kit, [LocalWorker(rogue), LocalWorker(honest)])
    client.multiply(_request(kit), kit.check_vectors(FORWARD, Q31))
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    message = record.getMessage()
    for part in ("10.0.0.0:7100", "operator alpha", ATTENTION[0], "row 0 of 5", "not asked again"):
        assert part in message


def test_an_interrupted_request_does_not_count_against_the_worker(kit: Kit, honest: Multiplier) -> None:
    worker = LocalWorker(honest, failures=[KeyboardInterrupt()])  # type: ignore[list-item]
    client, _ = _client(kit, [worker, LocalWorker(honest)])
    with pytest.raises(KeyboardInterrupt):
        client.multiply(_request(kit), kit.check_vectors(FORWARD, Q31))
    client.multiply(_request(kit), kit.check_vectors(FORWARD, Q31))
    assert len(worker.requests) == 2


def test_no_request_is_left_under_way_when_another_one_fails(kit: Kit, honest: Multiplier) -> None:
    finished = threading.Event()

    def slowly(request: WorkRequest) -> None:
        time.sleep(0.2)
        finished.set()

    incompatible = TransportError(Failure.INCOMPATIBLE, "FAILED_PRECONDITION")
    groups = [[LocalWorker(honest, failures=[incompatible])], [LocalWorker(honest, before=slowly)]]
    with pytest.raises(OperatorUnavailableError):
        remote_multiplier(kit, groups).multiply_integers(_operand(FORWARD), FORWARD)
    assert finished.is_set()


def test_products_at_the_same_time_do_not_get_each_others_answers(kit: Kit, honest: Multiplier) -> None:
    multiplier = remote_multiplier(kit, [[LocalWorker(honest), LocalWorker(honest)] for _ in range(2)])
    jobs = [(_operand(p, rows, rows), p) for p in (FORWARD, BACKWARD) for rows in range(1, 9)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda job: multiplier.multiply_integers(*job), jobs))
    for (operand, product), result in zip(jobs, results, strict=True):
        assert np.array_equal(result, _expected(honest, operand, product))


def test_a_dead_worker_at_the_start_is_named_and_left_to_its_replica(
    kit: Kit, honest: Multiplier, caplog: pytest.LogCaptureFixture
) -> None:
    client, _ = _client(kit, [LocalWorker(honest), LocalWorker(honest, manifest_of(kit))])
    client.connect()
    assert "worker 10.0.0.0:7100 of operator alpha: UNAVAILABLE" in caplog.text


def test_an_operator_without_any_live_worker_is_one_error_that_names_them_all(
    kit: Kit, honest: Multiplier
) -> None:
    client, _ = _client(kit, [LocalWorker(honest), LocalWorker(honest)])
    with pytest.raises(OperatorUnavailableError, match=r"operator alpha.*10.0.0.0:7100.*10.0.0.1:7100"):
        client.connect()


def test_closing_closes_every_connection(kit: Kit, honest: Multiplier) -> None:
    workers = [LocalWorker(honest) for _ in range(4)]
    multiplier = remote_multiplier(kit, [workers[:2], workers[2:]])
    multiplier.multiply_integers(_operand(FORWARD), FORWARD)
    multiplier.close()
    assert all(worker.closed for worker in workers)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("protocol_versions", [], "speaks protocol version none, this client speaks 1: upgrade the worker"),
        ("protocol_versions", [2, 3], r"\[2, 3\].*upgrade this client"),
        ("scheme", "nf4-v1", "quantizes with nf4-v1, this client with int8"),
        ("parameter_sets", ["lattice-5"], "does not know parameter set q31: upgrade the worker"),
        ("fingerprint", "f" * 64, "serves another model.*ffffffffffffffff.*same checkpoint and revision"),
        ("fingerprint", "", "fingerprint none"),
    ],
)
def test_a_worker_that_serves_something_else_is_refused_with_what_to_change(
    kit: Kit, honest: Multiplier, field: str, value: object, message: str
) -> None:
    manifest = manifest_of(kit)
    manifest.ClearField(field)
    if isinstance(value, list):
        getattr(manifest, field).extend(value)
    else:
        setattr(manifest, field, value)
    client, _ = _client(kit, [LocalWorker(honest, manifest_of(kit)), LocalWorker(honest, manifest)])
    with pytest.raises(IncompatibleWorkerError, match=message) as caught:
        client.connect()
    assert "worker 10.0.0.1:7100 of operator alpha" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "tiny\nERROR worker 10.0.0.9:7100 of operator beta gave a wrong answer\x1b[2J" * 100),
        ("scheme", "int4\r\n\x1b[31m" * 100),
        ("fingerprint", "\n\x1b[2J" * 100),
        ("protocol_versions", list(range(2, 10_000))),
    ],
)
def test_what_a_worker_says_of_itself_can_not_forge_lines_of_the_log(
    kit: Kit, honest: Multiplier, field: str, value: object
) -> None:
    manifest = manifest_of(kit)
    if field == "model":
        manifest.fingerprint = "0" * 64
    manifest.ClearField(field)
    if isinstance(value, list):
        manifest.protocol_versions.extend(value)
    else:
        setattr(manifest, field, value)
    client, _ = _client(kit, [LocalWorker(honest, manifest)])
    with pytest.raises(IncompatibleWorkerError) as caught:
        client.connect()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_a_newer_worker_that_still_speaks_this_version_is_accepted(kit: Kit, honest: Multiplier) -> None:
    manifest = manifest_of(kit)
    manifest.protocol_versions.extend([2, 3])
    _client(kit, [LocalWorker(honest, manifest)])[0].connect()


def test_a_worker_that_lacks_a_layer_or_has_another_one_is_refused(kit: Kit, honest: Multiplier) -> None:
    for change in ("absent", "other"):
        manifest = manifest_of(kit)
        if change == "absent":
            name = manifest.layers.pop().name
        else:
            name, manifest.layers[-1].fingerprint = manifest.layers[-1].name, "0" * 64
        with pytest.raises(IncompatibleWorkerError, match=f"lacks 1 of the layers, the first being {name}"):
            _client(kit, [LocalWorker(honest, manifest)])[0].connect()


def test_a_response_of_another_size_counts_as_a_lie(kit: Kit, honest: Multiplier) -> None:
    wrong_size = LocalWorker(honest, failures=[VerificationError("the response has 3 bytes, not 4")])
    client, _ = _client(kit, [wrong_size, LocalWorker(honest)])
    client.multiply(_request(kit), kit.check_vectors(FORWARD, Q31))
    assert client.statistics.lies == ("10.0.0.0:7100",)


def test_closing_ends_retries_at_once(kit: Kit, honest: Multiplier) -> None:
    worker = LocalWorker(honest, failures=[GONE] * 1000)
    layers = {name: layer.fingerprint for name, layer in kit.layers.items()}
    expected = Expectations("tiny", kit.description.fingerprint, Q31.name, layers)
    client = OperatorClient(0, "alpha", [("10.0.0.0:7100", worker)], expected, 1e6, 60.0)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.multiply, _request(kit), kit.check_vectors(FORWARD, Q31))
        while not worker.requests:
            time.sleep(0.01)
        client.close()
        with pytest.raises(OperatorUnavailableError, match="alpha was closed"):
            asked.result(timeout=60)
    assert worker.closed
