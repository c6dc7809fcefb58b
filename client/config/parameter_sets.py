"""Which parameter set a masking uses: the one that is named, or the masking's own."""

from blindtune.errors import ConfigurationError
from blindtune.protocol.lattice.parameters import LATTICE_PARAMETER_SETS, MLWE1280, LatticeParameters
from blindtune.protocol.parameters import PARAMETER_SETS, Q31, ParameterSet

__all__ = ["NAMES", "lattice_set", "residue_set", "set_name"]

NAMES = (*PARAMETER_SETS, *LATTICE_PARAMETER_SETS)
"""All that can be named."""


def set_name(masking: str, name: str | None, option: str = "parameter_set") -> str:
    """The name of the parameter set.

    Args:
        masking: ``shares``, ``lattice`` or ``reference``.
        name: what the user chose; None for the masking's own.
        option: where it was chosen, for the error.

    Raises:
        ConfigurationError: the masking has no such parameter set.
    """
    sets = list(LATTICE_PARAMETER_SETS if masking == "lattice" else PARAMETER_SETS)
    if name is None:
        return MLWE1280.name if masking == "lattice" else Q31.name
    if name not in sets:
        raise ConfigurationError(f"{option} of masking {masking!r} is one of {', '.join(sets)}, not {name!r}")
    return name


def lattice_set(name: str | None) -> LatticeParameters:
    """The lattice of masking ``lattice``."""
    return LATTICE_PARAMETER_SETS[set_name("lattice", name)]


def residue_set(masking: str, name: str | None) -> ParameterSet:
    """The modulus and what goes with it, of any masking."""
    name = set_name(masking, name)
    return LATTICE_PARAMETER_SETS[name].residues if masking == "lattice" else PARAMETER_SETS[name]
