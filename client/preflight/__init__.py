"""Checks before a run: the operators, the disk and the machine. Nothing private takes part in any."""
