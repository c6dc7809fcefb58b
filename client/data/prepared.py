"""The data of a recipe as a model takes it, and what was found on the way."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from blindtune.client.data.chat import encode
from blindtune.client.data.classes import class_names, encode_classes
from blindtune.client.data.reading.fields import EmptyRecordError, unused_fields
from blindtune.client.data.reading.formats import (
    Completion,
    Conversation,
    Labelled,
    Parsed,
    parse,
    recognise,
    with_system,
)
from blindtune.client.data.reading.records import Record, read_records, record_digest, sample
from blindtune.client.data.split import Split, empty_records
from blindtune.client.data.templates.ends import Ends
from blindtune.client.data.templates.template import ChatTemplate
from blindtune.client.recipe.schema import DataFormat, DataSection
from blindtune.errors import DataError

__all__ = ["PreparedData", "Split", "prepare_data", "read_questions", "read_split"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedData:
    """All data of a recipe.

    Attributes:
        labels: class names; empty for instructions.
    """

    train: Split
    validation: Split | None
    labels: Sequence[str]


def prepare_data(
    section: DataSection, tokenizer: Any, seed: int, now: datetime | None = None
) -> PreparedData:
    """Reads and encodes the data of a recipe.

    Args:
        now: the time that a chat template is told; see `read_split`.

    Raises:
        DataError: see `read_split`.
    """
    now = now or datetime.now()
    train = read_split(section, section.train, tokenizer, section.labels, section.train_examples, seed, now)
    if section.task == "classification" and len(train.labels) < 2:
        raise DataError(f"{section.train}: all examples have the same label: there is nothing to learn")
    validation = None
    if section.validation is not None:
        labels = train.labels or None
        validation = read_split(
            section, section.validation, tokenizer, labels, section.validation_examples, seed, now
        )
        if validation.pairs != train.pairs:
            raise DataError(f"{section.validation}: of it and {section.train}, only one has pairs of texts")
    return PreparedData(train, validation, train.labels)


def read_split(
    section: DataSection,
    path: Path,
    tokenizer: Any,
    labels: Sequence[str] | None,
    limit: int | None,
    seed: int,
    now: datetime | None = None,
) -> Split:
    """Reads and encodes one file.

    Args:
        labels: class names; None for those in the file.
        limit: take a random sample of so many.
        now: the time that a chat template is told: it is the same for the same texts on another day.

    Raises:
        DataError: a record is malformed, has a label that is none of ``labels``, or no record teaches
            anything.
    """
    records = read_records(path)
    read = _read(section, path, records)
    chosen = sample(len(read.parsed), limit, seed)
    if read.layout == "text-label":
        examples = [x for x in read.parsed if isinstance(x, Labelled)]
        names = class_names(examples, labels)
        labelled = [examples[i] for i in chosen]
        split = encode_classes(path, labelled, tokenizer, names, section.max_length)
    else:
        template = ChatTemplate(tokenizer, now)
        taken = [read.parsed[i] for i in chosen]
        split = _instructions(section, path, read.layout, taken, tokenizer, template)
    return replace(split, digests=[record_digest(x) for x in records], empty=read.empty, unused=read.unused)


def read_questions(
    section: DataSection, path: Path, limit: int | None, seed: int
) -> list[Conversation | Completion]:
    """The examples of one file, or a random sample of so many, as a model is to be asked them.

    None is left out or cut off, however long it is: nothing is learned here.

    Records that say nothing are left out with a warning in the log.

    Raises:
        DataError: a record is malformed, or is a labelled text.
    """
    read = _read(section, path, read_records(path))
    if read.empty:
        _logger.warning("%s", empty_records(read.empty))
    return [_question(read.parsed[i], section.system) for i in sample(len(read.parsed), limit, seed)]


@dataclass(frozen=True)
class _Read:
    """Everything in a file: all records are checked before some are taken, so a broken line always shows."""

    layout: DataFormat
    parsed: Sequence[Parsed]
    empty: Sequence[str]
    unused: Mapping[str, int]


def _read(section: DataSection, path: Path, records: Sequence[Record]) -> _Read:
    layout = recognise(records[0], section.task) if section.format == "auto" else section.format
    parsed: list[Parsed] = []
    empty: list[str] = []
    unused: Counter[str] = Counter()
    first: EmptyRecordError | None = None
    for record in records:
        try:
            parsed.append(parse(record, layout))
        except EmptyRecordError as error:
            first = first or error
            empty.append(record.where)
        unused.update(unused_fields(record, layout))
    if first is not None and not parsed:
        raise first if len(records) == 1 else DataError(f"{first}; no other record of {path} says more")
    return _Read(layout, parsed, empty, unused)


def _instructions(
    section: DataSection,
    path: Path,
    layout: DataFormat,
    parsed: Sequence[Parsed],
    tokenizer: Any,
    template: ChatTemplate,
) -> Split:
    kept: list[Parsed] = []
    rows = []
    cut = endless = 0
    ends = Ends()
    for example in (_question(x, section.system) for x in parsed):
        encoded = encode(example, tokenizer, section.max_length, template)
        cut += encoded.cut
        if encoded.learns:
            kept.append(example)
            rows.append({"input_ids": encoded.input_ids, "labels": encoded.labels})
            ends |= encoded.ends
            endless += encoded.ends.endless
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
    dropped = len(parsed) - len(rows)
    return Split(path, layout, kept, rows, cut, dropped, stops=ends.stops, endless=endless)


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
    return with_system(example, system)
