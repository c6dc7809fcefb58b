"""What the protocol's inner loops are made of: vectors of words, ChaCha20, tile registers, threads, memory."""
