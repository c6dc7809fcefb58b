"""What the protocol's inner loops are made of, on processors.

In this room:

    compiled      kernels that numba compiles, and keeps for as long as all they are made of stays as it is
    vectors       sixteen words at once; reals are float64 numbers in the same way
    threes        numbers of three bytes in memory, sixteen at once
    chacha20      the keystream, sixteen blocks at once
    tiles         tile registers for int8 products (Intel AMX); dot_products does it in vectors (AVX-512 VNNI)
    row_blocks    rows in threads; shared_rows hands them out from within a kernel
    recycled      memory of large matrices, for the next ones; allocator keeps that of smaller ones
    process       which process this is, so that nothing drawn or opened before a fork is used after it
"""
