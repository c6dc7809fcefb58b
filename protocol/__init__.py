"""The protocol: how a client has a matrix multiplied by a worker that learns nothing of it and cannot cheat.

One product, ``Y = X M``, of private rows X and a public matrix M that workers hold:

    1 quantize   z_t = round(a_t x_t), so short that no sum wraps around the modulus q     `fixed_point`
    2 hide       C = z + R mod q, with a mask R that is used once and never written down   `masks`
    3 multiply   C M mod q, which is all that a worker ever does                           `multiplication`
    4 verify     C_t . v = (C M)_t . s mod q, for a secret s and v = M s                   `verification`
    5 reveal     y_t = (C M - R M)_t / a_t, only of what was verified                      `masks`

Where R M comes from is what a mask source decides:

    shares/      R is a sum of expanded seeds. Each of all operators but the last gets a seed and multiplies
                 what it expands to; the last multiplies C. Exact, and private as long as one of the
                 operators, whichever, does not share what it sees.
    lattice/     R = A S + E is a sample of learning with errors, its columns ring elements. The hint A M is
                 obtained once and verified, and (A M) S is what is subtracted in step 5. E M stays as a
                 small noise. One operator is enough, and nobody needs to trust it.

Guaranteed, whatever workers answer: what each of them sees is the same for all operands of a shape, or cannot
be told apart if ChaCha20 and HKDF-SHA256 are pseudorandom (`shares`) and Module-LWE is hard (`lattice`). A
wrong row is accepted with probability 1/q, whatever was sent before. Not hidden: which product is asked for,
when, and how many rows it has. Not guaranteed: that there is an answer.

    client   sends to each operator its share, C or a seed, with the name of M and the number of rows. Checks
             the answer's shape, that its words are below q, and step 4. Keeps x, a, R, s, v and the
             scales of M. It made s and v once, from its own copy of M, when the kit was made.
    worker   checks that a request fits what it holds, and that words are below q. Sends the product. Keeps
             nothing, and holds nothing but the integers of M and their fingerprint.

To be read in this order: `parameters` (q), `residues` (arithmetic mod q), `weights` (the integers of M),
`products` (which M there are), `fixed_point`, `expansion` (from a seed to residues), `masks`, `shares`,
`verification`, `lattice`. `operands` is what a worker is given. The rooms `multiplication` and `kernels` are
about speed: they compute what is defined elsewhere, and are compared with it. Proofs are in docs/protocol.md.
"""

if not __name__.startswith("blindtune."):  # loaded twice, there would be two stocks of masks
    raise ImportError(f"import this as blindtune.{__name__}")
