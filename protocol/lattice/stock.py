"""Blocks of masks, whose 256 rows are handed out in order, each once.

A block holds what its rows can be computed from: S, transformed, and the key of E. Whole blocks of an
operand are its own. So is the block of its last rows, if what is left of that block is at most an eighth of
the operand's rows: that rest is given up. Otherwise the last rows come out of a block that is shared with
other operands of the same product, so that short operands do not pay for 256 rows. Nothing is sent but real
rows.

The inverse transform yields all 256 rows of A S and H S at once. Those of a shared block that are not handed
out yet are kept, 4 bytes an element, as long as all kept rows together fit a limit. Beyond it they are
computed again for the next operand: slower for short ones, equal in result. E is drawn for the rows of an
operand alone.

Stock lives in memory only. Rows are drawn under a lock, and a forked process draws none of its parent's.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from blindtune.protocol.expansion import KEY_BYTES, RandomBytes, derive_key
from blindtune.protocol.kernels.process import this_process
from blindtune.protocol.lattice.noise import centred_binomial
from blindtune.protocol.lattice.parameters import DEGREE, LatticeParameters
from blindtune.protocol.lattice.transform import transformed
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Centred, Residues

__all__ = ["Run", "Stock", "bounds", "shared_rows"]

_LITTLE = 8  # times the rows left over may be as many as those of the operand

Side = Literal["mask", "hint"]
"""Which product of S: A S or H S."""


def shared_rows(rows: int) -> int:
    """How many of an operand's rows, its last ones, come out of a block that serves other operands too."""
    last = rows % DEGREE
    return last if last and (DEGREE - last) * _LITTLE > rows else 0


class _Block:
    """256 rows of masks for one product, and for one operand unless it is ``shared``.

    Args:
        parameters: rank and eta.
        product: the only product that they serve.
        secret: 32 fresh bytes.
    """

    def __init__(self, parameters: LatticeParameters, product: Product, secret: bytes) -> None:
        label = "lattice", parameters.name, product.label
        s = centred_binomial(derive_key(secret, *label, "S"), 0, parameters.rank, DEGREE, parameters.eta)
        self.factors = transformed(s, parameters.residues)
        self.drawn = 0
        self.shared = False
        self.noise_key = derive_key(secret, *label, "E")
        self.eta = parameters.eta
        self._kept: dict[Side, tuple[int, Residues]] = {}

    def keep(self, side: Side, rest: Residues) -> None:
        """Keeps the last rows of a product of S."""
        if len(rest):
            self._kept[side] = DEGREE - len(rest), rest

    def kept(self, side: Side, first: int, count: int) -> Residues | None:
        """Rows ``first ... first + count - 1`` of a product of S, if they were kept."""
        start, rest = self._kept.get(side, (DEGREE, None))
        return None if rest is None or first < start else rest[first - start : first - start + count]


@dataclass(frozen=True, eq=False)
class Run:
    """Rows ``first ... first + count - 1`` of a block, for an operand's rows from ``row`` on."""

    block: _Block = field(repr=False)
    row: int
    first: int
    count: int

    @property
    def rows(self) -> slice:
        """The operand's rows."""
        return slice(self.row, self.row + self.count)

    def noise(self, out: NDArray[np.int8]) -> None:
        """Draws E for these rows into int8 [count, columns]."""
        centred_binomial(self.block.noise_key, self.first, self.count, out.shape[1], self.block.eta, out)


def bounds(runs: Sequence[Run]) -> NDArray[np.int64]:
    """Runs as kernels take them, int64 [runs, 3]: the operand's first row, the block's, and how many."""
    return np.array([(run.row, run.first, run.count) for run in runs], np.int64)


class Stock:
    """The shared blocks with rows left, one for each product.

    Args:
        parameters: of the blocks.
        random_bytes: gives each block its secret.
        kept_bytes: limit on rows computed for later operands.
    """

    def __init__(self, parameters: LatticeParameters, random_bytes: RandomBytes, kept_bytes: int) -> None:
        self._parameters = parameters
        self._random_bytes = random_bytes
        self._kept_bytes = kept_bytes
        self._kept: list[weakref.ref[Residues]] = []
        self._blocks: dict[Product, _Block] = {}
        self._lock = threading.Lock()
        self._process = this_process()

    def of_this_process(self) -> "Stock":
        """This stock, or an empty one if this one was inherited through a fork."""
        if self._process is this_process():
            return self
        return Stock(self._parameters, self._random_bytes, self._kept_bytes)

    def draw(self, product: Product, rows: int) -> list[Run]:
        """Takes rows out of the stock. Nobody else ever gets them."""
        runs: list[Run] = []
        row, own = 0, rows - shared_rows(rows)
        with self._lock:
            while row < rows:
                block = self._blocks.pop(product, None) if row >= own else None
                if block is None:
                    block = _Block(self._parameters, product, self._random_bytes(KEY_BYTES))
                run = Run(block, row, block.drawn, min(rows - row, DEGREE - block.drawn))
                block.drawn += run.count
                block.shared = row >= own
                if block.shared and block.drawn < DEGREE:
                    self._blocks[product] = block
                runs.append(run)
                row += run.count
        return runs

    def for_rows(
        self,
        side: Side,
        runs: Sequence[Run],
        columns: int,
        compute: Callable[[Centred, NDArray[np.int64], Residues], None],
        serve: Callable[[slice, Residues], None],
    ) -> None:
        """Gives each run its rows of A S or H S: those that were kept, or new ones.

        Args:
            side: "mask" for A S, "hint" for H S.
            runs: from `draw`.
            columns: of A S or H S.
            compute: called with factors, runs and rest as `mask_rows` and `unmask_rows` take them.
            serve: called with rows of the operand, and rows of A S or H S that were kept.
        """
        missing = []
        for run in runs:
            kept = run.block.kept(side, run.first, run.count)
            if kept is None:
                missing.append(run)
            else:
                serve(run.rows, kept)
        if missing:
            last = missing[-1]
            left = DEGREE - last.first - last.count if last.block.shared else 0
            rest = self._room(left, columns)
            factors = np.stack([run.block.factors for run in missing])
            compute(factors, bounds(missing), rest)
            last.block.keep(side, rest)

    def _room(self, rows: int, columns: int) -> Residues:
        """An array for rows to be kept, which has none if that would exceed the limit."""
        with self._lock:
            alive = [array for reference in self._kept if (array := reference()) is not None]
            room = self._kept_bytes - sum(array.nbytes for array in alive)
            out = np.empty((rows if 4 * rows * columns <= room else 0, columns), np.uint32)
            self._kept = [weakref.ref(array) for array in (*alive, out) if array.size]
        return out
