"""Families of models, and trainers."""
