"""Labelled texts, and pairs of texts, as token numbers and numbers of classes."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blindtune.client.data.reading.formats import Labelled
from blindtune.client.data.split import Split
from blindtune.errors import DataError

__all__ = ["class_names", "encode_classes"]


def class_names(examples: Sequence[Labelled], labels: Sequence[str] | None) -> Sequence[str]:
    """Those of a whole file, so that a sample of it has the same classes.

    Args:
        labels: the ones that there are; None for those that occur: sorted, whole numbers by their value.

    Raises:
        DataError: an example has another label.
    """
    if labels is None:
        found = {x.label for x in examples}
        return sorted(found, key=int if all(map(_is_number, found)) else str)
    known = set(labels)
    for example in examples:
        if example.label not in known:
            raise DataError(
                f"{example.where}: the label is none of the {len(labels)} that are trained on: correct it, "
                "or list all of them in data.labels"
            )
    return labels


def encode_classes(
    path: Path, examples: Sequence[Labelled], tokenizer: Any, names: Sequence[str], max_length: int
) -> Split:
    """Encodes labelled texts as the tokenizer has them: pairs as pairs.

    Raises:
        DataError: a text has no token, or only some of the examples are pairs.
    """
    pairs = [x for x in examples if x.pair is not None]
    if pairs and len(pairs) < len(examples):
        single = next(x for x in examples if x.pair is None)
        raise DataError(f"{single.where}: field 'text_pair' is missing, and other records have one")
    texts = [[x.text for x in examples], *([[x.pair for x in examples]] if pairs else [])]
    whole = tokenizer(*texts)["input_ids"]
    encoded = tokenizer(*texts, truncation=True, max_length=max_length)
    for example, tokens in zip(examples, encoded["input_ids"], strict=True):
        if not tokens:
            raise DataError(f"{example.where}: the model's tokenizer makes no token of this text: remove it")
    numbers = {name: number for number, name in enumerate(names)}
    # Which text of a pair a token is of, for models that want to know.
    columns = [x for x in ("input_ids", "token_type_ids") if x == "input_ids" or (pairs and x in encoded)]
    rows = [
        {column: encoded[column][i] for column in columns} | {"labels": numbers[x.label]}
        for i, x in enumerate(examples)
    ]
    cut = sum(len(a) > len(b) for a, b in zip(whole, encoded["input_ids"], strict=True))
    spellings = Counter(_alike(x) for x in names)
    alike = sum(spellings[_alike(x)] > 1 for x in names)
    return Split(path, "text-label", examples, rows, cut, 0, names, pairs=bool(pairs), alike=alike)


def _is_number(label: str) -> bool:
    digits = label.removeprefix("-")
    return digits.isascii() and digits.isdigit() and str(int(digits)) == digits and label != "-0"


def _alike(label: str) -> str:
    return "".join(label.split()).casefold()
