"""What the user writes: how to hide operands, and from whom."""
