"""Mistakes that no dimension of the lattice forgives, made with the standard set and the product's kernels.

Each attack is also run on what the product sends, where it finds nothing. docs/security-estimates.md says the
same in a table.
"""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from support.lattice_attacks import ring_elimination
from support.markdown import section, tables
from support.toy_lattice import centred, evaluate, interpolate

from blindtune.protocol.expansion import RandomBytes, derive_key, expand
from blindtune.protocol.lattice.hint import PublicMatrix, packed_shape
from blindtune.protocol.lattice.masking import add_operand, mask_rows
from blindtune.protocol.lattice.noise import centred_binomial
from blindtune.protocol.lattice.parameters import DEGREE, MLWE1280
from blindtune.protocol.lattice.source import LatticeSource
from blindtune.protocol.lattice.transform import transformed
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import forward_products

DOCUMENT = Path(__file__).parents[2] / "docs" / "security-estimates.md"
SEED = bytes(range(32))
KNOWN = MLWE1280.rank  # columns of the operand that the attacker knows: one for each unknown ring element
FAR = Q31.modulus // 8  # what three in four random residues exceed in magnitude


def secret(name: str) -> bytes:
    """The same in every run, so that every run attacks the same masks."""
    return derive_key(SEED, "lattice mistakes", name)


def random_operand(rows: int, columns: int, seed: int = 1) -> NDArray[np.int32]:
    half = Q31.modulus // 2
    return np.random.default_rng(seed).integers(-half, half, (rows, columns), np.int32, endpoint=True)


class Standard:
    """The standard set with secrets and noise of the test's choice."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.product = forward_products(["layer"], columns)[0]
        self.a = expand(SEED, 0, MLWE1280.dimension, columns, Q31).reshape(MLWE1280.rank, DEGREE, columns)
        self._packed = PublicMatrix(MLWE1280, SEED).packed(columns)

    def secret(self, name: str) -> NDArray[np.int8]:
        """S, [rank, 256]."""
        return centred_binomial(secret(name), 0, MLWE1280.rank, DEGREE, MLWE1280.eta)

    def noise(self, blocks: int) -> NDArray[np.int8]:
        """E of some blocks."""
        return centred_binomial(secret("E"), 0, blocks * DEGREE, self.columns, MLWE1280.eta)

    def send(
        self, s: NDArray[np.int8], operand: NDArray[np.int32], noise: NDArray[np.int8]
    ) -> NDArray[np.uint32]:
        """The same S for every block of the operand."""
        blocks = len(operand) // DEGREE
        factors = np.broadcast_to(transformed(s, Q31), (blocks, *s.shape))
        runs = np.array([(i * DEGREE, 0, DEGREE) for i in range(blocks)], np.int64)
        out = np.empty(operand.shape, np.uint32)
        rest = np.empty((0, self.columns), np.uint32)
        mask_rows(self._packed, np.ascontiguousarray(factors), runs, Q31, out, rest)
        add_operand(operand, noise, Q31, out)
        return out

    def source(self, random_bytes: RandomBytes = os.urandom) -> LatticeSource:
        """The product's own, for a layer of zeros."""
        hint = np.zeros(packed_shape(MLWE1280, self.columns), np.int32)
        return LatticeSource(MLWE1280, SEED, lambda _: hint, random_bytes)

    def masked(self, source: LatticeSource, operand: NDArray[np.int32]) -> NDArray[np.uint32]:
        return source.hide_integers(operand, self.product).shares[0].residues

    def eliminate(self, sent: NDArray[np.uint32], operand: NDArray[np.int32]) -> NDArray[np.int64]:
        """S, [rank, 256], if there is no noise, by an attacker who knows a few columns of the operand."""
        known = sent[:, :KNOWN].astype(np.int64) - operand[:, :KNOWN]
        return ring_elimination(self.a[:, :, :KNOWN], known, Q31.modulus)

    def read(self, sent: NDArray[np.uint32], s: NDArray[np.int64]) -> NDArray[np.int64]:
        """X + E, with a secret that an attack found."""
        mask = [evaluate(x[:, None], Q31.modulus) * y for x, y in zip(s, self.a, strict=True)]
        return centred(sent - interpolate(sum(mask[1:], mask[0]), Q31.modulus), Q31.modulus)


