"""Merging a trained adapter into its base checkpoint: what it changes, the new layout, and the files."""
