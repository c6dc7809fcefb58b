"""One layer group's products, from floating point to floating point.

    forward    y_j = (x M)_j * s_j / a_t            for each row x_t and output feature j
    backward   g   = (sum over layers of (s g_out)) M / a_t

with integers M, the layers' scales s, and one scale a_t for each row and product. The scales never leave
this module's caller: workers see integers under a mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from blindtune.client.kit.kit import Kit
from blindtune.client.rounds.multiplier import PrivateMultiplier
from blindtune.protocol.fixed_point import square_budget
from blindtune.protocol.products import Product, backward_products, forward_products

__all__ = ["LayerGroup"]

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class _BoundedProduct:
    product: Product
    budget: int | None  # that of certified parameter sets follows from recent results


class LayerGroup:
    """Frozen layers that read the same tensor.

    Args:
        names: of the layers.
        kit: what is known of them.
        multiplier: multiplies integers.
    """

    def __init__(self, names: Sequence[str], kit: Kit, multiplier: PrivateMultiplier) -> None:
        self.names = tuple(names)
        self._multiplier = multiplier
        layers = [kit.layers[name] for name in names]
        self.in_features = layers[0].in_features
        self.out_features = [layer.out_features for layer in layers]
        self._scales = np.concatenate([kit.scales(name) for name in names])

        def bounded(product: Product) -> _BoundedProduct:
            parameters = multiplier.source.parameters
            if parameters.certified:
                return _BoundedProduct(product, None)
            noise = multiplier.source.noise(kit.column_absolute_sum(product))
            return _BoundedProduct(product, square_budget(parameters, kit.column_square_sum(product), noise))

        self._forward = [bounded(x) for x in forward_products(names, self.in_features)]
        sizes = zip(names, self.out_features, strict=True)
        self._backward = [bounded(x) for x in backward_products(sizes)]

    @property
    def products(self) -> list[Product]:
        """Everything that the group asks for."""
        return [step.product for step in (*self._forward, *self._backward)]

    def forward(self, x: Float32, counted: bool = True) -> list[Float32]:
        """x W^T for each layer.

        Args:
            x: float32 [rows, in_features].
            counted: as for `PrivateMultiplier.multiply_certified`.

        Returns:
            float32 [rows, out_features] for each layer, in order.
        """
        parts = []
        for step in self._forward:
            span = step.product.spans[0]
            part = np.ascontiguousarray(x[:, span.start : span.stop])
            parts.append(self._multiply(part, step, None, self._scales, counted))
        return np.split(reduce(np.add, parts), np.cumsum(self.out_features)[:-1], axis=1)

    def backward(self, gradients: Sequence[Float32 | None]) -> Float32:
        """The gradient of the input: the sum of g W over the layers.

        Args:
            gradients: float32 [rows, out_features] for each layer; None stands for zeros.

        Returns:
            float32 [rows, in_features].
        """
        rows = next(len(g) for g in gradients if g is not None)
        stacked = np.concatenate(
            [
                np.zeros((rows, width), np.float32) if g is None else g
                for g, width in zip(gradients, self.out_features, strict=True)
            ],
            axis=1,
        )
        parts = []
        column = 0
        for step in self._backward:
            columns = slice(column, column + step.product.contraction)
            column = columns.stop
            part = np.ascontiguousarray(stacked[:, columns])
            parts.append(self._multiply(part, step, self._scales[columns], None))
        return reduce(np.add, parts)

    def _multiply(
        self,
        x: Float32,
        step: _BoundedProduct,
        operand_scale: Float32 | None,
        output_scale: Float32 | None,
        counted: bool = True,
    ) -> Float32:
        if step.budget is None:
            return self._multiplier.multiply_certified(x, step.product, operand_scale, output_scale, counted)
        return self._multiplier.multiply_reals(x, step.product, step.budget, operand_scale, output_scale)
