"""Additive shares: two or more operators, at least one of whom keeps what it sees to itself.

source        seeds for all operators but the last, and what hides under their expansion for the last
fused         floating point to shares, and answers to floating point, in one pass over each matrix
answered      from the operators' verified answers to the product
masks_ahead   masks drawn before their operand is known, each handed out once
unmasked      no mask at all: the reference, in the client's own process
"""
