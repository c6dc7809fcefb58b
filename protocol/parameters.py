"""Named parameter sets.

The modulus q = 2147389441 = 0x7ffe9001 is a 31-bit prime with q = 1 mod 4096, so that transforms up to
length 2048 exist; 4.4e-5 of all 31-bit words are rejected when residues are drawn uniformly; and a
random linear check misses a wrong row with probability 1/q. It is prime on purpose: modulo 2^32 an
error of 2^31 passes such a check half of the time.
"""

from dataclasses import dataclass

__all__ = ["MODULUS", "PARAMETER_SETS", "Q31", "ParameterSet"]

MODULUS = 2147389441
"""The modulus that the kernels are compiled for."""


@dataclass(frozen=True)
class ParameterSet:
    """One named choice of everything that both sides must agree on.

    Attributes:
        name: what a manifest and a request call it. modulus: the prime q; residues are the integers 0 ... q
        - 1. limbs: balanced base-256 digits of a centred residue. security: what confidentiality rests on in
        `shares`, in words; `lattice.parameters` has its own. certified: whether wraps are detected and taken
        back (`protocol.certificate`), or excluded by the bound
            of `fixed_point`.
    """

    name: str
    modulus: int
    limbs: int
    security: str
    certified: bool = False

    def __post_init__(self) -> None:
        if self.modulus != MODULUS:
            raise ValueError(f"kernels are compiled for modulus {MODULUS}, not {self.modulus}")
        if self.modulus // 2 >= 128 * 256 ** (self.limbs - 1) - 256 ** (self.limbs - 1):
            raise ValueError(f"{self.limbs} limbs cannot hold a centred residue mod {self.modulus}")

    @property
    def half(self) -> int:
        """(q - 1) / 2, the largest centred residue."""
        return (self.modulus - 1) // 2


Q31 = ParameterSet(
    name="q31",
    modulus=MODULUS,
    limbs=4,
    security="ChaCha20, HKDF-SHA256, and one operator that does not collude with the others",
)

PARAMETER_SETS = {Q31.name: Q31}
"""Every parameter set by name."""
