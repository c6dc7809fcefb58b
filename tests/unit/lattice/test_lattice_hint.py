"""A and H: every row at its place, the same A for every width, and hints that are A M."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lattice_reference import (
    HALF,
    PUBLIC_SEED,
    TOY,
    Worker,
    backward,
    centred,
    evaluate,
    interpolate,
    product,
)

from blindtune.protocol.expansion import expand
from blindtune.protocol.lattice.hint import (
    MOST_COLUMNS,
    PublicMatrix,
    hint_request,
    pack_combination,
    pack_rows,
    packed_shape,
)
from blindtune.protocol.lattice.parameters import DEGREE, MLWE1280, MLWE1536
from blindtune.protocol.lattice.transform import LANES
from blindtune.protocol.parameters import Q31


def unpacked(packed: np.ndarray, columns: int) -> np.ndarray:
    tiles, rank = packed.shape[:2]
    return packed.transpose(1, 2, 0, 3).reshape(rank * DEGREE, tiles * LANES)[:, :columns]


def test_the_shape_of_a_packed_matrix() -> None:
    assert packed_shape(MLWE1280, 2048) == (128, 5, 256, 16)
    assert packed_shape(MLWE1536, 17) == (2, 6, 256, 16)
    assert np.prod(packed_shape(MLWE1280, 2048)) * 4 == 2048 * 1280 * 4


@settings(derandomize=True, deadline=None, max_examples=30)
@given(data=st.data(), columns=st.integers(1, 80), rank=st.integers(1, 6))
def test_rows_packed_in_any_pieces_and_order_lie_at_their_places(
    data: st.DataObject, columns: int, rank: int
) -> None:
    rows = np.random.default_rng(columns).integers(0, Q31.modulus, (rank * DEGREE, columns), dtype=np.uint32)
    rows[0, 0], rows[1, 0], rows[2, 0], rows[3, 0] = HALF, HALF + 1, Q31.modulus - 1, 0
    packed = np.full((-(-columns // LANES), rank, DEGREE, LANES), 99, np.int32)
    cuts = sorted(data.draw(st.sets(st.integers(1, rank * DEGREE - 1), max_size=6)))
    pieces = list(zip([0, *cuts], [*cuts, rank * DEGREE], strict=True))
    for start, stop in data.draw(st.permutations(pieces)):
        pack_rows(rows[start:stop], packed, start, Q31)
    assert np.array_equal(unpacked(packed, columns), centred(rows.astype(np.int64)))
    assert not unpacked(packed, packed.shape[0] * LANES)[:, columns:].any()


def test_rows_are_packed_into_a_file_that_is_mapped(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, Q31.modulus, (DEGREE, 50), dtype=np.uint32)
    shape = packed_shape(TOY, 50)
    mapped = np.memmap(tmp_path / "hint", np.int32, "w+", shape=shape)
    pack_rows(rows[:100], mapped, 0, Q31)
    pack_rows(rows[100:], mapped, 100, Q31)
    mapped.flush()
    again = np.memmap(tmp_path / "hint", np.int32, "r", shape=shape)
    assert np.array_equal(unpacked(again, 50), centred(rows.astype(np.int64)))


@pytest.mark.parametrize(
    ("shape", "columns", "first", "count"),
    [
        ((3, 1, 256, 16), 50, 0, 4),  # too narrow
        ((4, 1, 256, 16), 48, 0, 4),  # too wide
        ((4, 1, 128, 16), 50, 0, 4),
        ((4, 1, 256, 8), 50, 0, 4),
        ((4, 1, 256, 16), 50, 253, 4),
        ((4, 1, 256, 16), 50, -1, 4),
        ((4, 2, 256, 16), 50, 509, 4),
    ],
)
def test_rows_that_do_not_fit_are_refused(shape: tuple, columns: int, first: int, count: int) -> None:
    packed = np.zeros(shape, np.int32)
    with pytest.raises(ValueError, match="rows"):
        pack_rows(np.ones((count, columns), np.uint32), packed, first, Q31)
    assert not packed.any()


def test_every_width_is_served_by_a_prefix_of_one_matrix() -> None:
    expected = centred(expand(PUBLIC_SEED, 0, TOY.dimension, 200, Q31).astype(np.int64))
    public = PublicMatrix(TOY, PUBLIC_SEED)
    for columns in (1, 40, 33, 200, 16, 200):
        packed = public.packed(columns)
        assert packed.shape[0] * LANES >= columns and packed.dtype == np.int32
        assert np.array_equal(unpacked(packed, columns), expected[:, :columns])
    assert public.packed(1) is public.packed(200)


@pytest.mark.parametrize("parameters", [MLWE1280, MLWE1536])
def test_the_packed_matrix_is_what_a_worker_expands(parameters) -> None:  # type: ignore[no-untyped-def]
    packed = PublicMatrix(parameters, PUBLIC_SEED).packed(20)
    whole = hint_request(Q31, PUBLIC_SEED, product(20), 0, parameters.dimension)
    assert np.array_equal(unpacked(packed, 20), centred(whole.residues.astype(np.int64)))


def test_other_seeds_give_other_matrices() -> None:
    a, b = PublicMatrix(TOY, PUBLIC_SEED).packed(16), PublicMatrix(TOY, bytes(32)).packed(16)
    assert np.count_nonzero(a == b) < 5


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_seed_of_the_wrong_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        PublicMatrix(TOY, bytes(length))
    with pytest.raises(ValueError, match="32 bytes"):
        hint_request(Q31, bytes(length), product(4), 0, 1)


def test_a_request_carries_the_seed_and_the_rows_that_it_expands_to() -> None:
    which = product(30)
    share = hint_request(Q31, PUBLIC_SEED, which, 700, 20)
    assert share.recipient == 0 and share.seed is not None
    assert share.seed.key == PUBLIC_SEED and share.seed.row_offset == 700
    assert np.array_equal(share.residues, share.seed.expand(20, 30))
    assert np.array_equal(share.residues, expand(PUBLIC_SEED, 0, 720, 30, Q31)[700:])


@pytest.mark.parametrize("forward", [True, False])
def test_a_hint_is_the_transform_of_a_times_m(forward: bool) -> None:
    integers = np.random.default_rng(1).integers(-127, 128, (9, 14))
    worker, which = Worker(integers), product(14) if forward else backward(9)
    matrix = integers.T if forward else integers
    # A in coefficients, from its transform, then times M in the ring, then transformed again.
    a = interpolate(expand(PUBLIC_SEED, 0, DEGREE, matrix.shape[0], Q31))
    expected = evaluate(a @ matrix.astype(object) % Q31.modulus)
    assert np.array_equal(unpacked(worker.hint(TOY, which), matrix.shape[1]), centred(expected))


@pytest.mark.parametrize("columns", [1, 16, 37])
def test_a_combination_of_features_is_a_times_v(columns: int) -> None:
    generator = np.random.default_rng(columns)
    packed = PublicMatrix(MLWE1280, PUBLIC_SEED).packed(64)  # wider than v
    for v in (
        generator.integers(0, Q31.modulus, columns),
        np.full(columns, Q31.modulus - 1),
        np.zeros(columns, int),
    ):
        combination = pack_combination(packed, v.astype(np.uint32)[None], Q31)
        assert combination.shape == packed_shape(MLWE1280, 1) and not combination[..., 1:].any()
        wanted = unpacked(packed, columns).astype(object) @ v.astype(object)
        assert np.array_equal(unpacked(combination, 1)[:, 0], centred(wanted % Q31.modulus))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_of_a_combination_do_not_overflow(sign: int) -> None:
    packed = np.broadcast_to(np.full((1, 1, DEGREE, LANES), sign * HALF, np.int32), (4096, 1, DEGREE, LANES))
    for word in (0x7FFDFFFF, Q31.modulus - 1):  # of residues, those with the largest low and high half
        v = np.full(MOST_COLUMNS, word, np.uint32)
        wanted = (sign * HALF * word * MOST_COLUMNS) % Q31.modulus
        assert (unpacked(pack_combination(packed, v[None], Q31), 1) % Q31.modulus == wanted).all()
    with pytest.raises(ValueError, match="overflow"):
        pack_combination(packed, np.zeros((1, MOST_COLUMNS + 1), np.uint32), Q31)
