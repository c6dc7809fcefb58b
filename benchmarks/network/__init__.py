"""How much of a link training uses, and what the transport itself costs."""
