"""What a client must know about layers that it does not hold, and how it comes to know it."""
