"""Certified fixed point: wraps are detected and taken back, instead of excluded by a bound.

`fixed_point` proves that no result wraps around the modulus, and pays log2 sqrt(d) bits for rows that do not
occur. A certified parameter set scales rows up by what recent results left unused, and certifies each row.

With secret words u for the outputs, and V = M u, the integers Z that were multiplied (noise included), the
centred result y^ = Z M - q w of a worker's verified answer satisfies, in the ring of integers mod 2^32,

    D = q^-1 (Z V - y^ u) = sum_j w_j u_j

an identity: nothing overflows. D = 0 where nothing wrapped. A row that wrapped has D = 0 with a probability
of at most 2^(t - 32), 2^t being the power of two in gcd(w), since its w was fixed before and u is uniform
and known to nobody else. Only where D is not 0, a second, independent set of words mod 2^64 finds w, and y
follows.

    words       u, and V = M u                    a kit makes them in the pass that makes verification vectors
    syndromes   D of all rows
    decoding    from D to w, within bounds
    certified   the two together: from verified answers to corrected real numbers
    scales      K, the part of the bound that results take; from it the budget of a row's squares
    history     K of each product, out of the last steps

u, V, D, K and what is found of wraps stay here, as s and v of `verification` do. Whoever calls verifies
first.
"""
