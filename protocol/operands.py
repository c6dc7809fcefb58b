"""What is multiplied: rows of residues, or rows of a seed that nobody has expanded yet.

Whoever multiplies rows of a seed expands them: on the host, or on the device that multiplies, where they
then never pass through the host's memory.
"""

from dataclasses import dataclass, replace

from blindtune.protocol.expansion import Seed
from blindtune.protocol.residues import Residues

__all__ = ["Operand", "SeededRows"]


@dataclass(frozen=True)
class SeededRows:
    """A part of a seed's matrix, cut like the array that it stands for: ``x[a:b]``, ``x[:, a:b]``.

    Attributes:
        seed: its ``row_offset`` is the first row.
        rows, columns: the shape.
        first_column: index of the first column in the seed's matrix.
    """

    seed: Seed
    rows: int
    columns: int
    first_column: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, key: slice | tuple[slice, slice]) -> "SeededRows":
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        start, stop, row_step = rows.indices(self.rows)
        left, right, column_step = columns.indices(self.columns)
        if row_step != 1 or column_step != 1:
            raise ValueError("rows and columns of a seed are taken one after another, without steps")
        return replace(
            self,
            # There may be no row after the last.
            seed=replace(self.seed, row_offset=self.seed.row_offset + (start if stop > start else 0)),
            rows=max(0, stop - start),
            columns=max(0, right - left),
            first_column=self.first_column + left,
        )

    def residues(self) -> Residues:
        """Expands them on the host, together with the columns on their left: uint32 [rows, columns]."""
        return self.seed.expand(self.rows, self.first_column + self.columns)[:, self.first_column :]


Operand = Residues | SeededRows
