"""One product at the client: its error, what its masks cost, and how fast its kernels are."""
