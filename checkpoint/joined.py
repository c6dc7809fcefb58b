"""Weights that a checkpoint stores joined in one tensor, such as query, key and value, or gate and up.

Loading splits them by conversions that transformers names for each family. Where all parts are ranges of
rows, which are output features, each part is a layer of its own: an integer weight and its scale follow from
one row alone, so that a part's are those rows of the whole tensor's. Every other way of splitting (heads that
take turns, columns, several operations in a row) is not read here.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from transformers import core_model_loading
from transformers.core_model_loading import Chunk, ConversionOps, WeightConverter

__all__ = ["Rows", "split_rows", "tensor_keys"]

_RANGE = re.compile(r"\[\d+:\d+\]$")
_SPLIT = getattr(core_model_loading, "Split", None)  # the first releases of transformers 5 lack it


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows ``start ... stop - 1`` of a tensor in a checkpoint.

    Attributes:
        key: of the tensor.
        of: how many rows the tensor has.
    """

    key: str
    start: int
    stop: int
    of: int

    @property
    def name(self) -> str:
        """What both sides call them. No parameter of a model has a name that ends like this."""
        return f"{self.key}[{self.start}:{self.stop}]"

    def __len__(self) -> int:
        return self.stop - self.start


def tensor_keys(names: Iterable[str]) -> list[str]:
    """The keys of the tensors that layers of these names are, or are parts of, each once."""
    return list(dict.fromkeys(_RANGE.sub("", name) for name in names))


def split_rows(converter: WeightConverter, key: str, counts: Sequence[int]) -> list[Rows] | None:
    """The rows that each parameter gets of a tensor.

    Args:
        converter: how loading makes the parameters out of the tensor.
        key: of the tensor.
        counts: rows of each parameter, in the converter's order.

    Returns:
        None where it makes something else than ranges of rows out of it, or of sizes that are not these.
    """
    if len(converter.source_patterns) != 1 or len(converter.operations) != 1:
        return None
    (operation,) = converter.operations
    if not (_cuts_evenly(operation) and len(set(counts)) == 1) and not _cuts_by_shape(operation):
        return None
    ends = list(accumulate(counts, initial=0))
    return [Rows(key, start, stop, ends[-1]) for start, stop in pairwise(ends)]


def _cuts_evenly(operation: ConversionOps) -> bool:
    by_a_setting = getattr(operation, "num_shards_attribute", None) is not None
    return type(operation) is Chunk and operation.dim == 0 and not by_a_setting


def _cuts_by_shape(operation: ConversionOps) -> bool:
    return _SPLIT is not None and type(operation) is _SPLIT and operation.dim == 0
