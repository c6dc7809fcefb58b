"""Which parameter set a masking uses: the one that is named, or the one of a precision.

Public facts decide, before anything is computed: the masking, and what the user chose. No run changes it.
"""

from typing import Literal, get_args

from blindtune.errors import ConfigurationError
from blindtune.protocol.lattice.parameters import (
    LATTICE_PARAMETER_SETS,
    MLWE1280,
    MLWE1280_Q24,
    LatticeParameters,
)
from blindtune.protocol.parameters import PARAMETER_SETS, Q24, Q31, ParameterSet

__all__ = ["NAMES", "Precision", "lattice_set", "residue_set", "set_name"]

Precision = Literal["standard", "full"]
"""Of products: three bytes a number and certified results, or four bytes and a bound that is proven."""

NAMES = (*PARAMETER_SETS, *LATTICE_PARAMETER_SETS)
"""All that can be named."""

_OF_SHARES = {"standard": Q24.name, "full": Q31.name}
_OF_LATTICE = {"standard": MLWE1280_Q24.name, "full": MLWE1280.name}


def set_name(
    masking: str, name: str | None, precision: str = "standard", option: str = "parameter_set"
) -> str:
    """The name of the parameter set.

    Args:
        masking: ``shares``, ``lattice`` or ``reference``.
        name: what the user chose; None for the precision's own.
        precision: a `Precision`.
        option: where the name was chosen, for the error.

    Raises:
        ConfigurationError: the masking has no such parameter set, or the precision is another one's.
    """
    sets = list(LATTICE_PARAMETER_SETS if masking == "lattice" else PARAMETER_SETS)
    if precision not in get_args(Precision):
        raise ConfigurationError(f"precision is one of {', '.join(get_args(Precision))}, not {precision!r}")
    if name is None:
        return (_OF_LATTICE if masking == "lattice" else _OF_SHARES)[precision]
    if name not in sets:
        raise ConfigurationError(f"{option} of masking {masking!r} is one of {', '.join(sets)}, not {name!r}")
    if precision == "full" and residue_set(masking, name).certified:
        proven = ", ".join(x for x in sets if not residue_set(masking, x).certified)
        raise ConfigurationError(
            f"precision full goes with {option} {proven}, not {name}: leave out one of the two"
        )
    return name


def lattice_set(name: str | None) -> LatticeParameters:
    """The lattice of masking ``lattice``."""
    return LATTICE_PARAMETER_SETS[set_name("lattice", name)]


def residue_set(masking: str, name: str | None) -> ParameterSet:
    """The modulus and what goes with it, of any masking."""
    name = set_name(masking, name)
    return LATTICE_PARAMETER_SETS[name].residues if masking == "lattice" else PARAMETER_SETS[name]
