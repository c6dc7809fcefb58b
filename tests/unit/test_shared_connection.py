"""Requests that share a connection take turns, in both directions."""

from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import torch

from blindtune.client.config.blind_config import Operator
from blindtune.client.operators.messages import WorkRequest
from blindtune.client.operators.transport import GrpcTransport
from blindtune.proto.turns import Turns
from blindtune.protocol.masks import Share
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Direction, Product, Span
from blindtune.protocol.weights import IntegerLayer
from blindtune.server.admission.turns import TurnsOfConnections
from blindtune.server.daemon import serve
from blindtune.server.store import LayerStore
from blindtune.server.transport import Endpoint

ROWS, INPUTS, OUTPUTS = 700, 600, 500


@pytest.fixture
def lefts(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[tuple[int, int]]]:
    """For each order of messages, what each use of it had left and then sent."""
    found: dict[int, list[tuple[int, int]]] = {}
    original = Turns.in_turn

    def in_turn(self: Turns, messages: Iterable[bytes], left: int) -> Iterator[bytes]:
        sent = 0
        for message in original(self, messages, left):
            sent += len(message)
            yield message
        found.setdefault(id(self), []).append((left, sent))

    monkeypatch.setattr(Turns, "in_turn", in_turn)
    return found


def test_requests_and_answers_go_in_turn(lefts: dict[int, list[tuple[int, int]]]) -> None:
    layer = IntegerLayer(torch.ones((OUTPUTS, INPUTS), dtype=torch.int8), np.ones(OUTPUTS, np.float32))
    store = LayerStore.from_layers(iter([("layer", layer)]), model="none")
    running = serve(store, Endpoint("127.0.0.1", 0, None))
    transport = GrpcTransport(Operator("alpha", [running.address]), running.address, insecure=True)
    operand = np.random.default_rng(0).integers(0, Q31.modulus, (ROWS, INPUTS), dtype=np.uint32)
    product = Product(Direction.FORWARD, (Span("layer", 0, INPUTS),))
    request = WorkRequest(store.fingerprint, Q31.name, product, Share(0, operand), OUTPUTS)
    try:
        assert list(transport.multiply(request, 60, np.empty((ROWS, OUTPUTS), np.uint32)))[-1] == ROWS
    finally:
        transport.close()
        running.stop()
    up, down = 4 * ROWS * INPUTS, 4 * ROWS * OUTPUTS
    sent, answered = sorted(lefts.values(), key=len)
    assert len(sent) == 1 and sent[0][0] == up and sent[0][1] > up
    # The worker answers in blocks, each with what is left of the whole answer.
    assert len(answered) > 1 and answered[0][0] == down
    first, second = answered[:2]
    assert first[0] - second[0] == pytest.approx(first[1], abs=100)
    assert sum(x for _, x in answered) == pytest.approx(down, abs=1000)


def test_answers_share_an_order_as_long_as_they_share_a_connection() -> None:
    turns = TurnsOfConnections()
    first = turns.of("ipv4:10.0.0.1:1")
    assert turns.of("ipv4:10.0.0.1:1") is first
    assert turns.of("ipv4:10.0.0.1:2") is not first
    del first
    assert not turns._turns, "a connection without requests leaves nothing behind"
