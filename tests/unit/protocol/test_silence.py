"""Errors of the protocol say where something is wrong, and never what stands there."""

import numpy as np
import pytest

from blindtune.errors import VerificationError
from blindtune.protocol.parameters import Q31
from blindtune.protocol.residues import from_centred, require_residues
from blindtune.protocol.verification import CheckVectors


def test_a_word_that_is_no_residue_is_not_shown() -> None:
    words = np.full((3, 4), 1_234_567_890, np.uint32)
    words[1, 2] = 4_123_456_789
    with pytest.raises(VerificationError) as caught:
        require_residues(words, Q31, "the operand")
    assert "4123456789" not in str(caught.value) and "1234567890" not in str(caught.value)


@pytest.mark.parametrize("integer", [1_987_654_321, -1_987_654_321])
def test_an_integer_beyond_the_range_is_not_shown(integer: int) -> None:
    with pytest.raises(ValueError, match="magnitude") as caught:
        from_centred(np.array([[5, integer, 123_456]], np.int32), Q31)
    assert "1987654321" not in str(caught.value) and "123456" not in str(caught.value)


@pytest.mark.parametrize("word", [1_111_111_111, Q31.modulus + 11])
def test_a_failed_check_shows_neither_operand_nor_answer(word: int) -> None:
    generator = np.random.default_rng(0)
    check = CheckVectors(*generator.integers(10**6, Q31.modulus, (2, 2, 3), np.uint32), Q31)
    operand = generator.integers(10**6, Q31.modulus, (5, 3), np.uint32)
    with pytest.raises(VerificationError, match="row") as caught:
        check.verify(operand, np.full((5, 3), word, np.uint32))
    for secret in (operand, check.s, check.v, np.array(word)):
        assert not any(str(number) in str(caught.value) for number in secret.ravel().tolist())
