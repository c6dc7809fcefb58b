"""Products at a worker, on processors and GPUs, and many clients of one worker."""
