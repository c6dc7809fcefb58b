"""Lattice reduction finds the secrets of lattices that are too small or too quiet, and of no others.

The same figures stand in docs/security-estimates.md, and are compared with it.
"""

from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import cache
from math import log, sqrt
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.lattice_attacks import LLL_DELTA, primal_attack, samples_for
from support.markdown import section, tables
from support.toy_lattice import ToyBlock, ToyLattice, centred, evaluate, interpolate, uniform

from blindtune.protocol.expansion import derive_key, expand
from blindtune.protocol.lattice.hint import packed_shape
from blindtune.protocol.lattice.parameters import DEGREE, MLWE1280, LatticeParameters
from blindtune.protocol.lattice.source import LatticeSource
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import forward_products

DOCUMENT = Path(__file__).parents[2] / "docs" / "security-estimates.md"
SEED = bytes(range(32))
INSTANCES = 5
FAR = Q31.modulus // 8  # what three in four random residues exceed in magnitude


@pytest.fixture(scope="module")
def process() -> Iterator[Executor]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


@cache
def documented() -> list[list[dict[str, str]]]:
    """The tables of the section that this file is about."""
    text = DOCUMENT.read_text(encoding="utf-8")
    return list(tables(section(text, "What breaks when parameters are wrong")))


def secret(*label: str) -> bytes:
    """The same secrets in every run, so that every run attacks the same instances."""
    return derive_key(SEED, "toy lattice", *label)


