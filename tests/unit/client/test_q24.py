"""Products of a client under parameter set q24: three bytes a number, two vectors, lattices of its own."""

import numpy as np
import pytest
from support.transports import LocalWorker, manifest_of, remote_multiplier

from blindtune.checkpoint import Checkpoint
from blindtune.client.config.blind_config import BlindConfig
from blindtune.client.kit.kit import Kit
from blindtune.client.operators.messages import read_rows, request_messages
from blindtune.client.rounds.multiplier import PrivateMultiplier, ReferenceMultiplier, RemoteMultiplier
from blindtune.errors import ConfigurationError, UntrustworthyOperatorError
from blindtune.proto.rows import RESPONSE_ROWS
from blindtune.protocol.lattice.hint import hint_request, pack_rows, packed_shape
from blindtune.protocol.lattice.parameters import (
    DEGREE,
    MLWE1024_Q24,
    MLWE1280_Q24,
    LatticeParameters,
)
from blindtune.protocol.lattice.source import LatticeSource
from blindtune.protocol.masks import MaskSource
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import PARAMETER_SETS, Q24, ParameterSet
from blindtune.protocol.products import Product, backward_products, forward_products
from blindtune.protocol.residues import Residues
from blindtune.protocol.shares.source import ShareSource
from blindtune.protocol.wire_words import to_words

ATTENTION = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
(FORWARD,) = forward_products(ATTENTION, 32)
(BACKWARD,) = backward_products(zip(ATTENTION, (32, 16, 16), strict=True))


def remote(kit: Kit, workers: list[LocalWorker], source: MaskSource) -> RemoteMultiplier:
    return remote_multiplier(kit, [[worker] for worker in workers], retry_seconds=0.0, source=source)


def result(multiplier: PrivateMultiplier, product: Product) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).standard_normal((40, product.contraction)).astype(np.float32)
    x[::7] = 0
    return x, multiplier.multiply_certified(x, product, None, None, True)


