"""Named parameter sets.

`q31`: q = 2147389441 = 0x7ffe9001 is a 31-bit prime with q = 1 mod 4096, so that transforms up to
length 2048 exist; 4.4e-5 of all 31-bit words are rejected when residues are drawn uniformly; and a
random linear check misses a wrong row with probability 1/q. It is prime on purpose: modulo 2^32 an
error of 2^31 passes such a check half of the time.

`q24`: q = 16760833 = 2^24 - 2^14 + 1 is a 24-bit prime with q = 1 mod 2^14. Its residues take three bytes
each and three limbs; 9.8e-4 of all 24-bit words are rejected; and two random linear checks miss a wrong row
with probability 2^-48. So narrow a modulus leaves no room for proofs that nothing wraps around: see
`certificate`.
"""

from dataclasses import dataclass

import numpy as np

__all__ = ["PARAMETER_SETS", "Q24", "Q31", "ParameterSet"]


@dataclass(frozen=True)
class ParameterSet:
    """One named choice of everything that both sides must agree on.

    Attributes:
        name: what a manifest and a request call it. It is part of every derived key.
        modulus: the prime q; residues are the integers 0 ... q - 1.
        limbs: balanced base-256 digits that a residue is split into, see `lift`.
        word_bytes: bytes of a residue on the wire and in a key stream.
        lift: the largest of the representatives that are split into limbs: those are
            lift - q + 1 ... lift.
        vectors: verification vectors that everyday answers are checked with.
        hint_vectors: those that hints are checked with, and as many as there are.
        certified: whether wraps around the modulus are detected and taken back; if not, it is proven that
            none occur.
        security: what confidentiality rests on in `shares`, in words; `lattice.parameters` has its own.
    """

    name: str
    modulus: int
    limbs: int
    word_bytes: int
    lift: int
    vectors: int
    hint_vectors: int
    certified: bool
    security: str

    def __post_init__(self) -> None:
        ones = (256**self.limbs - 1) // 255
        if not -128 * ones <= self.lift - self.modulus + 1 <= 0 <= self.lift <= 127 * ones:
            raise ValueError(
                f"{self.limbs} limbs cannot hold representatives mod {self.modulus} up to {self.lift}"
            )
        if not 1 <= self.vectors <= self.hint_vectors:
            raise ValueError(f"hints are checked with {self.vectors} vectors or more")

    @property
    def half(self) -> int:
        """(q - 1) / 2, the largest centred residue."""
        return (self.modulus - 1) // 2

    @property
    def bits(self) -> np.uint32:
        """The bits of a key stream's word that are kept, as many as the modulus has."""
        return np.uint32((1 << self.modulus.bit_length()) - 1)

    @property
    def q(self) -> np.uint32:
        """The modulus as kernels take it."""
        return np.uint32(self.modulus)


Q31 = ParameterSet(
    name="q31",
    modulus=2147389441,
    limbs=4,
    word_bytes=4,
    lift=1073694720,
    vectors=1,
    hint_vectors=2,
    certified=False,
    security="ChaCha20, HKDF-SHA256, and one operator that does not collude with the others",
)

Q24 = ParameterSet(
    name="q24",
    modulus=16760833,
    limbs=3,
    word_bytes=3,
    lift=8355711,
    vectors=2,
    hint_vectors=3,
    certified=True,
    security="ChaCha20, HKDF-SHA256, and one operator that does not collude with the others",
)

PARAMETER_SETS = {x.name: x for x in (Q31, Q24)}
"""Every parameter set by name."""
