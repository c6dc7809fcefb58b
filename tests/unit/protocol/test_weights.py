"""Int8 weights against their definition in numpy, bit for bit, and what fingerprints cover."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blindtune.protocol.weights import INT8, IntegerLayer, model_fingerprint, quantize_int8

SMALLEST = float(np.float32(2.0**-149))
LARGEST = float(np.finfo(np.float32).max)


def by_definition(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers and scales in numpy float32, each operation rounded once."""
    assert weight.dtype == np.float32
    scales = np.abs(weight).max(axis=1) / np.float32(127)
    scales = np.where(scales == 0, np.float32(1), scales)
    integers = np.clip(np.rint(weight / scales[:, None]), -127, 127)
    return integers.astype(np.int8), scales


def assert_as_defined(weight: np.ndarray) -> IntegerLayer:
    layer = quantize_int8(torch.from_numpy(weight))
    integers, scales = by_definition(weight)
    assert layer.integers.dtype == torch.int8 and layer.scales.dtype == np.float32
    assert np.array_equal(layer.integers.numpy(), integers)
    assert layer.scales.tobytes() == scales.tobytes()
    assert np.all(np.isfinite(layer.scales)) and np.all(layer.scales > 0)
    return layer


def gaussian(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    rows=st.lists(
        st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=5, max_size=5),
        min_size=1,
        max_size=4,
    )
)
@example([[0.0] * 5, [-0.0, 0.0, -0.0, 0.0, 0.0]])
@example([[SMALLEST * k for k in (1, -1, 63, 64, -63)], [SMALLEST * k for k in (190, -190, 127, 1, 0)]])
@example([[LARGEST, -LARGEST, 1.0, -1.0, SMALLEST]])
def test_any_finite_weights_are_quantized_as_defined(rows: list[list[float]]) -> None:
    assert_as_defined(np.array(rows, np.float32))


@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e30, 1e-38, 1e-42])
def test_random_weights_are_quantized_as_defined(factor: float) -> None:
    weight = gaussian(300, 257) * np.float32(factor)
    assert_as_defined(weight)


def test_the_scale_is_divided_by_and_not_multiplied_by_its_inverse() -> None:
    # The two differ for these weights, so equality with the definition tells them apart.
    weight = gaussian(2000, 100)
    largest = np.abs(weight).max(axis=1, keepdims=True)
    integers, scales = by_definition(weight)
    assert not np.array_equal(np.rint(weight * (np.float32(127) / largest)).astype(np.int8), integers)
    assert not np.array_equal(largest[:, 0] * np.float32(1 / 127), scales)
    assert_as_defined(weight)


def test_halves_are_rounded_to_even() -> None:
    weight = np.array([[127, 0.5, 1.5, 2.5, 125.5, 126.5, -0.5, -1.5, -2.5, -126.5]], np.float32)
    layer = assert_as_defined(weight)
    assert layer.scales[0] == 1
    assert layer.integers[0].tolist() == [127, 0, 2, 2, 126, 126, 0, -2, -2, -126]


def test_the_largest_magnitude_becomes_127_of_either_sign() -> None:
    weight = gaussian(500, 64)
    integers = quantize_int8(torch.from_numpy(weight)).integers.numpy()
    largest = np.take_along_axis(integers, np.abs(weight).argmax(axis=1)[:, None], axis=1)
    assert set(np.unique(largest)) == {-127, 127}


def test_nothing_becomes_more_than_127_where_a_denormal_scale_is_rounded_down() -> None:
    weight = np.array([[180, -180, 100, 0]], np.float32) * np.float32(SMALLEST)
    layer = assert_as_defined(weight)
    assert layer.scales[0] == np.float32(SMALLEST)
    assert layer.integers.tolist() == [[127, -127, 100, 0]]


def test_weights_come_back_within_half_a_unit() -> None:
    weight = gaussian(100, 64)
    layer = quantize_int8(torch.from_numpy(weight))
    error = np.abs(layer.integers.numpy() * layer.scales[:, None].astype(np.float64) - weight)
    assert np.all(error <= 0.50001 * layer.scales[:, None])


