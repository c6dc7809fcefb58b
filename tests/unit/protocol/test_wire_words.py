"""Residues as they travel: the bytes of the definition, and back."""

import numpy as np
import pytest

from blindtune.protocol.parameters import PARAMETER_SETS, Q24, ParameterSet
from blindtune.protocol.wire_words import to_residues, to_words

EACH_SET = pytest.mark.parametrize("parameters", PARAMETER_SETS.values(), ids=PARAMETER_SETS)


@EACH_SET
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 5), (1, 15), (1, 16), (1, 17), (1, 21), (1, 22), (7, 33), (40, 341)]
)
def test_words_are_little_endian_without_gaps_and_come_back(
    shape: tuple[int, int], parameters: ParameterSet
) -> None:
    rows = np.random.default_rng(shape[1]).integers(0, parameters.modulus, shape, dtype=np.uint32)
    rows.flat[0], rows.flat[-1] = parameters.modulus - 1, parameters.half
    words, size = to_words(rows, parameters).tobytes(), parameters.word_bytes
    assert words == b"".join(int(x).to_bytes(size, "little") for x in rows.ravel())
    # As a message holds them: at any address, with nothing behind the last one.
    found = np.full_like(rows, 7)
    to_residues(memoryview(b"tag" + words)[3:], found, parameters)
    assert np.array_equal(found, rows)


def test_a_word_that_is_no_residue_arrives_as_it_was_sent() -> None:
    found = np.zeros((1, 40), np.uint32)
    to_residues(memoryview(b"\xff" * 120), found, Q24)
    assert (found == 0xFFFFFF).all() and Q24.modulus < 0xFFFFFF


@EACH_SET
@pytest.mark.parametrize("size", [0, 1, 119, 121, 160, 161])
def test_bytes_that_do_not_fill_the_rows_are_refused(size: int, parameters: ParameterSet) -> None:
    if size != 40 * parameters.word_bytes:
        with pytest.raises(ValueError, match="bytes do not fill"):
            to_residues(memoryview(bytes(size)), np.zeros((4, 10), np.uint32), parameters)


def test_products_of_other_orders_in_memory_travel_row_by_row() -> None:
    rows = np.arange(70, dtype=np.uint32).reshape(7, 10)
    assert np.array_equal(to_words(rows.T, Q24), to_words(np.ascontiguousarray(rows.T), Q24))