def test_without_noise_a_few_known_columns_of_one_block_give_all_others() -> None:
    lab = Standard(columns=8)
    s, operand = lab.secret("S"), random_operand(DEGREE, 8)
    sent = lab.send(s, operand, np.zeros((DEGREE, 8), np.int8))
    found = lab.eliminate(sent, operand)
    assert np.array_equal(found, s)
    assert np.array_equal(lab.read(sent, found), operand)


def test_with_noise_elimination_finds_neither_secret_nor_operand() -> None:
    lab = Standard(columns=8)
    operand = random_operand(DEGREE, 8)
    sent = lab.masked(lab.source(), operand)
    found = lab.eliminate(sent, operand)
    assert np.median(np.abs(found)) > FAR
    error = centred(lab.read(sent, found) - operand, Q31.modulus)[:, KNOWN:]
    assert np.median(np.abs(error)) > FAR


def test_a_secret_kept_while_noise_is_drawn_again_is_averaged_out() -> None:
    lab = Standard(columns=8)
    s, operand, most = lab.secret("S"), random_operand(DEGREE, 8), 1600
    copies = np.tile(operand, (most, 1))
    sent = lab.send(s, copies, lab.noise(most)).reshape(most, DEGREE, 8)
    exact = lab.send(s, operand, np.zeros((DEGREE, 8), np.int8))

    def average(count: int) -> NDArray[np.int64]:
        first = sent[0].astype(np.int64)
        change = centred(sent[:count].astype(np.int64) - first, Q31.modulus).mean(axis=0)
        return (first + np.rint(change).astype(np.int64)) % Q31.modulus

    text = section(DOCUMENT.read_text(encoding="utf-8"), "What breaks when parameters are wrong")
    (table,) = [x for x in tables(text) if "sends" in x[0]]
    right = {int(row["sends"]): float(np.mean(average(int(row["sends"])) == exact)) for row in table}
    assert {int(row["sends"]): row["mask words read"] for row in table} == {
        count: f"{100 * share:.0f} %" for count, share in right.items()
    }
    found = lab.eliminate(average(most).astype(np.uint32), operand)
    assert right[most] == 1 and np.array_equal(found, s)
    assert right[16] < 1
    assert not np.array_equal(lab.eliminate(average(16).astype(np.uint32), operand), s)


def test_sending_an_operand_again_under_fresh_masks_gives_nothing_to_average() -> None:
    lab = Standard(columns=8)
    operand, count = random_operand(DEGREE, 8), 400
    sent = lab.masked(lab.source(), np.tile(operand, (count, 1))).reshape(count, DEGREE, 8)
    change = centred(sent[1:].astype(np.int64) - sent[0], Q31.modulus)
    # Uniform on -q/2 ... q/2: the mean of magnitudes is q/4, to 0.1 % for 800,000 of them.
    assert abs(np.abs(change).mean() / (Q31.modulus / 4) - 1) < 0.01
    average = (sent[0] + np.rint(change.mean(axis=0)).astype(np.int64)) % Q31.modulus
    error = centred(
        lab.read(sent[0], lab.eliminate(average.astype(np.uint32), operand)) - operand, Q31.modulus
    )
    assert np.median(np.abs(error[:, KNOWN:])) > FAR


def test_one_secret_for_two_operands_shows_their_difference() -> None:
    lab = Standard(columns=8)
    one, two = random_operand(DEGREE, 8), random_operand(DEGREE, 8, seed=2)
    both = np.concatenate([one, two])

    def error(sent: NDArray[np.uint32]) -> NDArray[np.int64]:
        difference = sent[:DEGREE].astype(np.int64) - sent[DEGREE:]
        return centred(difference - (one.astype(np.int64) - two), Q31.modulus)

    reused = error(lab.send(lab.secret("S"), both, lab.noise(2)))
    assert 0 < np.abs(reused).max() <= 2 * MLWE1280.eta
    assert np.median(np.abs(error(lab.masked(lab.source(), both)))) > FAR


def test_a_random_generator_that_repeats_shows_the_difference_exactly() -> None:
    lab = Standard(columns=8)
    both = random_operand(2 * DEGREE, 8)
    change = both[:DEGREE].astype(np.int64) - both[DEGREE:]
    for random_bytes, equal in ((lambda size: SEED[:size], True), (os.urandom, False)):
        sent = lab.masked(lab.source(random_bytes), both).astype(np.int64)
        assert np.array_equal((sent[:DEGREE] - sent[DEGREE:] - change) % Q31.modulus, 0 * change) is equal