def random_operand(rows: int, columns: int, q: int = Q31.modulus, seed: int = 1) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(-(q // 2), q // 2, (rows, columns), np.int32, endpoint=True)


def block_of(lattice: ToyLattice, columns: int, instance: int) -> ToyBlock:
    product = forward_products(["layer"], columns)[0]
    return lattice.block(secret("A", str(instance)), product, secret("S, E", str(instance)))


def attacked(
    process: Executor, lattice: ToyLattice, instance: int, block_size: int = 2, samples: int | None = None
) -> bool:
    """Whether the primal attack finds the secret of an instance, with operands of zeros."""
    m = samples or samples_for(lattice.dimension, lattice.modulus)
    columns = -(-m // lattice.degree)
    block = block_of(lattice, columns, instance)
    sent = block.masked(np.zeros((lattice.degree, columns), np.int64), lattice.modulus)
    a, b = block.lwe.reshape(-1, lattice.dimension)[:m], sent.T.reshape(-1)[:m]
    found = primal_attack(process, a, b, lattice.modulus, lattice.eta, block_size)
    return found is not None and np.array_equal(found, block.s)


def test_the_toy_expands_a_seed_as_the_product_does() -> None:
    words = uniform(SEED, 40, 5000, Q31.modulus)
    assert np.array_equal(words, expand(SEED, 0, 40, 5000, Q31))
    # 2^31 - q of 2^31 words are rejected, so that some of these 200,000 come from a later stream.
    raw = uniform(SEED, 40, 5000, (1 << 31) - 1)
    assert np.count_nonzero(raw != words) > 0


@pytest.mark.parametrize("rank", [1, 2])
def test_the_toy_masks_as_the_product_does_at_its_degree(rank: int) -> None:
    parameters = LatticeParameters(name="toy", rank=rank, eta=21, security="none")
    operand, product = random_operand(DEGREE, 3), forward_products(["layer"], 3)[0]
    hint = np.zeros(packed_shape(parameters, 3), np.int32)
    source = LatticeSource(parameters, SEED, lambda _: hint, lambda size: secret("S, E")[:size])
    toy = ToyLattice(DEGREE, rank, 21).block(SEED, product, secret("S, E"))
    (share,) = source.hide_integers(operand, product).shares
    assert np.array_equal(toy.masked(operand, Q31.modulus), share.residues)


@pytest.mark.parametrize(("degree", "q"), [(8, 257), (16, Q31.modulus)])
def test_the_toy_multiplies_in_its_ring(degree: int, q: int) -> None:
    lattice = ToyLattice(degree, 1, 21, q)
    a, s = lattice.public_matrix(SEED, 1)[0, :, 0], np.arange(degree) - 3
    product = lattice.lwe_matrix(a[None, :, None])[0] @ s % q
    full = np.convolve(a, s.astype(object))
    assert np.array_equal(product, (full[:degree] - np.append(full[degree:], 0)) % q)
    values = evaluate(a[:, None], q) * evaluate(s[:, None], q)
    assert np.array_equal(product, interpolate(values, q)[:, 0])


def test_the_products_modulus_and_noise_do_not_save_a_small_dimension(process: Executor) -> None:
    lattice = ToyLattice(degree=16, rank=2, eta=MLWE1280.eta)
    q, known, columns = lattice.modulus, 3, 12
    block, operand = block_of(lattice, columns, 0), random_operand(16, columns)
    sent = block.masked(operand, q)
    a = block.lwe[:known].reshape(-1, lattice.dimension)
    b = (sent - operand)[:, :known].T.reshape(-1) % q
    found = primal_attack(process, a, b, q, lattice.eta)
    assert found is not None and np.array_equal(found, block.s)
    # What is left is the noise, which nobody can take off: the client's own result holds it too.
    read = centred(sent - (block.lwe @ found.astype(object)).T, q)
    assert np.array_equal(centred(read - operand, q), block.e)
    assert np.abs(centred(read - operand, q)).max() <= lattice.eta
    wrong = centred(sent - (block.lwe @ (found + 1).astype(object)).T - operand, q)
    assert np.median(np.abs(wrong)) > FAR


def largest_predicted(q: int, eta: int, block_size: int, delta: float) -> int:
    """The dimension up to which the inequality behind core-SVP promises success."""
    sigma, promised = sqrt(eta / 2), 0
    for n in range(2, 200):
        m = np.arange(1, 8 * n)
        d = n + m + 1
        short = (2 * block_size - d - 1) * log(delta) + m / d * log(q)
        if short.max() >= log(sqrt(block_size) * sigma):
            promised = n
    return promised


def agrees_with_table(process: Executor, reduction: str, block_size: int, delta: float) -> None:
    (row,) = [x for table in documented() for x in table if x.get("reduction") == reduction]
    stated = {
        int(name): int(cell.removesuffix(f"/{INSTANCES}"))
        for name, cell in row.items()
        if name.isdigit() and cell
    }
    assert len(stated) >= 4
    rates = {
        dimension: sum(
            attacked(process, ToyLattice(8, dimension // 8, 21, 257), instance, block_size)
            for instance in range(INSTANCES)
        )
        for dimension in stated
    }
    # Reduction computes in floating point, so that near the limit another processor may see one more or less.
    assert all(abs(rates[n] - stated[n]) <= 1 for n in stated), rates
    assert rates[min(rates)] == INSTANCES and rates[max(rates)] == 0
    broken = max(n for n, rate in rates.items() if rate)
    predicted = largest_predicted(257, 21, block_size, delta)
    assert predicted == int(row["predicted"]) and abs(predicted - broken) <= 12


def test_lll_breaks_small_dimensions_only(process: Executor) -> None:
    agrees_with_table(process, "LLL", 2, LLL_DELTA)


@pytest.mark.slow
def test_stronger_reduction_breaks_larger_dimensions_but_no_larger_ones(process: Executor) -> None:
    agrees_with_table(process, "BKZ-20", 20, 1.0128)


@pytest.mark.parametrize(
    ("eta", "q", "broken"), [(21, 257, False), (1, 257, True), (21, 12289, True)], ids=str
)
def test_a_dimension_that_resists_falls_with_less_noise_for_the_modulus(
    process: Executor, eta: int, q: int, broken: bool
) -> None:
    lattice = ToyLattice(degree=8, rank=5, eta=eta, modulus=q)
    assert [attacked(process, lattice, instance) for instance in range(2)] == [broken] * 2
    (row,) = [x for table in documented() for x in table if (x.get("η"), x.get("q")) == (str(eta), str(q))]
    assert (row["n"], row["LLL"]) == (str(lattice.dimension), "2/2" if broken else "0/2")
