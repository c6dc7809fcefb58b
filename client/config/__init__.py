"""What the user writes: how operands are hidden, and from whom.

In this room:

    blind_config    `BlindConfig` and `Operator`
    addresses       of workers, and which machine each leads to
"""
