"""operand . M mod q for products of layers: in blocks of rows, and layer by layer or as one matrix."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from blindtune.protocol.kernels.recycled import large_matrix
from blindtune.protocol.multiplication.exactness import is_exact
from blindtune.protocol.multiplication.four_bit_matrix import FourBitMatrix
from blindtune.protocol.multiplication.layer_memory import joined
from blindtune.protocol.multiplication.methods import Method
from blindtune.protocol.operands import Operand, SeededRows
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.products import MAX_CONTRACTION, Direction, Product
from blindtune.protocol.residues import Residues

__all__ = ["Layer", "Multiplier"]

Layer = torch.Tensor | FourBitMatrix
"""int8 [out, in], as it is or as codes."""

_ROWS_AT_ONCE = 1024
# Products of few rows, or of this many features, are as fast layer by layer as after layers have been copied,
# which is necessary where they are no neighbours.
_FEW_ROWS = 256
_LONG_SPAN = 4096
# Each takes up to seconds to check, and who asks chooses them.
_MOST_CHECKED_LENGTHS = 16
# Bytes that are copied for a product at most, since they may also name one layer many times.
_MOST_STACKED = 1 << 27


class Multiplier:
    """Multiplies operands by products of a set of layers.

    It trusts its methods: the layers' contraction lengths are those the methods were checked at. Where it is
    faster to multiply several layers as one, it first checks a method at their length together.

    Args:
        layers: int8 [out, in] of each layer, on the methods' device, or the codes that it is kept as.
        methods: from `exact_method`, one for each parameter set that is served.
    """

    def __init__(self, layers: Mapping[str, Layer], *methods: Method) -> None:
        self._layers = layers
        self.methods = {method.parameters.name: method for method in methods}
        self._exact_at: dict[tuple[str, int], bool] = {}

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

    def multiply(self, product: Product, operand: Operand, parameters: ParameterSet) -> Residues:
        """operand . M mod q, for the product's matrix M.

        Args:
            operand: uint32 [rows, product.contraction], all below q; or rows of a seed, of that shape.
            parameters: of the residues, one of those that there is a method for.

        Returns:
            uint32 [rows, outputs].
        """
        outputs, method = self.outputs(product), self.methods[parameters.name]
        if isinstance(operand, SeededRows) and operand.seed.parameters.name != parameters.name:
            raise ValueError(f"the seed is one of {operand.seed.parameters.name}, not of {parameters.name}")
        if operand.shape[1] != product.contraction:
            raise ValueError(f"the operand has {operand.shape[1]} columns, not {product.contraction}")
        in_pieces = any(isinstance(self._layers[x.layer], FourBitMatrix) for x in product.spans)
        matrices = [] if in_pieces else self._matrices(product, method)
        if len(matrices) == 1 and 0 < len(operand) <= _ROWS_AT_ONCE:
            return method.multiply(_prepared(operand, method), matrices[0])
        out = large_matrix(len(operand), outputs, np.uint32)
        for start in range(0, len(operand), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            if in_pieces:
                self._multiply_pieces(product, operand[rows], method, out[rows])
            else:
                self._multiply_rows(product.direction, matrices, operand[rows], method, out[rows])
        return out

    def _matrices(self, product: Product, method: Method) -> list[torch.Tensor]:
        """The product's matrix in parts, int8 [features, outputs]: one for each span, or one for all.

        Backward, neighbours are one contraction only where that is exact.
        """
        spans = [(_whole(self._layers[x.layer]), slice(x.start, x.stop)) for x in product.spans]
        if product.direction is Direction.FORWARD:
            return [part.t() for part in joined([layer[:, features] for layer, features in spans])]
        parts = [layer[features] for layer, features in spans]
        together = joined(parts)
        return together if len(together) == len(parts) or self._is_exact_as_one(parts, method) else parts

    def _multiply_rows(
        self,
        direction: Direction,
        matrices: list[torch.Tensor],
        operand: Operand,
        method: Method,
        out: Residues,
    ) -> None:
        if isinstance(operand, SeededRows) and method.expand is None:
            operand = operand.residues()  # once for all layers
        if direction is Direction.FORWARD:
            prepared = _prepared(operand, method)
            column = 0
            for matrix in matrices:
                method.multiply_into(out, column, prepared, matrix)
                column += matrix.shape[1]
        elif len(matrices) == 1 or (len(operand) >= _FEW_ROWS and self._should_stack(matrices, method)):
            method.multiply_into(out, 0, _prepared(operand, method), *matrices)
        else:
            column = 0
            for index, matrix in enumerate(matrices):
                prepared = _prepared(operand[:, column : column + len(matrix)], method)
                method.multiply_into(out, 0, prepared, matrix, adding=index > 0)
                column += len(matrix)

    def _multiply_pieces(self, product: Product, operand: Operand, method: Method, out: Residues) -> None:
        """As `_multiply_rows`, of matrices that are made piece by piece."""
        if isinstance(operand, SeededRows) and method.expand is None:
            operand = operand.residues()
        forward, column = product.direction is Direction.FORWARD, 0
        prepared = _prepared(operand, method) if forward else None
        for index, span in enumerate(product.spans):
            layer, features = self._layers[span.layer], slice(span.start, span.stop)
            if not forward:
                prepared = _prepared(operand[:, column : column + len(span)], method)
            outputs = layer.shape[0 if forward else 1]
            pieces = [slice(0, outputs)]
            if isinstance(layer, FourBitMatrix):
                pieces = list(layer.pieces(outputs, len(span)))
            for some in pieces:
                rows, columns = (some, features) if forward else (features, some)
                if isinstance(layer, FourBitMatrix):
                    matrix = layer.integers(rows, columns)
                else:
                    matrix = layer[rows, columns]
                matrix, first = (matrix.t(), column + some.start) if forward else (matrix, some.start)
                method.multiply_into(out, first, prepared, matrix, adding=not forward and index > 0)
            column += outputs if forward else len(span)

    def _should_stack(self, matrices: list[torch.Tensor], method: Method) -> bool:
        """Whether matrices are faster as one contraction although they must be copied for it, and exact."""
        if min(map(len, matrices)) >= _LONG_SPAN or sum(map(torch.numel, matrices)) > _MOST_STACKED:
            return False
        return self._is_exact_as_one(matrices, method)

    def _is_exact_as_one(self, matrices: list[torch.Tensor], method: Method) -> bool:
        """Whether the method is exact at the length of all of them together, checked the first time."""
        length = sum(map(len, matrices))
        if length > MAX_CONTRACTION:
            return False
        key = method.parameters.name, length
        if key not in self._exact_at:
            if len(self._exact_at) >= _MOST_CHECKED_LENGTHS:
                return False
            try:
                self._exact_at[key] = is_exact(method, length, matrices[0].device)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # the library refuses that length; layer by layer, it was seen to run
                self._exact_at[key] = False
        return self._exact_at[key]


def _whole(layer: Layer) -> torch.Tensor:
    if isinstance(layer, FourBitMatrix):
        raise TypeError("a layer of four-bit codes is no int8 matrix")
    return layer


def _prepared(operand: Operand, method: Method) -> Any:
    if not isinstance(operand, SeededRows):
        return method.prepare(operand)
    if method.expand is None:
        return method.prepare(operand.residues())
    return method.expand(operand)
