"""The data of a recipe as a model takes it, and what was found on the way."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from blindtune.client.data.chat import encode
from blindtune.client.data.formats import Completion, Conversation, Labelled, Parsed, parse, recognise
from blindtune.client.data.records import Record, read_records, record_digest, sample
from blindtune.client.recipe.schema import DataFormat, DataSection
from blindtune.protocol.errors import DataError

__all__ = ["PreparedData", "Split", "prepare_data", "read_questions", "read_split"]


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
    """

    path: Path
    layout: DataFormat
    parsed: Sequence[Parsed]
    rows: Sequence[dict[str, Any]]
    cut: int
    dropped: int
    labels: Sequence[str] = ()
    digests: Sequence[bytes] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.rows[index])  # what makes batches takes entries out

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(row["input_ids"]) for row in self.rows]


@dataclass(frozen=True)
class PreparedData:
    """All data of a recipe.

    Attributes:
        labels: class names; empty for instructions.
    """

    train: Split
    validation: Split | None
    labels: Sequence[str]


def prepare_data(section: DataSection, tokenizer: Any, seed: int) -> PreparedData:
    """Reads and encodes the data of a recipe.

    Raises:
        DataError: see `read_split`.
    """
    train = read_split(section, section.train, tokenizer, section.labels, section.train_examples, seed)
    if section.task == "classification" and len(train.labels) < 2:
        raise DataError(f"{section.train}: all examples have the same label: there is nothing to learn")
    validation = None
    if section.validation is not None:
        labels = train.labels or None
        validation = read_split(
            section, section.validation, tokenizer, labels, section.validation_examples, seed
        )
    return PreparedData(train, validation, train.labels)


def read_split(
    section: DataSection,
    path: Path,
    tokenizer: Any,
    labels: Sequence[str] | None,
    limit: int | None,
    seed: int,
) -> Split:
    """Reads and encodes one file.

    Args:
        labels: class names; None for those in the file.
        limit: take a random sample of so many.

    Raises:
        DataError: a record is malformed, has a label that is none of ``labels``, or no record teaches
            anything.
    """
    records = read_records(path)
    layout, parsed = _parsed(section, records)
    chosen = sample(len(parsed), limit, seed)
    if layout == "text-label":
        examples = [x for x in parsed if isinstance(x, Labelled)]
        names = _class_names(examples, labels)
        taken = [examples[i] for i in chosen]
        split = _classification(path, taken, tokenizer, names, section.max_length)
    else:
        split = _instructions(section, path, layout, [parsed[i] for i in chosen], tokenizer)
    return replace(split, digests=[record_digest(x) for x in records])


def read_questions(
    section: DataSection, path: Path, limit: int | None, seed: int
) -> list[Conversation | Completion]:
    """The examples of one file, or a random sample of so many, as a model is to be asked them.

    None is left out or cut off, however long it is: nothing is learned here.

    Raises:
        DataError: a record is malformed, or is a labelled text.
    """
    _, parsed = _parsed(section, read_records(path))
    return [_question(parsed[i], section.system) for i in sample(len(parsed), limit, seed)]


def _parsed(section: DataSection, records: Sequence[Record]) -> tuple[DataFormat, list[Parsed]]:
    """Everything in a file: all records are checked before some are taken, so a broken line always shows."""
    layout = recognise(records[0], section.task) if section.format == "auto" else section.format
    return layout, [parse(record, layout) for record in records]


def _class_names(examples: Sequence[Labelled], labels: Sequence[str] | None) -> Sequence[str]:
    """Those of a whole file, so that a sample of it has the same classes."""
    names = sorted({x.label for x in examples}) if labels is None else labels
    known = set(names)
    for example in examples:
        if example.label not in known:
            raise DataError(
                f"{example.where}: the label is none of the {len(names)} that are trained on: correct it, "
                "or list all of them in data.labels"
            )
    return names


def _classification(
    path: Path, examples: Sequence[Labelled], tokenizer: Any, names: Sequence[str], max_length: int
) -> Split:
    numbers = {name: number for number, name in enumerate(names)}
    whole = tokenizer([x.text for x in examples])["input_ids"]
    ids = tokenizer([x.text for x in examples], truncation=True, max_length=max_length)["input_ids"]
    for example, tokens in zip(examples, ids, strict=True):
        if not tokens:
            raise DataError(f"{example.where}: the model's tokenizer makes no token of this text: remove it")
    rows = [{"input_ids": i, "labels": numbers[x.label]} for i, x in zip(ids, examples, strict=True)]
    cut = sum(len(a) > len(b) for a, b in zip(whole, ids, strict=True))
    return Split(path, "text-label", examples, rows, cut, 0, names)


def _instructions(
    section: DataSection, path: Path, layout: DataFormat, parsed: Sequence[Parsed], tokenizer: Any
) -> Split:
    kept: list[Parsed] = []
    rows = []
    cut = 0
    for example in (_question(x, section.system) for x in parsed):
        encoded = encode(example, tokenizer, section.max_length)
        cut += encoded.cut
        if encoded.learns:
            kept.append(example)
            rows.append({"input_ids": encoded.input_ids, "labels": encoded.labels})
    if not rows:
        raise DataError(
            f"{path}: every token of all {len(parsed)} examples is masked, so nothing would be learned: "
            + (
                f"the answers begin after {section.max_length} tokens; raise data.max_length"
                if cut
                else "the model's chat template marks no token as the assistant's; check it, or use format "
                "prompt-completion"
            )
        )
    return Split(path, layout, kept, rows, cut, len(parsed) - len(rows))


def _question(example: Parsed, system: str | None) -> Conversation | Completion:
    """An example for a language model, with the system message where it has none."""
    if isinstance(example, Labelled):
        raise DataError(f"{example.where}: a labelled text is no instruction")
    if system is None:
        return example
    if isinstance(example, Completion):
        raise DataError(
            f"{example.where}: data.system needs conversations, and this record is two plain texts: write "
            "them as messages"
        )
    if example.messages[0]["role"] == "system":
        return example
    return replace(example, messages=[{"role": "system", "content": system}, *example.messages])
