"""This process and its machine: what it writes, and how it ends."""
