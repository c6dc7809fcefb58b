"""Operands as they come in: every block is checked before anybody sees it."""

from collections.abc import Iterator

import numpy as np
import pytest

from blindtune.errors import VerificationError
from blindtune.proto.rows import REQUEST_ROWS
from blindtune.protocol.expansion import Seed
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import forward_products
from blindtune.protocol.residues import Residues
from blindtune.server import rows
from blindtune.server.rows import expanded_blocks, received_blocks
from blindtune.server.wire import Request

COLUMNS, SIZE = 4, 2
(PRODUCT,) = forward_products(["layer"], COLUMNS)


def _messages(operand: Residues, rows_each: int) -> Iterator[bytes]:
    for start in range(0, len(operand), rows_each):
        yield REQUEST_ROWS.message(operand[start : start + rows_each])


@pytest.mark.parametrize("rows_each", [1, 3, 7], ids=lambda n: f"{n} rows a message")
@pytest.mark.parametrize("bad", range(7), ids=lambda row: f"row {row}")
def test_a_word_that_is_no_residue_is_refused_in_every_block(bad: int, rows_each: int) -> None:
    operand = np.arange(7 * COLUMNS, dtype=np.uint32).reshape(7, COLUMNS)
    request = Request(PRODUCT, 7, COLUMNS, outputs=3, parameters=Q31, seed=None)
    seen = np.concatenate(list(received_blocks(_messages(operand, rows_each), request, SIZE)))
    assert np.array_equal(seen, operand)
    operand[bad, 1] = Q31.modulus
    blocks = received_blocks(_messages(operand, rows_each), request, SIZE)
    with pytest.raises(VerificationError, match="no residue"):
        for block in blocks:
            assert block.max() < Q31.modulus, "it was seen before it was checked"


def test_a_block_is_multiplied_before_rows_after_it_are_awaited() -> None:
    operand = np.arange(7 * COLUMNS, dtype=np.uint32).reshape(7, COLUMNS)
    request = Request(PRODUCT, 7, COLUMNS, outputs=3, parameters=Q31, seed=None)
    arrived = 0

    def messages() -> Iterator[bytes]:
        nonlocal arrived
        for message in _messages(operand, 1):
            arrived += 1
            yield message

    seen = 0
    for block in received_blocks(messages(), request, SIZE):
        seen += len(block)
        assert arrived == seen


def test_the_first_block_is_a_small_one_with_rows_and_with_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_FIRST_BLOCK_ROWS", 2)
    seed = Seed(bytes(32), Q31, row_offset=5)
    operand = seed.expand(9, COLUMNS)
    request = Request(PRODUCT, 9, COLUMNS, outputs=3, parameters=Q31, seed=None)
    for blocks in (
        list(received_blocks(_messages(operand, 3), request, 4)),
        [block.residues() for block in expanded_blocks(iter(()), request, seed, 4)],
    ):
        assert [len(block) for block in blocks] == [2, 4, 3]
        assert np.array_equal(np.concatenate(blocks), operand)
