"""Who gets in, when, and for how long."""
