"""operand . M mod q, exactly, on hardware that multiplies int8.

A residue, centred to x in -(q-1)/2 ... (q-1)/2, is four balanced base-256 digits (limbs):

    x = d_0 + 256 d_1 + 256^2 d_2 + 256^3 d_3,      d = ((x + 128) & 255) - 128;  x = (x - d) >> 8

so operand . M is four products of int8 matrices with int32 accumulators, recombined in 64 bits and
reduced mod q. The four limbs stand on top of each other, so they are one call of ``torch._int_mm``.

``torch._int_mm`` can be silently wrong: without VNNI instructions pairs of products saturate at 16 bits,
which some extreme inputs do not show. So `exact_method` compares it with 64-bit integers, on random
and extreme inputs at every contraction length in use, before anything is served. Where it fails, one
float64 product of whole centred residues is used instead, which is exact because no partial sum
reaches 2^53: contractions have at most 2^15 terms below 2^30 * 2^7.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numba import float64, int8, uint32, uint64
from numpy.lib.stride_tricks import as_strided

from blindtune.protocol.compiled import kernel
from blindtune.protocol.expansion_probes import PROBES
from blindtune.protocol.layer_memory import joined, row_bytes
from blindtune.protocol.operands import Operand, SeededRows
from blindtune.protocol.parameters import MODULUS
from blindtune.protocol.products import MAX_CONTRACTION, Direction, Product
from blindtune.protocol.recycled import large_matrix
from blindtune.protocol.residues import Residues, add
from blindtune.protocol.row_blocks import for_row_blocks

__all__ = [
    "LIMBS",
    "FloatProduct",
    "Int8Product",
    "Method",
    "Multiplier",
    "TorchInt8Product",
    "exact_method",
    "padded_int_mm",
]

_logger = logging.getLogger(__name__)
_HALF = (MODULUS - 1) // 2
LIMBS = 4
_BYTES_OF_128 = 0x80808080
_ROWS_AT_ONCE = 1024
# Products of few rows, or of this many features, are as fast layer by layer as after layers have been copied,
# which is necessary where they are no neighbours.
_FEW_ROWS = 256
_LONG_SPAN = 4096
# Each takes up to seconds to check, and who asks chooses them.
_MOST_CHECKED_LENGTHS = 16
# Bytes that are copied for a product at most, since they may also name one layer many times.
_MOST_STACKED = 1 << 27
# int32 sums of one block of outputs on a processor: about 4 MiB. Twice that from 4096 features on, where sums
# are less of the work and limbs, which the library packs anew for each block, are more.
_SUMS_AT_ONCE = 1 << 20
_LONG_CONTRACTION = 4096
_INT32 = 4
_FLOATS_AT_ONCE = 1 << 24


class Method(ABC):
    """One way to compute operand . M mod q on one device.

    Attributes:
        name: of the method.
        expand: brings rows of a seed into the form that `multiply` takes, as `prepare` does with their
            residues; None where seeds are expanded on the host.
    """

    name: str
    expand: Callable[[SeededRows], Any] | None = None

    @abstractmethod
    def prepare(self, operand: Residues) -> Any:
        """Brings an operand, uint32 [rows, contraction], into the form that `multiply` takes."""

    @abstractmethod
    def multiply(self, prepared: Any, matrix: torch.Tensor) -> Residues:
        """The product mod q.

        Args:
            prepared: from `prepare`.
            matrix: int8 [contraction, outputs], of any strides, on the method's device.

        Returns:
            uint32 [rows, outputs].
        """

    def multiply_into(
        self, out: Residues, column: int, prepared: Any, *matrices: torch.Tensor, adding: bool = False
    ) -> None:
        """Writes the product mod q into ``out`` from ``column`` on, or adds it to what is there.

        Args:
            out: uint32 [rows, column + outputs or more], contiguous.
            column: where the product's first column goes.
            prepared: from `prepare`.
            matrices: int8 [features, outputs], of any strides, on the method's device; they stand on top of
                each other, and have as many features together as the operand has columns.
            adding: whether the product is added, mod q, to the residues there.
        """
        product = self.multiply(prepared, matrices[0] if len(matrices) == 1 else torch.cat(matrices))
        target = out[:, column : column + product.shape[1]]
        np.copyto(target, add(target, product) if adding else product)


@kernel
def _split(operand, columns, limbs, start, stop):  # type: ignore[no-untyped-def]
    for r in range(start, stop):
        row = operand[r]
        limb0, limb1, limb2, limb3 = limbs[r, 0], limbs[r, 1], limbs[r, 2], limbs[r, 3]
        for i in range(columns):
            value = row[i]
            x = uint32(value - uint32(MODULUS)) if value > uint32(_HALF) else value
            # Adding 128 to every byte carries just where a digit below is negative, so that each byte then
            # holds its digit plus 128, and flipping the byte's top bit takes the 128 off again.
            x = uint32(uint32(x + uint32(_BYTES_OF_128)) ^ uint32(_BYTES_OF_128))
            limb0[i] = int8(x)
            limb1[i] = int8(uint32(x >> uint32(8)))
            limb2[i] = int8(uint32(x >> uint32(16)))
            limb3[i] = int8(uint32(x >> uint32(24)))


@kernel
def _recombine(sums, out, column, adding, start, stop):  # type: ignore[no-untyped-def]
    for r in range(start, stop):
        sums0, sums1, sums2, sums3 = sums[r, 0], sums[r, 1], sums[r, 2], sums[r, 3]
        for j in range(sums0.shape[0]):
            at = uint64(uint64(column) + uint64(j))  # unsigned: else numba looks out for negative indices
            # All of these are integers below 2^53, so float64 holds them exactly, and unlike 64-bit integers
            # it has a vector instruction for each step.
            value = (
                float64(sums0[j])
                + 256.0 * float64(sums1[j])
                + 65536.0 * float64(sums2[j])
                + 16777216.0 * float64(sums3[j])
            )
            if adding:
                value += float64(out[r, at])
            # value / q is below 2^22 and comes out with an error below 2^-29. Less 2^-24, its floor is never
            # too high, and too low by one only if the remainder is below 2^-23 q: q + 256 fits 31 bits.
            quotient = np.floor(value * (1.0 / MODULUS) - 2.0**-24)
            remainder = uint32(np.int32(value - quotient * float64(MODULUS)))
            # A remainder below q wraps around here to something larger.
            out[r, at] = min(remainder, uint32(remainder - uint32(MODULUS)))


def padded_int_mm(limbs: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """`torch._int_mm` with zeros added to a matrix whose sides are no multiples of 8, as CUDA wants them.

    Args:
        limbs: int8 [m, k rounded up to a multiple of 8].
        matrix: int8 [k, n].

    Returns:
        int32 [m, n rounded up to a multiple of 8].
    """
    contraction, outputs = matrix.shape
    padding = (0, -outputs % 8, 0, -contraction % 8)
    return torch._int_mm(limbs, torch.nn.functional.pad(matrix, padding) if any(padding) else matrix)


def _stacked(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Matrices on top of each other, int8 [features, outputs], copied if there are several."""
    if len(matrices) == 1:
        return matrices[0]
    outputs = matrices[0].shape[1]
    features = sum(len(matrix) for matrix in matrices)
    stack = torch.from_numpy(large_matrix(features, row_bytes(outputs), np.int8))[:, :outputs]
    return torch.cat(list(matrices), out=stack)


