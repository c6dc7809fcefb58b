"""Lattice masks: one untrusted operator is enough, under the Module-LWE assumption.

R = A S + E    over  Z_q[X] / (X^256 + 1),      R M = H S + E M,      H = A M
"""
