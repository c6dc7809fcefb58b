"""Where the figures of the documentation come from. Commands, to be run from the top of the repository:

    python -m benchmarks.protocol.precision

In this folder, by what they measure:

    protocol        one product at the client: its error, its masks, its kernels
    security        what the estimates of the lattice parameters rest on
    worker          products at a worker, on processors and GPUs, and many clients of one worker
    network         how much of a link training uses, and what the transport itself costs
    steps           whole steps of training: against plans, without masks, without a network, encrypted
    learning        what private adapters learn, next to stock PEFT
    compatibility   families of models, and trainers
    resilience      crashes, lies, silence and hostile clients
    common          what these share: workers in processes, a model of random weights, tables

`suite` runs those of speed one after the other.
"""
