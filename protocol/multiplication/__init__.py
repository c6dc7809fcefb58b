"""operand . M mod q, as fast as a machine does it exactly."""
