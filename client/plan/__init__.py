"""What a training step will cost, before anything is connected: traffic to the byte, time and memory.

asked       what a step asks workers for: the model is traced, without weights
traffic     rounds and bytes of that
local_work  what the client computes itself, counted in the same trace
profiles    the constants of the cost model, for a client and for a worker
costs       seconds of one product, at the client, on the network and at a worker
schedule    how micro-batches in flight share client, network and workers
skeleton    the model of a configuration, without weights
planning    all of it together
calibration measures the constants on this machine, with loopback, small_steps and measured_...
"""
