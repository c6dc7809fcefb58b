"""From an operand to its product: masked, multiplied by operators, verified and unmasked."""
