"""An answer is taken only if all of it arrived: nothing is filled up with what was in memory."""

import numpy as np
import pytest

from blindtune.client.operators.messages import WorkRequest, read_rows
from blindtune.errors import VerificationError
from blindtune.proto.rows import RESPONSE_ROWS
from blindtune.protocol.masks import Share
from blindtune.protocol.products import forward_products

ROWS, OUTPUTS = 5, 3
(PRODUCT,) = forward_products(["layer"], 4)
REQUEST = WorkRequest("fingerprint", "q31", PRODUCT, Share(0, np.zeros((ROWS, 4), np.uint32)), OUTPUTS)


@pytest.mark.parametrize("rows", range(ROWS))
def test_an_answer_that_ends_early_is_refused(rows: int) -> None:
    right = np.arange(ROWS * OUTPUTS, dtype=np.uint32).reshape(ROWS, OUTPUTS)
    messages = [RESPONSE_ROWS.message(right[i : i + 1]) for i in range(ROWS)]
    answer = np.empty_like(right)
    assert list(read_rows(REQUEST, messages, answer)) == list(range(1, ROWS + 1))
    assert np.array_equal(answer, right)
    with pytest.raises(VerificationError, match=f"{rows * OUTPUTS * 4} bytes, not {ROWS * OUTPUTS * 4}"):
        list(read_rows(REQUEST, messages[:rows], answer))
