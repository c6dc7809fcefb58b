"""Four-bit weights against bitsandbytes, bit for bit: codes, scales, and the numbers that they stand for."""

import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from blindtune.protocol import nf4
from blindtune.protocol.nf4 import BLOCK, FourBitWeight, quantize_nf4
from blindtune.protocol.weights import SCHEMES, quantize_int8

SHAPES = [(96, 512), (704, 256), (33, 100), (7, 63), (1, 1), (5, 64), (300, 130), (64, 144)]


@pytest.fixture(scope="module")
def bnb() -> Iterator[object]:
    logging.disable(logging.WARNING)  # it misses a package of kernels that nobody asked for
    import bitsandbytes.functional

    logging.disable(logging.NOTSET)
    yield bitsandbytes.functional


def weight(kind: str, shape: tuple[int, int]) -> torch.Tensor:
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.03
    flat = normal.clone().view(-1)
    if kind in ("float16", "bfloat16"):
        return normal.to(getattr(torch, kind))
    if kind == "zero blocks":
        flat[: len(flat) // 2] = 0
    elif kind == "one outlier":
        flat[len(flat) // 3] = 1e4
    elif kind == "constant":
        flat[:] = -0.7
    elif kind == "middles":  # where two codes are equally near
        flat[:] = ((nf4.TABLE[1:] + nf4.TABLE[:-1]) / 2).repeat(len(flat) // 15 + 1)[: len(flat)]
        flat[::BLOCK] = 1
    else:
        flat *= {"normal": 1, "zeros": 0, "denormals": 1e-42, "nearly denormal": 1e-37, "huge": 1e38}[kind]
    return flat.view(shape)


KINDS = ["normal", "float16", "bfloat16", "zeros", "zero blocks", "denormals", "nearly denormal", "huge"]
KINDS += ["one outlier", "constant", "middles"]


def decoded(bnb, packed: torch.Tensor, state, shape: tuple[int, int]) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """What bitsandbytes' codes stand for, float32.

    By its operations in torch where 64 does not divide a row: there its kernel for AVX-512 errs (0.50), since
    vectors have elements of two blocks.
    """
    if shape[1] % BLOCK == 0:
        return bnb.dequantize_4bit(packed, state)
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    codes = packed.reshape(-1).to(torch.uint8)
    return _dequantize_4bit_compute(codes, absmax, state.code, BLOCK, shape, torch.float32)


def bits(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().numpy().view(np.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_bitsandbytes(kind: str, bnb) -> None:  # type: ignore[no-untyped-def]
    for shape in SHAPES:
        w = weight(kind, shape)
        packed, state = bnb.quantize_4bit(w, blocksize=BLOCK, quant_type="nf4")
        state.dtype = torch.float32
        ours = quantize_nf4(w)
        assert torch.equal(ours.codes, packed.flatten()), shape
        assert np.array_equal(bits(ours.scales.stored), bits(state.absmax)), shape
        assert np.array_equal(bits(ours.rows(0, shape[0])), bits(decoded(bnb, packed, state, shape))), shape


@pytest.mark.parametrize("kind", [x for x in KINDS if x != "huge"])  # their mean overflows in bitsandbytes
def test_nested_numbers_are_those_of_bitsandbytes(  # type: ignore[no-untyped-def]
    kind: str, bnb, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given the mean of scales, of which torch's last bits depend on threads and processor."""
    for shape in SHAPES:
        w = weight(kind, shape)
        packed, state = bnb.quantize_4bit(w, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
        state.dtype = torch.float32
        single = quantize_nf4(w).scales.stored
        tolerance = 1e-6 * float(single.abs().max()) + 1e-44
        assert abs(float(nf4._mean(single)) - float(state.offset)) <= tolerance, shape
        monkeypatch.setattr(nf4, "_mean", lambda scales, offset=state.offset: offset)
        ours = quantize_nf4(w, double=True)
        monkeypatch.undo()
        assert torch.equal(ours.codes, packed.flatten()), shape
        assert np.array_equal(bits(ours.rows(0, shape[0])), bits(decoded(bnb, packed, state, shape))), shape


def test_the_tables_are_those_of_bitsandbytes(bnb) -> None:  # type: ignore[no-untyped-def]
    assert torch.equal(nf4.TABLE, bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf4.DYNAMIC, bnb.create_dynamic_map())


@pytest.mark.parametrize("double", [False, True])
def test_rows_are_the_same_however_they_are_asked_for(double: bool) -> None:
    w = weight("normal", (330, 101))  # more blocks than share a scale of scales
    four_bit = quantize_nf4(w, double=double)
    whole = four_bit.rows(0, 330)
    for step in (1, 2, 7):
        parts = [four_bit.rows(i, min(i + step, 330)) for i in range(0, 330, step)]
        assert torch.equal(torch.cat(parts), whole)
    assert four_bit.rows(5, 5).shape == (0, 101)


def test_parts_of_a_large_matrix_meet_where_blocks_do(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight("normal", (50, 130))
    expected = quantize_nf4(w, double=True)
    monkeypatch.setattr(nf4, "_ELEMENTS_AT_ONCE", 2 * BLOCK)
    found = quantize_nf4(w, double=True)
    assert torch.equal(found.codes, expected.codes) and torch.equal(
        found.scales.values(), expected.scales.values()
    )


def test_a_transposed_matrix_is_quantized_as_it_reads() -> None:
    w = weight("normal", (64, 48))
    assert torch.equal(quantize_nf4(w.t()).codes, quantize_nf4(w.t().contiguous()).codes)


@pytest.mark.parametrize("name", ["nf4", "nf4-double"])
def test_integers_are_those_of_the_numbers_that_are_left(name: str) -> None:
    w = weight("normal", (130, 96))
    left = quantize_nf4(w, double=name == "nf4-double").rows(0, 130)
    layer, expected = SCHEMES[name].quantize(w), quantize_int8(left)
    assert layer.fingerprint() == expected.fingerprint() != SCHEMES["int8"].quantize(w).fingerprint()
    # What int8 adds to what four bits left.
    again = layer.integers.float() * torch.from_numpy(layer.scales)[:, None]
    assert float((again - left).norm() / left.norm()) < 0.01 < float((left - w).norm() / w.norm()) < 0.12


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(value: float, double: bool) -> None:
    w = weight("normal", (33, 100))
    for place in ((0, 0), (32, 99)):
        spoiled = w.clone()
        spoiled[place] = value
        with pytest.raises(ValueError, match="not finite"):
            quantize_nf4(spoiled, double=double)
    with pytest.raises(ValueError, match="empty"):
        quantize_nf4(torch.empty(0, 4), double=double)


@pytest.mark.parametrize(("double", "bits"), [(False, 4.5), (True, 4 + 1 / 8 + 1 / 512)])
def test_a_four_bit_weight_takes_little_more_than_four_bits(double: bool, bits: float) -> None:
    four_bit = quantize_nf4(weight("normal", (256, 512)), double=double)
    assert isinstance(four_bit, FourBitWeight)
    assert four_bit.codes.nbytes + four_bit.scales.nbytes - 4 * double == 256 * 512 * bits / 8
