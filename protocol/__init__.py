"""The protocol: a client has rows multiplied by workers that learn only how many there are, and by what.

One product, y = x M, of private real rows x_t (t numbers them) and a public integer matrix M that workers
hold:

    1 quantize   z_t = round(a_t x_t), so small that no sum wraps around, noise included   `fixed_point`
    2 hide       C = z + R mod q, with a mask R that serves once, and lives in memory      `masks`
    3 multiply   C M mod q, or the same of what a seed expands to: a worker's only job     `multiplication`
    4 verify     C_t . v = (C M)_t . s mod q, for a secret s and v = M s                   `verification`
    5 reveal     y_t = centred(C M - R M mod q)_t / a_t                                    `masks`

Certified parameter sets allow sums to wrap in step 1, and find and undo that in step 5: `certificate`.
The scales of M go with step 1 backward, and with step 5 forward. `masks` says what steps 2 and 5 promise.
Where R and R M come from is what a mask source decides:

    shares/      Every operator but the last gets a seed, and multiplies what it expands to; the last one
                 multiplies C, z and the sum of these. Exact. Private as long as any one operator keeps what
                 it sees to itself. Seeds may be sent before x is known.
    lattice/     R = A S + E: a column of 256 rows of it is a ring element, a sample of learning with errors.
                 M combines columns and S acts within each, so (A S) M = (A M) S. The hint A M is obtained
                 once for a kit and verified; (A M) S is subtracted; E M stays, a noise of known bound. One
                 operator is enough, and nobody needs to trust it.

An operator is a party, with one worker or several: what one of these sees, all see. A kit is what a client
makes once of a model, from its own copy: it draws s and computes v.

Guaranteed, whatever workers answer: seeds do not depend on the operand, and C of one operand cannot be told
from C of another of its shape if ChaCha20 and HKDF-SHA256 are pseudorandom (`shares`) and Module-LWE is hard
(`lattice`). In `lattice`, results carry noise; that whatever depends on results and reaches others tells
nothing of it is one more assumption, see `lattice.source`. Of n wrong rows, however chosen, one is accepted
with probability n/q at most.

Not hidden: which products are asked for, when, and for how many rows; that a hint is obtained, an answer
rejected, or no more asked for. Not guaranteed: an answer.

When something goes wrong: a wrong answer is an error before anything of it is decoded. Decoded, it would
tell its sender about the mask by what the client does next, so privacy rests on step 4, too. To verify
before revealing is up to the caller, and so is asking again: at the same operator, with the same bytes. A
forked child uses no mask that its parent drew; a mask source is never copied or pickled. Not covered is a
machine that is copied while it runs.

    client   sends shares, each to its own operator, with the name of M. Never sends x, a, s, v, the scales
             of M, or what R is made of, but for each seed to its operator.
    worker   answers with products, and if it is honest keeps nothing. It holds the integers of M.

To be read in this order: `parameters` (q), `weights` (the integers of M), `products` (which M there are),
`fixed_point`, `expansion` (from a seed to residues), `operands`, `verification`, `masks`, `shares`,
`lattice`, `certificate`; of `residues` (arithmetic mod q) the names suffice. `multiplication` and `kernels`
make it fast: a worker compares its products with plain integers before it serves. Proofs are in
docs/protocol.md.
"""

# Loaded twice, every class and every stock of masks would be there twice.
if not __name__.startswith("blindtune."):
    raise ImportError(f"import this as blindtune.{__name__}")
