"""operand . M mod q, as fast as a machine does it exactly.

In this room:

    multiplier          products of layers, in blocks of rows, each in the way that is exact here
    methods             the ways: four int8 products, or one in float64
    tile_product        the int8 products in tile registers (Intel AMX) or vectors (AVX-512 VNNI)
    cuda_product        those on NVIDIA GPUs; cuda_expansion expands seeds there
    exactness           which way is exact on this machine: each is tried, and none is believed
    expansion_probes    the same for expansion
    four_bit_matrix     layers kept as four-bit codes, of which int8 pieces are made as they are multiplied
    layer_memory        where matrices lie, which decides how fast they are read
"""
