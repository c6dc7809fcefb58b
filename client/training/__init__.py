"""Training, measuring and resuming the run that a recipe describes."""
