"""Whole steps of training, next to plans, to the same without masks, and to an encrypted system."""