def test_rows_of_zeros_have_scale_one_among_other_rows() -> None:
    weight = gaussian(5, 8)
    weight[[1, 4]] = 0
    layer = assert_as_defined(weight)
    assert layer.scales[[1, 4]].tolist() == [1, 1]
    assert not torch.any(layer.integers[[1, 4]])


def test_rows_so_small_that_their_scale_vanishes_count_as_zero() -> None:
    layer = assert_as_defined(np.full((2, 4), 63 * SMALLEST, np.float32))
    assert layer.scales.tolist() == [1, 1] and not torch.any(layer.integers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_floating_point_type_counts_as_the_float32_values_it_holds(dtype: torch.dtype) -> None:
    weight = torch.from_numpy(gaussian(70, 90)).to(dtype)
    layer = quantize_int8(weight)
    integers, scales = by_definition(weight.to(torch.float32).numpy())
    assert np.array_equal(layer.integers.numpy(), integers)
    assert layer.scales.tobytes() == scales.tobytes()


def test_more_rows_than_are_quantized_at_once_are_quantized_as_defined() -> None:
    for rows in (4095, 4096, 4097, 8193):
        assert_as_defined(gaussian(rows, 3, seed=rows))


def test_a_transposed_weight_is_quantized_by_its_own_rows() -> None:
    stored = gaussian(40, 30)  # As GPT-2's Conv1D: [in, out].
    layer = quantize_int8(torch.from_numpy(stored).t())
    integers, scales = by_definition(np.ascontiguousarray(stored.T))
    assert (layer.out_features, layer.in_features) == (30, 40)
    assert np.array_equal(layer.integers.numpy(), integers)
    assert layer.scales.tobytes() == scales.tobytes()


def test_quantizing_leaves_the_weight_as_it_was() -> None:
    weight = torch.from_numpy(gaussian(20, 10))
    before = weight.clone()
    quantize_int8(weight)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("row", [0, 4096, 5000])
def test_a_weight_that_is_not_finite_is_refused(value: float, row: int) -> None:
    weight = gaussian(5001, 3)
    weight[row, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        quantize_int8(torch.from_numpy(weight))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_an_empty_weight_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="empty"):
        quantize_int8(torch.empty(shape))


def test_a_parameter_that_needs_gradients_is_quantized_like_its_values() -> None:
    weight = torch.from_numpy(gaussian(20, 10))
    layer = quantize_int8(torch.nn.Parameter(weight))
    assert layer.fingerprint() == quantize_int8(weight).fingerprint()


def test_a_default_device_does_not_change_what_is_quantized() -> None:
    # transformers loads models under torch.device("meta").
    weight = torch.from_numpy(gaussian(20, 10))
    with torch.device("meta"):
        layer = quantize_int8(weight)
    assert layer.fingerprint() == quantize_int8(weight).fingerprint()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_weight_on_a_gpu_is_quantized_to_the_same_bits() -> None:
    # There, torch multiplies by the inverse of a Python number instead of dividing by it.
    weight = torch.from_numpy(gaussian(2000, 100))
    assert quantize_int8(weight.cuda()).fingerprint() == quantize_int8(weight).fingerprint()


# Fingerprints.


def layer(rows: int = 6, columns: int = 4, seed: int = 0) -> IntegerLayer:
    generator = np.random.default_rng(seed)
    integers = torch.from_numpy(generator.integers(-127, 128, (rows, columns), dtype=np.int8))
    return IntegerLayer(integers, generator.uniform(0.01, 1, rows).astype(np.float32))


def test_a_fingerprint_is_sha_256_over_scheme_shape_integers_and_scales() -> None:
    a = layer()
    data = b"int8-absmax-v1 6 4\n" + a.integers.numpy().tobytes() + a.scales.astype("<f4").tobytes()
    assert INT8.identifier == "int8-absmax-v1"
    assert a.fingerprint() == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("row", range(6))
@pytest.mark.parametrize("column", range(4))
def test_any_integer_that_changes_by_one_changes_the_fingerprint(row: int, column: int) -> None:
    a = layer()
    integers = a.integers.clone()
    integers[row, column] += 1 if integers[row, column] < 127 else -1
    assert IntegerLayer(integers, a.scales).fingerprint() != a.fingerprint()


@pytest.mark.parametrize("row", range(6))
def test_any_scale_that_changes_by_its_last_bit_changes_the_fingerprint(row: int) -> None:
    a = layer()
    scales = a.scales.copy()
    scales[row] = np.nextafter(scales[row], np.float32(2))
    assert IntegerLayer(a.integers, scales).fingerprint() != a.fingerprint()


def test_another_shape_of_the_same_bytes_has_another_fingerprint() -> None:
    # 5 + 5 * 4 scale bytes against 1 * 21 + 1 * 4: the bytes after the header can be the same.
    tall = IntegerLayer(torch.zeros((5, 1), dtype=torch.int8), np.zeros(5, np.float32))
    flat = IntegerLayer(torch.zeros((1, 21), dtype=torch.int8), np.zeros(1, np.float32))
    assert tall.integers.numel() + tall.scales.nbytes == flat.integers.numel() + flat.scales.nbytes
    assert tall.fingerprint() != flat.fingerprint()


def test_rows_or_columns_in_another_order_have_another_fingerprint() -> None:
    a = layer()
    fingerprints = {
        a.fingerprint(),
        IntegerLayer(a.integers.flip(0), a.scales).fingerprint(),
        IntegerLayer(a.integers.flip(1), a.scales).fingerprint(),
        IntegerLayer(a.integers, a.scales[::-1]).fingerprint(),
        IntegerLayer(a.integers.flip(0), a.scales[::-1]).fingerprint(),
    }
    assert len(fingerprints) == 5


def test_the_memory_layout_does_not_change_the_fingerprint() -> None:
    a = layer()
    strided = a.integers.t().contiguous().t()
    assert not strided.is_contiguous()
    assert IntegerLayer(strided, np.repeat(a.scales, 2)[::2]).fingerprint() == a.fingerprint()


def test_a_weight_in_another_precision_has_another_fingerprint() -> None:
    weight = torch.from_numpy(gaussian(20, 10))
    assert quantize_int8(weight).fingerprint() != quantize_int8(weight.bfloat16()).fingerprint()


def test_a_model_fingerprint_does_not_depend_on_the_order_of_loading() -> None:
    layers = {f"layer{i}": layer(seed=i).fingerprint() for i in range(12)}
    assert model_fingerprint(dict(reversed(layers.items()))) == model_fingerprint(layers)


def test_a_model_fingerprint_changes_with_any_name_layer_or_number_of_layers() -> None:
    a, b, c = (layer(seed=i).fingerprint() for i in range(3))
    models = [
        {}, {"x": a}, {"x": b}, {"y": a}, {"x": a, "y": b}, {"x": b, "y": a}, {"x": a, "y": a},
        {"x": a, "y": c}, {"x": a, "z": b}, {"x": a, "y": b, "z": c}, {"xy": a}, {"x y": a}, {"x ": a},
        {f"x {a}\n1 y": b}, {f"x {a}\n1 y": a},
    ]  # fmt: skip
    assert len({model_fingerprint(model) for model in models}) == len(models)


def test_a_model_fingerprint_is_the_same_in_another_process() -> None:
    # Neither hash seeds nor load order reach it.
    program = (
        "import numpy as np, torch\n"
        "from blindtune.protocol.weights import model_fingerprint, quantize_int8\n"
        "w = np.random.default_rng(0).standard_normal((20, 10)).astype(np.float32)\n"
        "a = quantize_int8(torch.from_numpy(w)).fingerprint()\n"
        "print(model_fingerprint({'b': a, 'a': a, 'c': a}))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    a = quantize_int8(torch.from_numpy(gaussian(20, 10))).fingerprint()
    assert run.stdout.strip() == model_fingerprint({"a": a, "b": a, "c": a})
