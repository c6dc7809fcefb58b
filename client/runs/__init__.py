"""A run from its recipe to its adapter, and what is done with it afterwards."""
