"""What the estimates of the lattice parameters rest on."""
