"""From an operand to its product: masked, multiplied by operators, verified and unmasked.

In this room:

    multiplier       one round, and the reference that needs none
    answers_ahead    what operators multiply before its operand is known
    overlap          threads that compute one at a time, and wait side by side
    connect          from a configuration to a connected multiplier
"""
