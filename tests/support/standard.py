"""The parameter sets of models for which none is named."""

from blindtune.client.config.parameter_sets import lattice_set, residue_set

__all__ = ["LATTICE", "SHARES"]

SHARES = residue_set("shares", None)
LATTICE = lattice_set(None)
