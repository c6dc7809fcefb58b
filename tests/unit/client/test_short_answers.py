"""An answer is taken only if all of it arrived: nothing is filled up with what was in memory."""

import numpy as np
import pytest

from blindtune.client.operators.messages import WorkRequest, read_answer
from blindtune.proto import worker_pb2
from blindtune.protocol.errors import VerificationError
from blindtune.protocol.masks import Share
from blindtune.protocol.products import forward_products

ROWS, OUTPUTS = 5, 3
(PRODUCT,) = forward_products(["layer"], 4)
REQUEST = WorkRequest("fingerprint", "q31", PRODUCT, Share(0, np.zeros((ROWS, 4), np.uint32)), OUTPUTS)


@pytest.mark.parametrize("rows", range(ROWS))
def test_an_answer_that_ends_early_is_refused(rows: int) -> None:
    answer = np.arange(ROWS * OUTPUTS, dtype=np.uint32).reshape(ROWS, OUTPUTS)
    messages = [worker_pb2.MultiplyResponse(residues=row.tobytes()) for row in answer]
    assert np.array_equal(read_answer(REQUEST, messages), answer)
    with pytest.raises(VerificationError, match=f"{rows * OUTPUTS * 4} bytes, not {ROWS * OUTPUTS * 4}"):
        read_answer(REQUEST, messages[:rows])
