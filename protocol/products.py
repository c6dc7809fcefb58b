"""What a worker multiplies by: spans of frozen layers, in one direction.

A layer with integer weights W [out, in] serves two products:

    forward    operand [rows, in]  -> operand . W^T  [rows, out]
    backward   operand [rows, out] -> operand . W    [rows, in]

Layers that read the same tensor form a group. Forward, one operand meets all of them and the outputs
stand side by side. Backward, their output gradients stand side by side in one operand and the
input gradients add up:

    forward    M = [ W_1^T | W_2^T | ... ]         backward   M = [ W_1 ; W_2 ; ... ]

A contraction longer than ``MAX_CONTRACTION`` is cut into spans, each part of another product with its
own scale, and the client adds the results. That keeps int32 accumulators far from overflow (it takes
about 132,000 terms), keeps a float64 product of whole residues exact (2^30 * 2^7 * 2^15 < 2^53), and
buys precision.
"""

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = [
    "DIFFUSED_CONTRACTION",
    "MAX_CONTRACTION",
    "Direction",
    "Product",
    "Span",
    "backward_products",
    "contraction_lengths",
    "forward_products",
]

MAX_CONTRACTION = 32_768

DIFFUSED_CONTRACTION = 4_096
"""Columns from which on rows of gradients are rounded with their error diffused."""


class Direction(enum.IntEnum):
    """Which way a product goes; the values are those of the wire format."""

    FORWARD = 1
    BACKWARD = 2


@dataclass(frozen=True, slots=True)
class Span:
    """The part ``start ... stop - 1`` of a layer's contraction dimension.

    That is a range of input features forward, and of output features backward.
    """

    layer: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Product:
    """The matrix of one multiplication.

    Forward, all spans cover the same input features, and their outputs are concatenated in order.
    Backward, the operand's columns are those of the spans in order, and the results are added.
    """

    direction: Direction
    spans: tuple[Span, ...]

    def __post_init__(self) -> None:
        # Verification vectors belong to a layer: of two equal ones, errors could cancel.
        if self.direction is Direction.FORWARD and len({s.layer for s in self.spans}) < len(self.spans):
            raise ValueError("a forward product names a layer twice")

    @property
    def contraction(self) -> int:
        """Columns of the operand."""
        if self.direction is Direction.FORWARD:
            return len(self.spans[0])
        return sum(len(span) for span in self.spans)

    @property
    def diffused(self) -> bool:
        """Whether its operands are rounded with the error diffused; see `fixed_point`.

        Of many columns of a gradient most may be far below their row's step, and all of one sign, as the
        small probabilities of a softmax are. Only public facts decide.
        """
        return self.direction is Direction.BACKWARD and self.contraction >= DIFFUSED_CONTRACTION

    @property
    def label(self) -> str:
        """A string that no other product shares, for key derivation and messages."""
        spans = " ".join(f"{s.layer!r}[{s.start}:{s.stop}]" for s in self.spans)
        return f"{self.direction.name.lower()} {spans}"


def _cuts(length: int) -> list[tuple[int, int]]:
    """The spans of a dimension: as few as possible, none longer than MAX_CONTRACTION."""
    return [(start, min(start + MAX_CONTRACTION, length)) for start in range(0, length, MAX_CONTRACTION)]


def forward_products(layers: Sequence[str], in_features: int) -> list[Product]:
    """The forward products of a group; their results, rescaled, add up to the group's outputs."""
    return [
        Product(Direction.FORWARD, tuple(Span(name, start, stop) for name in layers))
        for start, stop in _cuts(in_features)
    ]


def contraction_lengths(shapes: Iterable[tuple[int, int]]) -> frozenset[int]:
    """The lengths of all spans that layers of these shapes are cut into, in both directions."""
    return frozenset(
        stop - start for shape in shapes for features in shape for start, stop in _cuts(features)
    )


def backward_products(layers: Iterable[tuple[str, int]]) -> list[Product]:
    """The backward products of a group; their results, rescaled, add up to the input gradient.

    Args:
        layers: name and out_features of each layer, in the group's order.
    """
    products: list[list[Span]] = []
    room = 0
    for name, out_features in layers:
        for start, stop in _cuts(out_features):
            if stop - start > room:
                products.append([])
                room = MAX_CONTRACTION
            products[-1].append(Span(name, start, stop))
            room -= stop - start
    return [Product(Direction.BACKWARD, tuple(spans)) for spans in products]