class Int8Product(Method):
    """Four int8 products on the processor.

    The sums of all outputs would be several times as large as operand and result, and writing them to memory
    and reading them back would cost more than recombining them. So outputs are computed in blocks of columns
    whose sums stay in the processor's caches.
    """

    name = "int8"

    def prepare(self, operand: Residues) -> torch.Tensor:
        rows, columns = operand.shape
        limbs = large_matrix(rows * LIMBS, row_bytes(columns), np.int8).reshape(rows, LIMBS, -1)
        if operand.strides[0] < operand.itemsize * columns or operand.strides[1] != operand.itemsize:
            operand = operand.copy()  # of a single row, ascontiguousarray would keep any strides
        # Columns of a wider matrix are read where they lie, from rows of which only so many count.
        wide = as_strided(
            operand, (rows, operand.strides[0] // operand.itemsize), operand.strides, writeable=False
        )
        for_row_blocks(rows, columns, lambda a, b: _split(wide, columns, limbs, a, b))
        return torch.from_numpy(limbs)[:, :, :columns]

    def multiply(self, prepared: Any, matrix: torch.Tensor) -> Residues:
        out = large_matrix(len(prepared), matrix.shape[1], np.uint32)
        self.multiply_into(out, 0, prepared, matrix)
        return out

    def multiply_into(
        self, out: Residues, column: int, prepared: Any, *matrices: torch.Tensor, adding: bool = False
    ) -> None:
        rows, _, contraction = prepared.shape
        limbs = prepared.view(rows * LIMBS, contraction)
        matrix = _stacked(matrices)
        outputs = matrix.shape[1]
        most = _SUMS_AT_ONCE if contraction < _LONG_CONTRACTION else 2 * _SUMS_AT_ONCE
        step = min(outputs, row_bytes(_INT32 * most // (rows * LIMBS)) // _INT32)
        buffer = large_matrix(1, rows * LIMBS * step, np.int32)[0]
        for start in range(0, outputs, step):
            stop = min(start + step, outputs)
            sums = buffer[: rows * LIMBS * (stop - start)].reshape(rows, LIMBS, stop - start)
            torch._int_mm(limbs, matrix[:, start:stop], out=torch.from_numpy(sums).view(len(limbs), -1))
            recombine = partial(_recombine, sums, out, column + start, adding)
            for_row_blocks(rows, LIMBS * (stop - start), recombine)


class TorchInt8Product(Method):
    """Four int8 products in torch operations, for CUDA devices without Triton (it runs anywhere).

    The int8 product on CUDA takes more than 16 rows, in some layouts only multiples of 32, and contraction
    and outputs that are multiples of 8: operands and matrices are padded with zeros, which add nothing to
    any sum.
    """

    name = "int8-torch"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def prepare(self, operand: Residues) -> tuple[torch.Tensor, int]:
        rows = operand.shape[0]
        x = torch.from_numpy(operand.view(np.int32)).to(self.device)
        x = torch.where(x > _HALF, x - MODULUS, x)
        padding = (0, -x.shape[1] % 8, 0, -rows % 8)  # four limbs make 32 of 8
        limbs = []
        for _ in range(LIMBS):
            digit = ((x + 128) & 255) - 128
            limbs.append(torch.nn.functional.pad(digit.to(torch.int8), padding))
            x = (x - digit) >> 8
        return torch.cat(limbs), rows

    def multiply(self, prepared: Any, matrix: torch.Tensor) -> Residues:
        limbs, rows = prepared
        outputs = matrix.shape[1]
        sums = padded_int_mm(limbs, matrix)
        sums = sums.view(LIMBS, -1, sums.shape[1])[:, :rows, :outputs]
        total = torch.zeros((rows, outputs), dtype=torch.int64, device=sums.device)
        for k in reversed(range(LIMBS)):
            total = (total << 8) + sums[k]
        return torch.remainder(total, MODULUS).cpu().numpy().astype(np.uint32)


class FloatProduct(Method):
    """One float64 product of centred residues: slower, exact on every processor and GPU."""

    name = "float64"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def prepare(self, operand: Residues) -> torch.Tensor:
        x = torch.from_numpy(operand.astype(np.float64)).to(self.device)
        return torch.where(x > _HALF, x - MODULUS, x)

    def multiply(self, prepared: Any, matrix: torch.Tensor) -> Residues:
        out = np.empty((prepared.shape[0], matrix.shape[1]), np.uint32)
        step = max(1, _FLOATS_AT_ONCE // matrix.shape[0])
        for start in range(0, matrix.shape[1], step):
            columns = matrix[:, start : start + step].to(torch.float64)
            product = (prepared @ columns).to(torch.int64)
            out[:, start : start + step] = torch.remainder(product, MODULUS).cpu().numpy()
        return out


def _test_operands(rows: int, contraction: int, generator: np.random.Generator) -> Iterable[Residues]:
    """Random residues; the largest and smallest centred ones; and limbs that are all -128 or 127."""
    yield generator.integers(0, MODULUS, (rows, contraction), dtype=np.uint32)
    yield np.where(generator.integers(0, 2, (rows, contraction)) == 1, _HALF, _HALF + 1).astype(np.uint32)
    for limb, top in ((-128, -63), (127, 63)):
        # Three full limbs and a fourth that keeps the value inside the centred range.
        value = limb * (1 + 256 + 65536) + top * 256**3
        yield np.full((rows, contraction), value % MODULUS, np.uint32)


def _layouts(matrix: torch.Tensor, device: torch.device) -> Iterable[torch.Tensor]:
    """A matrix [contraction, outputs] as layers store it: whole, transposed, and as a span of either."""
    rows, columns = matrix.shape
    wide = torch.zeros((rows + 16, columns + 16), dtype=torch.int8)
    wide[8 : 8 + rows, 8 : 8 + columns] = matrix
    for stored, view in (
        (matrix, lambda m: m),
        (matrix.t().contiguous(), lambda m: m.t()),
        (wide, lambda m: m[8 : 8 + rows, 8 : 8 + columns]),
        (wide.t().contiguous(), lambda m: m.t()[8 : 8 + rows, 8 : 8 + columns]),
    ):
        yield view(stored.to(device))


def _is_exact(method: Method, contraction: int, device: torch.device) -> bool:
    """Compares a method with products in 64-bit integers at one contraction length.

    All memory layouts in use are tried, few and many rows, and few and many outputs, since libraries
    choose their kernels by shape. The inputs are fixed: they are public, and a failure must be
    repeatable.
    """
    generator = np.random.default_rng(contraction)
    for rows, outputs, repeats in ((1, 264, 1), (17, 24, 1), (5, 40, 1), (17, 24, 16)):
        matrices = [
            generator.integers(-127, 128, (contraction, outputs), dtype=np.int8),
            np.where(generator.integers(0, 2, (contraction, outputs)) == 1, 127, -127).astype(np.int8),
            np.full((contraction, outputs), 127, np.int8),
        ]
        for operand in _test_operands(rows, contraction, generator):
            centred = torch.from_numpy(operand.astype(np.int64))
            centred[centred > _HALF] -= MODULUS
            prepared = method.prepare(np.tile(operand, (repeats, 1)))
            for matrix in map(torch.from_numpy, matrices):
                # |sum| < 2^30 * 2^7 * 2^15: the product in int64 is exact.
                expected = torch.remainder(centred @ matrix.to(torch.int64), MODULUS).tile(repeats, 1)
                for layout in _layouts(matrix, device):
                    answer = method.multiply(prepared, layout).astype(np.int64)
                    if not np.array_equal(answer, expected.numpy()):
                        return False
    return True


def exact_method(
    contractions: Iterable[int],
    device: torch.device | str = "cpu",
    log: Callable[[str], None] = _logger.warning,
) -> Method:
    """The fastest method on a device that is exact at all of these contraction lengths.

    Args:
        contractions: every contraction length that will be multiplied, each at most MAX_CONTRACTION.
        device: where the matrices lie.
        log: told when the int8 product is not exact here, and what is used instead.

    Raises:
        RuntimeError: no method is exact, which means broken hardware or libraries.
    """
    device = torch.device(device)
    lengths = sorted(set(contractions))
    if not lengths:
        raise ValueError("there is no contraction length to check a method at")
    if lengths[-1] > MAX_CONTRACTION:
        raise ValueError(f"a contraction of {lengths[-1]} must be cut into spans of {MAX_CONTRACTION}")
    for method in (*_int8_methods(device), FloatProduct(device)):
        try:
            wrong = next((n for n in lengths if not _is_exact(method, n, device)), None)
            reason = f"is not exact at contraction length {wrong}" if wrong else None
        except torch.OutOfMemoryError:
            raise  # a slower method would need more
        except (RuntimeError, AttributeError) as error:
            reason = f"does not run ({error})"
        if reason is None:
            _expand_on_host_unless_exact(method, device, log)
            return method
        log(f"the {method.name} product on {device} {reason}; trying a slower exact method")
    raise RuntimeError(f"no exact modular product on {device}: the hardware or its libraries are faulty")


def _expand_on_host_unless_exact(method: Method, device: torch.device, log: Callable[[str], None]) -> None:
    """Compares a method's expansion of seeds with the host's, through products with unit matrices."""
    expand = method.expand
    if expand is None:
        return
    reason = None
    try:
        for rows in PROBES:
            unit = torch.eye(rows.columns, dtype=torch.int8, device=device)
            if not np.array_equal(method.multiply(expand(rows), unit), rows.residues()):
                reason = f"differs from the host's in the rows from {rows.seed.row_offset} on"
                break
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler's errors have no class in common
        reason = f"does not run ({(str(error) or type(error).__name__).splitlines()[0]})"
    if reason is not None:
        log(f"the {method.name} product's expansion of seeds on {device} {reason}; the host expands them")
        method.expand = None


def _int8_methods(device: torch.device) -> list[Method]:
    """The ways to multiply int8 on a device, the fastest first."""
    if device.type == "cpu":
        return [Int8Product()]
    methods: list[Method] = [TorchInt8Product(device)]
    if find_spec("triton"):
        from blindtune.protocol.cuda_product import TritonInt8Product

        methods.insert(0, TritonInt8Product(device))
    return methods


class Multiplier:
    """Multiplies operands by products of a set of layers.

    It trusts its method: the layers' contraction lengths are those the method was checked at. Where it is
    faster to multiply several layers as one, it first checks the method at their length together.

    Args:
        layers: int8 [out, in] of each layer, on the method's device.
        method: from `exact_method`.
    """

    def __init__(self, layers: Mapping[str, torch.Tensor], method: Method) -> None:
        self._layers = layers
        self.method = method
        self._exact_at: dict[int, bool] = {}

    def outputs(self, product: Product) -> int:
        """Columns of the result.

        Raises:
            KeyError: a layer is not held.
            ValueError: a span does not fit its layer, or the spans do not fit together.
        """
        forward = product.direction is Direction.FORWARD
        if not product.spans:
            raise ValueError("a product names no layers")
        widths = []
        for span in product.spans:
            out_features, in_features = self._layers[span.layer].shape
            contraction, width = (in_features, out_features) if forward else (out_features, in_features)
            if not 0 <= span.start < span.stop <= contraction:
                raise ValueError(
                    f"span {span.start}:{span.stop} does not lie within the {contraction} "
                    f"{'input' if forward else 'output'} features of layer {span.layer}"
                )
            if len(span) > MAX_CONTRACTION:
                raise ValueError(f"a span has {len(span)} features, more than {MAX_CONTRACTION}")
            widths.append(width)
        same = {(s.start, s.stop) for s in product.spans} if forward else set(widths)
        if len(same) > 1:
            raise ValueError("the layers of a product do not read the same features")
        return sum(widths) if forward else widths[0]

    def multiply(self, product: Product, operand: Operand) -> Residues:
        """operand . M mod q, for the product's matrix M.

        Args:
            operand: uint32 [rows, product.contraction], all below q; or rows of a seed, of that shape.

        Returns:
            uint32 [rows, outputs].
        """
        outputs = self.outputs(product)
        if operand.shape[1] != product.contraction:
            raise ValueError(f"the operand has {operand.shape[1]} columns, not {product.contraction}")
        matrices = self._matrices(product)
        if len(matrices) == 1 and 0 < len(operand) <= _ROWS_AT_ONCE:
            return self.method.multiply(self._prepared(operand), matrices[0])
        out = large_matrix(len(operand), outputs, np.uint32)
        for start in range(0, len(operand), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            self._multiply_rows(product.direction, matrices, operand[rows], out[rows])
        return out

    def _matrices(self, product: Product) -> list[torch.Tensor]:
        """The product's matrix in parts, int8 [features, outputs]: one for each span, or one for all.

        Backward, neighbours are one contraction only where that is exact.
        """
        spans = [(self._layers[span.layer], slice(span.start, span.stop)) for span in product.spans]
        if product.direction is Direction.FORWARD:
            return [part.t() for part in joined([layer[:, features] for layer, features in spans])]
        parts = [layer[features] for layer, features in spans]
        together = joined(parts)
        return together if len(together) == len(parts) or self._is_exact_as_one(parts) else parts

    def _prepared(self, operand: Operand) -> Any:
        if not isinstance(operand, SeededRows):
            return self.method.prepare(operand)
        if self.method.expand is None:
            return self.method.prepare(operand.residues())
        return self.method.expand(operand)

    def _multiply_rows(
        self, direction: Direction, matrices: list[torch.Tensor], operand: Operand, out: Residues
    ) -> None:
        if isinstance(operand, SeededRows) and self.method.expand is None:
            operand = operand.residues()  # once for all layers
        if direction is Direction.FORWARD:
            prepared = self._prepared(operand)
            column = 0
            for matrix in matrices:
                self.method.multiply_into(out, column, prepared, matrix)
                column += matrix.shape[1]
        elif len(matrices) == 1 or (len(operand) >= _FEW_ROWS and self._should_stack(matrices)):
            self.method.multiply_into(out, 0, self._prepared(operand), *matrices)
        else:
            column = 0
            for index, matrix in enumerate(matrices):
                prepared = self._prepared(operand[:, column : column + len(matrix)])
                self.method.multiply_into(out, 0, prepared, matrix, adding=index > 0)
                column += len(matrix)

    def _should_stack(self, matrices: list[torch.Tensor]) -> bool:
        """Whether matrices are faster as one contraction although they must be copied for it, and exact."""
        if min(map(len, matrices)) >= _LONG_SPAN or sum(map(torch.numel, matrices)) > _MOST_STACKED:
            return False
        return self._is_exact_as_one(matrices)

    def _is_exact_as_one(self, matrices: list[torch.Tensor]) -> bool:
        """Whether the method is exact at the length of all of them together, checked the first time."""
        length = sum(map(len, matrices))
        if length > MAX_CONTRACTION:
            return False
        if length not in self._exact_at:
            if len(self._exact_at) >= _MOST_CHECKED_LENGTHS:
                return False
            try:
                self._exact_at[length] = _is_exact(self.method, length, matrices[0].device)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # the library refuses that length; layer by layer, it was seen to run
                self._exact_at[length] = False
        return self._exact_at[length]
