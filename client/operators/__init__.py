"""Operators, their workers, and what happens when one fails or lies."""
