"""What a client must know about layers that it does not hold, and how it comes to know it.

In this room:

    kit        shapes, scales, bounds and check vectors of a model's layers, in a folder
    prepare    makes one, in a pass over the client's own copy of the checkpoint
    hints      what lattice masks need besides, obtained from the operator and verified
    groups     layers that read the same tensor, which share a request
    head       where the output head is computed
"""