@pytest.mark.parametrize("product", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_shares_of_three_bytes_equal_the_reference_bit_for_bit(
    kit: Kit, honest: Multiplier, checkpoint: Checkpoint, product: Product
) -> None:
    workers = [LocalWorker(honest, manifest_of(kit)) for _ in range(3)]
    _, found = result(remote(kit, workers, ShareSource(3, Q24)), product)
    _, expected = result(ReferenceMultiplier(checkpoint, Q24, kit), product)
    assert found.tobytes() == expected.tobytes() and found.any()
    for worker in workers:
        assert {request.parameter_set for request in worker.requests} == {"q24"}
    request = workers[-1].requests[0]
    assert request.payload_bytes == 3 * 40 * product.contraction
    # What travels is that long, besides a few bytes for each message.
    sent = sum(map(len, request_messages(request)))
    assert request.payload_bytes <= sent < request.payload_bytes + 700
    answer = honest.multiply(product, request.share.residues, Q24)
    received = np.zeros_like(answer)
    assert list(read_rows(request, [RESPONSE_ROWS.message(to_words(answer, Q24))], received)) == [40]
    assert np.array_equal(received, answer)


@pytest.mark.parametrize("lattice", [MLWE1280_Q24, MLWE1024_Q24], ids=lambda x: x.name)
def test_lattices_of_three_bytes_are_as_precise_as_their_noise_lets_them_be(
    kit: Kit, honest: Multiplier, checkpoint: Checkpoint, lattice: LatticeParameters
) -> None:
    def hint(product: Product) -> np.ndarray:
        packed = np.empty(packed_shape(lattice, kit.outputs(product)), np.int32)
        for first in range(0, lattice.dimension, DEGREE):
            share = hint_request(Q24, bytes(32), product, first, DEGREE)
            answer = honest.multiply(product, share.residues, Q24)
            kit.check_vectors(product, Q24).verify(share.residues, answer, Q24.hint_vectors)
            pack_rows(answer, packed, first, Q24)
        return packed

    workers = [LocalWorker(honest, manifest_of(kit))]
    x, found = result(remote(kit, workers, LatticeSource(lattice, bytes(32), hint)), FORWARD)
    unit = np.eye(FORWARD.contraction, dtype=np.uint32)
    matrix = honest.multiply(FORWARD, unit, Q24).astype(np.int64)
    matrix[matrix > Q24.half] -= Q24.modulus
    exact = x.astype(np.float64) @ matrix
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    # Without the hint, or with another's noise, it is 1 or more.
    assert 2**-16 < error < 2**-7


class Lying:
    def __init__(self, honest: Multiplier) -> None:
        self._honest, self.outputs = honest, honest.outputs

    def multiply(self, product: Product, operand: Residues, parameters: ParameterSet) -> Residues:
        answer = self._honest.multiply(product, operand, parameters)
        answer[-1, -1] = (int(answer[-1, -1]) + 1) % parameters.modulus
        return answer


def test_one_wrong_residue_is_caught_and_its_operator_named(kit: Kit, honest: Multiplier) -> None:
    workers = [LocalWorker(Lying(honest), manifest_of(kit)), LocalWorker(honest, manifest_of(kit))]
    with pytest.raises(UntrustworthyOperatorError, match="alpha"):
        result(remote(kit, workers, ShareSource(2, Q24)), FORWARD)


def test_everyday_answers_are_checked_with_two_vectors_and_hints_with_three(
    kit: Kit, honest: Multiplier
) -> None:
    check = kit.check_vectors(FORWARD, Q24)
    assert check.s.shape == (3, 64) and check.everyday.shape == (2, 32)
    operand = np.random.default_rng(1).integers(0, Q24.modulus, (5, 32), dtype=np.uint32)
    answer = honest.multiply(FORWARD, operand, Q24)
    check.verify(operand, answer, 3)
    expected = check.everyday.astype(object) @ operand.T.astype(object) % Q24.modulus
    check.verify_expected(expected.astype(np.uint32), answer)
    with pytest.raises(ValueError, match="checked with 2 vectors, not 1"):
        check.verify_expected(expected[:1].astype(np.uint32), answer)
    # The vectors of the two sets have nothing to do with each other.
    assert not np.isin(check.s, kit.check_vectors(FORWARD, PARAMETER_SETS["q31"]).s).any()


@pytest.mark.parametrize(
    ("masking", "name"),
    [("shares", "mlwe1280"), ("shares", "mlwe1280-q24"), ("lattice", "q24"), ("reference", "mlwe1024-q24")],
)
def test_a_parameter_set_of_another_masking_is_refused(masking: str, name: str) -> None:
    with pytest.raises(
        ConfigurationError, match=f"parameter_set of masking '{masking}' is one of .* not '{name}'"
    ):
        BlindConfig(masking=masking, parameter_set=name)  # type: ignore[arg-type]


@pytest.mark.parametrize("columns", [33, 450])
def test_what_a_lattice_expects_of_answers_is_right_for_both_vectors(columns: int) -> None:
    (product,) = forward_products(["layer"], columns)
    hint = np.zeros(packed_shape(MLWE1280_Q24, 16), np.int32)
    source = LatticeSource(MLWE1280_Q24, bytes(32), lambda _: hint)
    generator = np.random.default_rng(columns)
    v = generator.integers(0, Q24.modulus, (2, columns), dtype=np.uint32)
    for rows in (256, 600):  # whole blocks, and rows left over
        x = generator.standard_normal((rows, columns)).astype(np.float32)
        (share,) = source.hide_reals(x, product, 1 << 36, None, v)[0].shares
        assert share.expected is not None and int(share.residues.max()) < Q24.modulus
        exact = v.astype(object) @ share.residues.T.astype(object) % Q24.modulus
        assert np.array_equal(share.expected, exact)
