"""Every response is checked before it is unmasked (Freivalds 1977).

For a product with matrix M the client knows secret vectors s, uniform mod q, and v = M s mod q. A
response Y to the operand C is accepted when every row satisfies

    C_t . v  =  Y_t . s   (mod q)

A row that is not C_t M passes with probability 1/q for each vector, because s is uniform and unknown to
the worker. Everyday answers are checked with one vector for `q31` and two for `q24`, hints with one more.
The check needs only what that one operator saw, so whether it passes says nothing about the data; and one
rejection excludes at most 1/q of the candidates for s, so s serves again.

s is expanded from the kit's secret: forward one vector for each layer (outputs of a group stand side by
side: if two layers had one vector, their outputs could be swapped unseen), backward one for all layers
(input gradients of a group add up). v is computed once, in a pass over the client's own copy of
the public checkpoint.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numba import uint32
from numpy.typing import NDArray

from blindtune.errors import VerificationError
from blindtune.protocol.expansion import derive_key, expand
from blindtune.protocol.kernels.compiled import kernel
from blindtune.protocol.kernels.row_blocks import READ, for_rows_in_turn
from blindtune.protocol.kernels.shared_rows import rows_at_once, take
from blindtune.protocol.kernels.vectors import AHEAD, LANES, greatest, load, prefetch, repeated, store
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.products import Direction
from blindtune.protocol.residues import Residues, dot

__all__ = ["CheckVectors", "check_vectors", "secret_vectors"]


def secret_vectors(
    secret: bytes, layer: str, direction: Direction, features: int, parameters: ParameterSet
) -> Residues:
    """s for the outputs of a layer: uint32 [vectors for hints, features]."""
    if direction is Direction.FORWARD:
        key = derive_key(secret, "verification", parameters.name, "forward", layer)
    else:
        key = derive_key(secret, "verification", parameters.name, "backward")
    return expand(key, 0, parameters.hint_vectors, features, parameters)


def check_vectors(
    integers: torch.Tensor, s: Residues, direction: Direction, parameters: ParameterSet
) -> Residues:
    """v = M s mod q for one layer.

    Args:
        integers: int8 [out, in].
        s: uint32 [vectors, out] forward, [vectors, in] backward.
        parameters: of the residues.

    Returns:
        uint32 [vectors, in] forward, [vectors, out] backward.
    """
    weights = integers.numpy()
    if s.shape[1:] != (weights.shape[0 if direction is Direction.FORWARD else 1],):
        raise ValueError(f"vectors of shape {s.shape} do not fit a layer of shape {weights.shape}")
    matrix = weights.T if direction is Direction.FORWARD else weights
    out = np.zeros((len(s), matrix.shape[0]), np.int64)
    # Accumulating over slices of the stored rows keeps the pass sequential over W either way; terms
    # are below 2^7 * 2^31, so int64 holds 2^25 of them.
    step = max(1, (1 << 22) // weights.shape[1])
    for start in range(0, weights.shape[0], step):
        rows = weights[start : start + step]
        if direction is Direction.FORWARD:
            _accumulate(rows, s[:, start : start + step], out)
        else:
            _apply(rows, s, out[:, start : start + step])
    return (out % parameters.modulus).astype(np.uint32)


@kernel
def _accumulate(rows, s, out):  # type: ignore[no-untyped-def]
    for j in range(rows.shape[0]):
        for k in range(s.shape[0]):
            factor = np.int64(s[k, j])
            for i in range(rows.shape[1]):
                out[k, i] += factor * np.int64(rows[j, i])


@kernel
def _apply(rows, s, out):  # type: ignore[no-untyped-def]
    for j in range(rows.shape[0]):
        for k in range(s.shape[0]):
            total = np.int64(0)
            for i in range(rows.shape[1]):
                total += np.int64(s[k, i]) * np.int64(rows[j, i])
            out[k, j] = total


@kernel
def _largest(row, words):  # type: ignore[no-untyped-def]
    """The largest word of a row; ``words``, uint32 [16], are used meanwhile."""
    whole = row.shape[0] - row.shape[0] % (2 * LANES)
    of_columns = repeated(uint32(0))
    for j in range(0, whole, 2 * LANES):
        # Half of a row that is checked later; `dot` asks for the other half.
        prefetch(row, AHEAD + j // 2)
        of_columns = greatest(of_columns, greatest(load(row, j), load(row, j + LANES)))
    store(words, 0, of_columns)
    largest = words.max()
    for j in range(whole, row.shape[0]):
        largest = max(largest, row[j])
    return largest


@kernel
def _first_wrong_row(operand, v, expected, response, s, q, turn):  # type: ignore[no-untyped-def]
    """Of the rows that this thread takes; those are in order, so the least of all threads' is the first.

    With an operand, what is expected of its rows is computed first.
    """
    # Several at once, because memory is read fastest in order.
    rows, some = response.shape[0], 8 * rows_at_once(response.shape[1])
    words, later = np.empty(LANES, np.uint32), AHEAD + response.shape[1] // 2
    while True:
        start = take(turn, some)
        if start >= rows:
            return -1
        for r in range(start, min(start + some, rows)):
            if operand is not None:
                for k in range(s.shape[0]):
                    expected[k, r] = dot(operand[r], v[k], q)
            if _largest(response[r], words) >= q:
                return r
            for k in range(s.shape[0]):
                if dot(response[r], s[k], q, later) != expected[k, r]:
                    return r


@dataclass(frozen=True, eq=False)
class CheckVectors:
    """The secret vectors of one product. An integrity secret: it has no ``repr``.

    Attributes:
        s: uint32 [vectors, outputs of the product].
        v: uint32 [vectors, contraction of the product].
        parameters: of the residues.
    """

    s: Residues = field(repr=False)
    v: Residues = field(repr=False)
    parameters: ParameterSet

    def __post_init__(self) -> None:
        if not (self.s.dtype == self.v.dtype == np.uint32 and len(self.s) == len(self.v)):
            raise ValueError("s and v are uint32 matrices with as many rows as there are vectors")
        if not (self.s.flags.c_contiguous and self.v.flags.c_contiguous):
            raise ValueError("s and v lie in memory row by row")

    @property
    def everyday(self) -> Residues:
        """v of the vectors that everyday answers are checked with, uint32 [vectors, contraction]."""
        return self.v[: self.parameters.vectors]

    def verify(self, operand: Residues, response: NDArray[np.uint32], vectors: int | None = None) -> None:
        """Accepts a response, or raises.

        Args:
            operand: what the worker multiplied, uint32 [rows, contraction].
            response: what it answered, uint32 [rows, outputs].
            vectors: how many of the vectors to use, for a soundness error of q^-vectors a row; those of
                everyday unless given.

        Raises:
            VerificationError: the response has another shape or type, a word of it is not a residue, or
                a row is not the product.
            ValueError: the operand does not fit the vectors, or there are not so many.
        """
        if vectors is None:
            vectors = self.parameters.vectors
        if not 1 <= vectors <= len(self.s):
            raise ValueError(f"there are {len(self.s)} vectors to check with, not {vectors}")
        rows, contraction = operand.shape
        if contraction != self.v.shape[1] or operand.dtype != np.uint32:
            raise ValueError(f"the operand is no uint32 matrix of {self.v.shape[1]} columns")
        v = self.v[:vectors]
        expected = np.empty((vectors, rows), np.uint32)
        self._compare(np.ascontiguousarray(operand), v, expected, response)

    def verify_expected(self, expected: Residues, response: NDArray[np.uint32]) -> None:
        """Accepts a response by the first vectors, without the operand.

        Args:
            expected: C_t . v of the operand's rows, for as many vectors, uint32 [vectors, rows].
            response: what a worker answered, uint32 [rows, outputs].

        Raises:
            ValueError: those are not enough.
            VerificationError: as `verify` does.
        """
        if not self.parameters.vectors <= len(expected) <= len(self.s):
            raise ValueError(
                f"answers are checked with {self.parameters.vectors} vectors, not {len(expected)}"
            )
        self._compare(None, None, np.ascontiguousarray(expected), response)

    def _compare(
        self, operand: Residues | None, v: Residues | None, expected: Residues, response: NDArray[np.uint32]
    ) -> None:
        vectors, rows = expected.shape
        if response.dtype != np.uint32:
            raise VerificationError(f"the response has elements of type {response.dtype}, not uint32")
        shape = (rows, self.s.shape[1])
        if response.shape != shape:
            raise VerificationError(f"the response has shape {response.shape}, not {shape}")
        response, s = np.ascontiguousarray(response), self.s[:vectors]
        columns = 0 if operand is None else operand.shape[1]
        wrong: list[int] = []

        def check(turn: NDArray[np.int64]) -> None:
            row = _first_wrong_row(operand, v, expected, response, s, self.parameters.q, turn)
            if row >= 0:
                wrong.append(row)

        for_rows_in_turn(rows, columns + response.shape[1], check, READ)
        if wrong:
            raise VerificationError(f"row {min(wrong)} of {rows} is not the product that was asked for")
