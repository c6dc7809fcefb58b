"""What is in the bytes of a request: what the contract says, and nothing of the operand."""

import numpy as np
import pytest
from support.transports import LocalWorker, remote_multiplier

from blindtune.client.kit.kit import Kit
from blindtune.client.model.layer_group import LayerGroup
from blindtune.client.operators.messages import request_messages
from blindtune.proto import PROTOCOL_VERSION, worker_pb2
from blindtune.protocol.fixed_point import quantize_rows
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Direction
from blindtune.protocol.residues import from_centred

ATTENTION = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
BUDGET = 10**8
X = np.random.default_rng(0).normal(size=(9, 32)).astype(np.float32)


@pytest.mark.parametrize("reals", [True, False], ids=["as training does", "integers"])
def test_no_operand_is_sent_as_it_is_in_either_direction(kit: Kit, honest: Multiplier, reals: bool) -> None:
    workers = [LocalWorker(honest), LocalWorker(honest)]
    multiplier = remote_multiplier(kit, [[worker] for worker in workers])
    products = LayerGroup(ATTENTION, kit, multiplier).products
    assert {x.direction for x in products} == set(Direction)
    for product in products:
        x = np.random.default_rng(1).normal(size=(9, product.contraction)).astype(np.float32)
        x[4] = 0
        operand, _ = quantize_rows(x, BUDGET, diffused=product.diffused)
        if reals:
            multiplier.multiply_reals(x, product, BUDGET)
        else:
            multiplier.multiply_integers(operand, product)
        for worker in workers:
            assert worker.requests[-1].product == product
            # A word of a mask is zero once in 2^31.
            assert not (worker.requests[-1].share.residues == from_centred(operand, Q31)).any()


def test_a_request_says_what_the_contract_says_and_no_more(kit: Kit, honest: Multiplier) -> None:
    workers = [LocalWorker(honest), LocalWorker(honest)]
    group = LayerGroup(ATTENTION, kit, remote_multiplier(kit, [[worker] for worker in workers]))
    sent: list[list[bytes]] = []
    for worker in workers:
        worker.before = lambda request: sent.append(list(request_messages(request)))
    outputs = group.forward(X)
    group.backward(outputs)
    assert len(sent) == 4
    seeds = 0
    for first, *others in sent:
        header = worker_pb2.MultiplyRequest.FromString(first).header
        forward = header.product.direction == worker_pb2.FORWARD
        features = {name: 32 if forward else kit.layers[name].out_features for name in ATTENTION}
        expected = worker_pb2.MultiplyHeader(
            protocol_version=PROTOCOL_VERSION,
            fingerprint=kit.description.fingerprint,
            parameter_set="q31",
            product=worker_pb2.Product(
                direction=worker_pb2.FORWARD if forward else worker_pb2.BACKWARD,
                spans=[worker_pb2.Span(layer=name, start=0, stop=stop) for name, stop in features.items()],
            ),
            rows=9,
            columns=32 if forward else sum(features.values()),
        )
        if header.HasField("seed"):
            seeds += 1
            expected.seed.key = header.seed.key
            assert len(header.seed.key) == 32 and header.seed.row_offset == 0
            assert not others
        else:
            rows = b"".join(worker_pb2.MultiplyRequest.FromString(x).residues for x in others)
            requests = [request.share.residues.tobytes() for request in workers[1].requests]
            assert rows in requests
            assert sum(map(len, others)) < len(rows) + 16 * len(others)
        # Equal as bytes, so that no field that the contract does not know goes along.
        assert first == worker_pb2.MultiplyRequest(header=expected).SerializeToString()
    assert seeds == 2
