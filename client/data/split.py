"""One file's examples as a trainer takes them, and what is to be said of the file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from blindtune.client.data.reading.formats import Parsed
from blindtune.client.recipe.schema import DataFormat

__all__ = ["Split", "empty_records"]

_NAMED = 5


@dataclass(frozen=True)
class Split(Dataset[dict[str, Any]]):
    """One file's examples, which a trainer takes as they are.

    Attributes:
        path: of the file.
        layout: format of its records.
        parsed: what they say, in the order of ``rows``.
        rows: for each example ``input_ids`` and ``labels``: a list of the same length for instructions,
            the class's number for classification.
        cut: how many examples were longer than allowed.
        dropped: how many had no token left that carries loss, and are not used.
        labels: class names; empty for instructions.
        digests: of all records of the file, used or not, in order; see `record_digest`.
        empty: where records stand that say nothing, and are not used.
        unused: fields that the format does not read, and how many records have them. Names may be private.
        stops: tokens that end answers.
        endless: how many examples have an answer that ends with no token of its own.
        pairs: whether the examples are pairs of texts.
        alike: how many of the labels differ from another one in case or spaces alone.
    """

    path: Path
    layout: DataFormat
    parsed: Sequence[Parsed]
    rows: Sequence[dict[str, Any]]
    cut: int
    dropped: int
    labels: Sequence[str] = ()
    digests: Sequence[bytes] = ()
    empty: Sequence[str] = ()
    unused: Mapping[str, int] = field(default_factory=dict)
    stops: frozenset[int] = frozenset()
    endless: int = 0
    pairs: bool = False
    alike: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.rows[index])  # what makes batches takes entries out

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(row["input_ids"]) for row in self.rows]

    @property
    def warnings(self) -> list[str]:
        """What someone should know who trains on it; nothing in there is private."""
        found = []
        if self.empty:
            found.append(empty_records(self.empty))
        if self.alike:
            found.append(
                f"{self.path}: {self.alike:,} of {len(self.labels):,} labels differ from another one in "
                "case or spaces alone, and are classes of their own: write them alike if they are one"
            )
        if self.endless:
            found.append(
                f"{self.path}: answers of {self.endless:,} of {len(self.rows):,} examples end with no token "
                "of their own, so the model does not learn to stop, and goes on until --max-new-tokens: take "
                "a chat template that ends turns with a special token"
            )
        return found


def empty_records(places: Sequence[str]) -> str:
    """That records are left out, and where they stand."""
    file, _, first = places[0].rpartition(", ")
    named = ", ".join([first, *(x.rpartition(", ")[2] for x in places[1:_NAMED])])
    more = f" and {len(places) - _NAMED:,} more" if len(places) > _NAMED else ""
    return (
        f"{file}: {len(places):,} of its records are left out, for they say nothing where they should: "
        f"{named}{more}"
    )
