"""Operands as they come in: every block is checked before anybody sees it."""

from collections.abc import Iterator

import numpy as np
import pytest

from blindtune.proto import worker_pb2
from blindtune.protocol.errors import VerificationError
from blindtune.protocol.parameters import MODULUS
from blindtune.protocol.products import forward_products
from blindtune.protocol.residues import Residues
from blindtune.server.rows import received_blocks
from blindtune.server.wire import Request

COLUMNS, SIZE = 4, 2
(PRODUCT,) = forward_products(["layer"], COLUMNS)


def _messages(operand: Residues, rows_each: int) -> Iterator[worker_pb2.MultiplyRequest]:
    for start in range(0, len(operand), rows_each):
        yield worker_pb2.MultiplyRequest(residues=operand[start : start + rows_each].tobytes())


@pytest.mark.parametrize("rows_each", [1, 3, 7], ids=lambda n: f"{n} rows a message")
@pytest.mark.parametrize("bad", range(7), ids=lambda row: f"row {row}")
def test_a_word_that_is_no_residue_is_refused_in_every_block(bad: int, rows_each: int) -> None:
    operand = np.arange(7 * COLUMNS, dtype=np.uint32).reshape(7, COLUMNS)
    request = Request(PRODUCT, 7, COLUMNS, outputs=3, seed=None)
    seen = np.concatenate(list(received_blocks(_messages(operand, rows_each), request, SIZE)))
    assert np.array_equal(seen, operand)
    operand[bad, 1] = MODULUS
    blocks = received_blocks(_messages(operand, rows_each), request, SIZE)
    with pytest.raises(VerificationError, match="no residue"):
        for block in blocks:
            assert block.max() < MODULUS, "it was seen before it was checked"
