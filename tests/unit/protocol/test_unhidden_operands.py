"""An integer beyond the centred residues is not hidden by any mask, so no source masks it."""

from collections.abc import Callable

import numpy as np
import pytest

from blindtune.protocol.expansion import KEY_BYTES, RandomBytes
from blindtune.protocol.lattice.parameters import DEGREE, LatticeParameters
from blindtune.protocol.lattice.source import LatticeSource
from blindtune.protocol.masks import MaskSource
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import forward_products
from blindtune.protocol.shares.source import ShareSource

HALF = (Q31.modulus - 1) // 2
TOY = LatticeParameters(name="toy", rank=1, eta=1, security="none")
HINT = np.zeros((1, 1, DEGREE, 16), np.int32)
(PRODUCT,) = forward_products(["layer"], 4)
SOURCES: dict[str, Callable[[RandomBytes], MaskSource]] = {
    "shares": lambda randomness: ShareSource(2, Q31, randomness),
    "lattice": lambda randomness: LatticeSource(TOY, bytes(KEY_BYTES), lambda _: HINT, randomness),
}


@pytest.mark.parametrize("integer", [HALF + 1, -HALF - 1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("masking", SOURCES)
def test_an_integer_that_no_mask_hides_is_refused(masking: str, integer: int) -> None:
    source = SOURCES[masking](lambda size: bytes(range(size)))
    operand = np.array([[0, HALF, -HALF, 1], [0, 0, 0, 0]], np.int32)
    assert (source.hide_integers(operand, PRODUCT).shares[-1].residues < Q31.modulus).all()
    operand[1, 2] = integer
    with pytest.raises(ValueError, match="no centred residue"):
        source.hide_integers(operand, PRODUCT)
