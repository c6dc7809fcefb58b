"""Named parameter sets of the lattice masks.

    R = A S + E   over  Z_q[X] / (X^256 + 1),     A of rank k public and uniform,
                                                  S and E secret, coefficients from B(eta)

Module-LWE (Langlois, Stehlé 2015): R is indistinguishable from uniform. B(eta) is the centred binomial
distribution, the difference of two sums of eta bits. Removing a mask with R M ~ H S leaves E M, whose
magnitude is at most

    eta * max_j sum_i |M[i, j]|

for every outcome of E, not just with high probability.

The estimates are for one block's secret and unlimited samples under one A. All blocks of all runs under
one public seed share A, and their number enters the security argument as a factor. The estimates are
those of the public lattice estimator (primal attacks bdd and usvp) and the core-SVP model. With `q31`,
rank 4 (2^118 gates) and eta = 2 (core-SVP 2^106) are too little. Against the narrower modulus of `q24`, less
noise hides as much: rank 5 with eta = 2, or rank 4 with eta = 8.
"""

from dataclasses import dataclass

from blindtune.protocol.parameters import Q24, Q31, ParameterSet

__all__ = [
    "DEGREE",
    "LATTICE_PARAMETER_SETS",
    "MAX_RANK",
    "MLWE1024_Q24",
    "MLWE1280",
    "MLWE1280_Q24",
    "MLWE1536",
    "LatticeParameters",
]

DEGREE = 256
"""n, the degree of the ring and the number of rows in a block; the transform is compiled for it."""

MAX_RANK = 7
"""A sum of 7 products of centred residues is below 7 * 2^60 < 2^63."""


@dataclass(frozen=True)
class LatticeParameters:
    """One named choice of the lattice.

    Attributes:
        name: what a kit calls it.
        rank: k, ring elements in one row of A.
        eta: parameter of the centred binomial distribution of S and E, also their largest magnitude.
        security: the estimate in words.
        residues: the modulus; all that a worker needs to know.
    """

    name: str
    rank: int
    eta: int
    security: str
    residues: ParameterSet = Q31

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MAX_RANK:
            raise ValueError(f"the rank must be 1 ... {MAX_RANK}, not {self.rank}")
        if not 1 <= self.eta <= 32:
            raise ValueError(f"eta must be 1 ... 32, for which noise can be drawn, not {self.eta}")

    @property
    def dimension(self) -> int:
        """n k, the coefficients of one row of A, and the rows of A and of a hint when unpacked."""
        return DEGREE * self.rank

    def noise(self, column_absolute_sum: int) -> int:
        """Largest magnitude of an element of E M.

        Args:
            column_absolute_sum: max_j sum_i |M[i, j]|.
        """
        return self.eta * column_absolute_sum


MLWE1280 = LatticeParameters(
    name="mlwe1280",
    rank=5,
    eta=21,
    security=(
        "Module-LWE of dimension 1280: 2^148 classical gates, core-SVP 2^124 classical and 2^112 quantum; "
        "about NIST category 1"
    ),
)

MLWE1536 = LatticeParameters(
    name="mlwe1536",
    rank=6,
    eta=21,
    security="Module-LWE of dimension 1536: core-SVP 2^157 classical and 2^143 quantum",
)

MLWE1280_Q24 = LatticeParameters(
    name="mlwe1280-q24",
    rank=5,
    eta=2,
    security=(
        "Module-LWE of dimension 1280: 2^171 classical gates, core-SVP 2^148 classical and 2^135 quantum; "
        "about NIST category 2"
    ),
    residues=Q24,
)

MLWE1024_Q24 = LatticeParameters(
    name="mlwe1024-q24",
    rank=4,
    eta=8,
    security=(
        "Module-LWE of dimension 1024: 2^148 classical gates, core-SVP 2^124 classical and 2^112 quantum; "
        "about NIST category 1"
    ),
    residues=Q24,
)

LATTICE_PARAMETER_SETS = {x.name: x for x in (MLWE1280, MLWE1536, MLWE1280_Q24, MLWE1024_Q24)}
"""Every lattice parameter set by name; the first is the standard one."""
