"""The real client and the real worker on a simulated network with a virtual clock.

One seed decides everything: the operators, the faults and when they strike, every delay, and which of two
tasks that could both run goes first. So a schedule that fails can be run again.

    scheduler    tasks and the clock
    network      streams of messages, and what can happen to them
    workers      operators' workers: the real service, which can crash, hang or lie
    transport    how the real client reaches them
    client       the client's process, with its products held against the reference
    ledger       what was drawn and what travelled; says when an invariant is broken
    training     a small training run, with checkpoints
    watched      what tells the ledger
    schedules    what happens in a schedule, drawn from its seed
    chosen       schedules that are not left to a seed
    world        runs a schedule and judges it
"""
