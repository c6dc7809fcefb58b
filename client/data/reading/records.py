"""Reading records, each with the place it came from, so that a message can say which one is wrong."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blindtune.client.data.reading.file_kinds import require_lines, require_no_pointer
from blindtune.errors import DataError

__all__ = ["Record", "digest", "read_records", "record_digest", "sample"]

_TABLE_ROWS = 1000


@dataclass(frozen=True)
class Record:
    """One record.

    Attributes:
        fields: its values by name. They are private: messages name ``where``, never what is in here.
        where: file and line, or folder and row, both counted from 1.
        in_table: whether it comes from a table, which fills gaps with null, inside of values too.
    """

    fields: Mapping[str, Any]
    where: str
    in_table: bool = False


def read_records(path: Path) -> list[Record]:
    """The records of a JSONL file, or of a folder that ``datasets.Dataset.save_to_disk`` wrote.

    Raises:
        DataError: there is no such file or folder, a line is malformed, or there are no records.
    """
    if path.is_dir():
        records = _saved_dataset(path)
    elif path.is_file():
        records = _json_lines(path)
    else:
        raise DataError(
            f"there is no data file {path}: name a JSONL file, or a folder of datasets.save_to_disk"
        )
    if not records:
        raise DataError(f"{path} holds no records: a JSONL file has one JSON object on each line")
    return records


def _json_lines(path: Path) -> list[Record]:
    records = []
    try:
        require_lines(path)
        # The file is split at line feeds alone: JSON strings may hold what else counts as a line's end.
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                text = _decoded(line, where)
                if text.strip():
                    records.append(Record(_object(text, where), where))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return records


def _decoded(line: bytes, where: str) -> str:
    try:
        # Some editors begin a file with the mark that this encoding leaves out.
        return line.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{where}: this is no UTF-8: save the file as UTF-8") from None


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line, parse_constant=_refuse_constant, object_pairs_hook=_once)
        if "\\ud" in line.lower():  # half of a pair, which no tokenizer takes
            json.dumps(fields, ensure_ascii=False).encode()
    except _Repeated:
        raise DataError(f"{where}: a field is there twice: remove one of the two") from None
    except json.JSONDecodeError as error:
        # Only what is wrong and where: the text around it is private.
        raise DataError(f"{where}, column {error.colno}: this is no JSON: {error.msg}") from None
    except RecursionError:
        raise DataError(f"{where}: this is no record: it is nested too deeply") from None
    except UnicodeEncodeError:
        raise DataError(f"{where}: a text has a \\u escape that is half of a character") from None
    except ValueError:
        raise DataError(f"{where}: a number is infinite, none at all (NaN), or has too many digits") from None
    if not isinstance(fields, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(fields).__name__}")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


class _Repeated(Exception):
    """A field of a record, which may be private, is there twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _Repeated
    return fields


def _saved_dataset(path: Path) -> list[Record]:
    from datasets import Dataset, DatasetDict, load_from_disk

    try:
        for file in path.glob("*.arrow"):
            require_no_pointer(file)
        dataset = load_from_disk(str(path))
        if isinstance(dataset, Dataset):
            # As stored: decoding an image or a sound would open its path, which may be on the network.
            tables = dataset.with_format("arrow").iter(_TABLE_ROWS)
            rows = (row for table in tables for row in table.to_pylist())
            return [Record(fields, f"{path}, row {number}", True) for number, fields in enumerate(rows, 1)]
    except IndexError:
        return []  # an empty one can be saved, and then not be loaded
    except (DataError, MemoryError):
        raise
    except Exception as error:  # its several formats have errors of their own
        raise DataError(
            f"{path} is no folder of datasets.save_to_disk ({type(error).__name__}): name such a folder or a "
            "JSONL file"
        ) from None
    if isinstance(dataset, DatasetDict):
        splits = ", ".join(str(path / name) for name in dataset)
        raise DataError(f"{path} holds several splits: name one of {splits}")
    raise DataError(f"{path} holds a {type(dataset).__name__}, not a Dataset")


def sample(count: int, limit: int | None, seed: int) -> Sequence[int]:
    """Indices of a random sample, the same for the same seed; without a limit, all in order."""
    if limit is None or limit >= count:
        return range(count)
    return random.Random(seed).sample(range(count), limit)  # noqa: S311 - it protects nothing


def digest(examples: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 over encoded examples in order, to notice that the data changed between two runs."""
    state = hashlib.sha256()
    for example in examples:
        state.update(json.dumps(example, sort_keys=True).encode() + b"\n")
    return state.hexdigest()


def record_digest(record: Record) -> bytes:
    """SHA-256 of one record: of its JSON with sorted names and no spaces, in UTF-8.

    A value for which JSON has no form, as a dataset's column of images or times may hold, counts as Python
    writes it.
    """
    text = json.dumps(
        dict(record.fields), sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=repr
    )
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
